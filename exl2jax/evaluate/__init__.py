"""Judging a directory: perplexity, KL divergence and agreement of a model, and verification of EXL2 files."""

from exl2jax.evaluate.logits import model_logits
from exl2jax.evaluate.perplexity import Evaluation, evaluate
from exl2jax.evaluate.rows import read_token_rows, text_rows

__all__ = ["Evaluation", "evaluate", "model_logits", "read_token_rows", "text_rows"]
