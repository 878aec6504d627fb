"""`python -m exl2jax`: the command line."""

from exl2jax.cli import run

if __name__ == "__main__":
    run()
