"""The `exl2jax` command: one file per command, each a thin call of the library."""

from exl2jax.cli.entry import main, run

__all__ = ["main", "run"]
