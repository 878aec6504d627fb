"""The package's version, from its installed metadata."""

from importlib.metadata import version

VERSION = version("exl2jax")
