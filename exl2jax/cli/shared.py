"""What the commands share: how results are delivered, messages said and the process set up."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import typer
from rich.console import Console

CACHE_MEGABYTES = 1024


def deliver(as_json: bool, record: dict[str, Any], table: Callable[[], Any]) -> None:
    """Print the result: one JSON object, or a table for people."""
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
    else:
        Console().print(table())


def set_up(console: Console) -> None:
    """Logging to stderr, and the persistent compilation cache unless the environment names one."""
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("exl2jax").setLevel(logging.INFO)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "exl2jax" / "xla"))
        jax.config.update("jax_compilation_cache_max_size", CACHE_MEGABYTES * 2**20)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def say(message: str) -> None:
    """A line for the person, on stderr."""
    sys.stderr.write(message + "\n")
