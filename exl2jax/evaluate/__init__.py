"""Judging a directory: perplexity, KL divergence and agreement of a model, and verification of EXL2 files."""

from exl2jax.evaluate.logits import model_logits
from exl2jax.evaluate.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate", "model_logits"]
