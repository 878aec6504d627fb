"""The inner loops of `exl2jax.ops` as Mosaic GPU kernels, and the choice between the two by platform."""

from exl2jax.pallas.dispatch import IMPLEMENTATIONS, choose_implementation, kernels_for

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "kernels_for"]
