"""Variants from outside the package: a user's Python file, and entry points of installed packages."""

import hashlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path

from exl2jax.errors import SettingsError
from exl2jax.variants.registry import of_source

GROUP = "exl2jax.variants"
"""Entry-point group: each entry names a module that registers variants when it is imported."""


def load_plugin(path: Path) -> None:
    """Run a Python file that registers variants. Only run files you trust; `SettingsError` says what went wrong."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise SettingsError(f"plugin {path}: cannot be read ({e})") from e
    name = f"exl2jax_plugin_{digest[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"plugin {path}: must be a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with of_source(digest):
            spec.loader.exec_module(module)
    except SettingsError:
        del sys.modules[name]
        raise
    except Exception as e:
        del sys.modules[name]
        raise SettingsError(f"plugin {path}: {type(e).__name__}: {e}") from e


def load_entry_points() -> None:
    """Import what installed packages offer under `exl2jax.variants`."""
    for entry in entry_points(group=GROUP):
        version = entry.dist.version if entry.dist else ""
        try:
            with of_source(f"{entry.value} {version}"):
                entry.load()
        except Exception as e:
            raise SettingsError(f"entry point {entry.name} of {GROUP}: {type(e).__name__}: {e}") from e
