"""A Hub on the loopback address, and the library set to it: no cache of the user, no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from exl2jax.testing.hub_server import Hub, Repo, serving

WRITE, READ = "hf_write", "hf_read"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(roles={WRITE: "write", READ: "read"})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hf_api.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def published(hub: Hub, tiny_llama: Path) -> Repo:
    """The tiny model as a repository, with files that a conversion does not read."""
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    files |= {
        "README.md": b"---\nlicense: apache-2.0\n---\nText of the source.\n",
        "LICENSE": b"terms",
        "original/consolidated.00.pth": b"x" * 1000,
        "consolidated.safetensors": b"x" * 1000,
        "pytorch_model.bin": b"x" * 1000,
    }
    hub.repos["org/tiny"] = Repo(branches={"main": files})
    return hub.repos["org/tiny"]
