"""The results of an evaluation: figures over all tokens and over each domain of the text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from exl2jax.stream.scoring import Scores, perplexity

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Figures on token rows; `tokens` counts the predicted ones.

    `perplexity_se` is the standard error of the perplexity with rows as the independent units (None for a single row):
    by the delta method, `perplexity * sd(row means of the log likelihood) / sqrt(rows)`. The divergence
    KL(reference || model) is in nats per token: its mean, median and percentiles over tokens. `top1_agreement` is the
    share of tokens whose likeliest successor is the reference's. Both are None without a reference.
    """

    perplexity: float
    perplexity_se: float | None = None
    tokens: int
    kl_divergence: float | None = None
    kl_median: float | None = None
    kl_p90: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation(Figures):
    """Figures of a directory, and by domain where the rows have domains.

    `depth` is the relative error of the hidden states after every module against the reference's, by module key.
    `seconds` are of the whole pass, reading the weights and compiling included; `tokens_per_second` follows from them.
    """

    domains: Mapping[str, Figures] = field(default_factory=dict)
    depth: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens_per_second: float = 0.0


def figures_of(scores: Scores, rows: Sequence[int] | slice = slice(None)) -> Figures:
    """Figures over some rows of `scores`, all of them by default."""
    nll = scores.nll[rows]
    ppl = perplexity(nll)
    kl = None if scores.kl is None else scores.kl[rows].astype(np.float64)
    agree = None if scores.agree is None else scores.agree[rows]
    median, p90, p99 = (None, None, None) if kl is None else (float(x) for x in np.percentile(kl, PERCENTILES))
    return Figures(
        perplexity=ppl,
        perplexity_se=_standard_error(nll, ppl),
        tokens=int(nll.size),
        kl_divergence=None if kl is None else float(np.mean(kl)),
        kl_median=median,
        kl_p90=p90,
        kl_p99=p99,
        top1_agreement=None if agree is None else float(np.mean(agree, dtype=np.float64)),
    )


def _standard_error(nll: np.ndarray, ppl: float) -> float | None:
    """Rows are pieces of different texts and stand for the sampling; tokens of a row are far from independent."""
    if len(nll) < 2:
        return None
    means = np.mean(nll, axis=1, dtype=np.float64)
    return float(ppl * np.std(means, ddof=1) / math.sqrt(len(means)))
