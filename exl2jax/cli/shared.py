"""Parts that the commands share: the invocation, the set-up of the process, messages and results."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import typer
from rich.console import Console

from exl2jax.cli.spelling import Spelling
from exl2jax.stream.progress import StopFlag
from exl2jax.variants import load_entry_points, load_plugin

CACHE_MEGABYTES = 1024
LOG_WIDTH = 160
"""Columns of a table that goes to no terminal."""

SAME_BYTES = "--xla_gpu_deterministic_ops"
"""XLA's flag for the same result in each run: otherwise it times algorithms on a GPU and takes the fastest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Invocation:
    """One call of the command: the flag that asks it to stop, and how its command line spells settings."""

    stop: StopFlag
    spelling: Spelling

    def spelled[R](self, record: R, *texts: str) -> R:
        """A record with the settings in its tuples of texts spelled as flags."""
        changes = {name: tuple(map(self.spelling, getattr(record, name))) for name in texts}
        return replace(record, **changes)  # type: ignore[type-var]


def invocation(context: typer.Context) -> Invocation:
    """The invocation that a command runs in."""
    return context.obj or Invocation(stop=StopFlag(), spelling=Spelling({}, ()))


def deliver(as_json: bool, record: dict[str, Any], table: Callable[[], Any]) -> None:
    """Print the result: one JSON object, or a table for people."""
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        console = Console()
        # A pipe or a log has no width of its own, and a figure that is cut off is of no use.
        (console if console.is_terminal else Console(width=LOG_WIDTH)).print(table())


class _SpelledFormatter(logging.Formatter):
    """The message alone, with settings spelled as flags."""

    def __init__(self, spelling: Spelling) -> None:
        """Spell by `spelling`."""
        super().__init__("%(message)s")
        self._spelling = spelling

    def format(self, record: logging.LogRecord) -> str:
        """The line for stderr."""
        return self._spelling(super().format(record))


def set_up(console: Console, spelling: Spelling | None = None) -> None:
    """Set up logging to stderr, the compilation cache, and deterministic algorithms on a GPU.

    A cache directory or an XLA flag that the environment names stays as it is.
    """
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(_SpelledFormatter(spelling or Spelling({}, ())))
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
    """Write a line to stderr."""
    sys.stderr.write(message + "\n")


def load_variants(plugins: list[Path] | None) -> None:
    """Register the variants of installed packages and of the given files."""
    load_entry_points()
    for path in plugins or ():
        load_plugin(path)
