#!/usr/bin/env python3
"""Drop-in for stock ExLlamaV2's convert.py: the same flags, handled by `exl2jax convert`."""

import sys

from exl2jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
