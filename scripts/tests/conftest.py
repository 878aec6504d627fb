"""Fixtures of the scripts' tests."""

from pathlib import Path

import pytest

from exl2jax.testing.tiny_model import write_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float16, one weight file, tied head. For reading only: other tests use it too."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
