"""What the commands share: how results are delivered, messages said and the process set up."""

import json
import logging
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import typer
from rich.console import Console

from exl2jax.errors import SettingsError
from exl2jax.variants import load_entry_points, load_plugin
from exl2jax.variants.recipe import Recipe, recipe_from

CACHE_MEGABYTES = 1024
LOG_WIDTH = 160
"""Columns of a table that goes to no terminal."""

SAME_BYTES = "--xla_gpu_deterministic_ops"
"""XLA's flag for the same result in each run: otherwise it times algorithms on a GPU and takes the fastest."""


def deliver(as_json: bool, record: dict[str, Any], table: Callable[[], Any]) -> None:
    """Print the result: one JSON object, or a table for people."""
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        console = Console()
        # A pipe or a log has no width of its own, and cut figures are none.
        (console if console.is_terminal else Console(width=LOG_WIDTH)).print(table())


def set_up(console: Console) -> None:
    """Logging to stderr, and unless the environment names them the compilation cache and the same bytes on a GPU."""
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("exl2jax").setLevel(logging.INFO)
    flags = os.environ.get("XLA_FLAGS", "")
    if SAME_BYTES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {SAME_BYTES}=true".lstrip()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "exl2jax" / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_MEGABYTES * 2**20)
        # Every one: hundreds of short compilations take seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def say(message: str) -> None:
    """A line for the person, on stderr."""
    sys.stderr.write(message + "\n")


def load_variants(plugins: list[Path] | None) -> None:
    """Register the variants of installed packages and of the files that were named."""
    load_entry_points()
    for path in plugins or ():
        load_plugin(path)


def settings_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file for flags that are not given: keys are the long flags, `-` or `_` alike."""
    if path is None:
        return None
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SettingsError(f"--settings {path}: cannot be read ({e})") from e
    named = {
        name.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    values = {key.replace("-", "_"): value for key, value in record.items()}
    unknown = sorted(set(values) - set(named))
    if unknown:
        raise SettingsError(f"--settings {path}: there is no flag --{unknown[0]}; see --help")
    context.default_map = {named[key]: value for key, value in values.items()}
    return path


def recipe_asked(preset: str, variants: list[str] | None, candidates: str | None) -> str | Recipe:
    """The preset's name, or the recipe that it makes with variants."""
    pairs = [(kind, name) for kind, _, name in (text.partition("=") for text in variants or ())]
    pairs += [("candidates", candidates)] if candidates else []
    kinds = [kind for kind, _ in pairs]
    twice = [kind for kind in kinds if kinds.count(kind) > 1]
    if twice:
        raise SettingsError(f"two variants of one kind, {twice[0]}; give one")
    return recipe_from({"preset": preset, **dict(pairs)}, preset) if pairs else preset
