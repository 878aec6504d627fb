"""Judging a directory: perplexity, KL divergence and agreement of a model, and verification of EXL2 files."""

from exl2jax.evaluation.figures import Evaluation, Figures
from exl2jax.evaluation.logits import model_logits
from exl2jax.evaluation.perplexity import evaluate, evaluate_many, evaluate_one, reference_pass
from exl2jax.evaluation.rows import EvalRows, heldout_rows, load_eval_rows, read_token_rows, text_rows

__all__ = [
    "EvalRows",
    "Evaluation",
    "Figures",
    "evaluate",
    "evaluate_many",
    "evaluate_one",
    "heldout_rows",
    "load_eval_rows",
    "model_logits",
    "read_token_rows",
    "reference_pass",
    "text_rows",
]
