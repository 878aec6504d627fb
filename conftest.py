"""Fixtures and settings that every test shares."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from tests import skip_policy

if TYPE_CHECKING:
    from exl2jax import ConversionConfig

ROOT = Path(__file__).parent
DEMO_MODEL_VARIABLE = "EXL2JAX_DEMO_MODEL"

# Read by the libraries when they are imported, and passed on to test workers and to the commands that tests start.
ENVIRONMENT = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",  # a dtype mixed by accident is an error
    "HF_HUB_OFFLINE": "1",  # no test reaches for the network
    # The command sets this flag, and the compilation cache keeps programs of other flags apart: with it the tests that
    # call the library and those that run the command share what was compiled.
    "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizer's threads and forked processes do not mix
}

# One compilation cache per test session, shared by all workers and subprocesses. It is thrown away afterwards: what a
# killed process left half-written must not reach the next session. JAX locks the directory only if its size is limited.
COMPILATION_CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
}

# Every compiled program takes some twenty memory mappings. Linux allows a process 65,530 of them, and a compiler that
# gets no more crashes.
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before anything imports JAX; workers inherit it from the process that starts them."""
    config.pluginmanager.register(skip_policy)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="exl2jax-tests-")
        os.environ.update(COMPILATION_CACHE, JAX_COMPILATION_CACHE_DIR=folder)
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped() -> Iterator[None]:
    """After a file's tests, where its process holds many: what comes again is read from the cache on disk."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax  # not before the environment is set

        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float16, one weight file, tied head. For reading only: other tests use it too."""
    from exl2jax.testing.tiny_model import write_tiny_llama  # not before the environment is set

    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_llama_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16, three weight files, a head of its own and biases. For reading only."""
    from exl2jax.testing.tiny_model import write_tiny_llama  # not before the environment is set

    folder = tmp_path_factory.mktemp("tiny") / "llama-untied"
    return write_tiny_llama(
        folder, seed=1, tie=False, attention_bias=True, mlp_bias=True, dtype="bfloat16", shards=3, num_layers=3
    )


@pytest.fixture(scope="session")
def tiny_conversion(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[Path, str], ConversionConfig]":
    """Converts a tiny model by a preset once for all workers; gives the job's settings. For reading only.

    4.5 bits per weight, from two rows of 48 tokens of the built-in texts; `compile_full` is the EXL2 directory.
    """
    from exl2jax import ConversionConfig, convert  # not before the environment is set

    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = home.parent

    def converted(source: Path, preset: str) -> ConversionConfig:
        base = home / f"converted-{source.name}-{preset}"
        config = ConversionConfig(
            in_dir=source,
            out_dir=base / "work",
            compile_full=base / "exl2",
            preset=preset,
            bits=4.5,
            dataset_rows=2,
            length=48,
            measurement_rows=2,
            measurement_length=48,
        )
        with FileLock(f"{base}.lock"):
            if not (base / "done").exists():
                convert(config)
                (base / "done").touch()
        return config

    return converted


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's directory; skips where it was not built."""
    path = Path(os.environ.get(DEMO_MODEL_VARIABLE, ROOT / "demo" / "model"))
    if not (path / "model.safetensors").is_file():
        pytest.skip(f"no demo model at {path}: build it with `make demo-model` or name it by {DEMO_MODEL_VARIABLE}")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data directory beside the checkout; skips where there is none."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared directory beside this checkout")
    return path
