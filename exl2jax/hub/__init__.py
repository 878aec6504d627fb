"""The Hub: sources by name, cards, and publishing."""

from exl2jax.hub.sources import source_directory

__all__ = ["source_directory"]
