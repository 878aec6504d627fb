"""Operations of the parts of a conversion, counted from shapes alone. Every estimate and benchmark counts by these."""

from collections.abc import Mapping
from typing import NamedTuple

from exl2jax.measure.measurement import candidate_rows
from exl2jax.measure.trials import plan
from exl2jax.models import LinearSpec, ModelConfig, ModuleSpec
from exl2jax.models.modules import ATTENTION_KINDS, BRANCH_ATTENTION_KINDS, SLIDING_KINDS
from exl2jax.ops.scales import TRIALS, ScaleSearch, search_scales
from exl2jax.qparams import QParams

SEARCH_OPS = 11
"""Element-wise operations of one weight at one multiplier: scale, round, two clamps, scale, subtract, magnitude, three
products and a square root with its sum counted as one."""

WALK_OPS = 12
"""Element-wise operations of one weight in the walk: divide, round, shift, two clamps, shift, scale, two conversions,
subtract, divide by the diagonal, convert the code."""

WITH_ATTENTION = (*ATTENTION_KINDS, *BRANCH_ATTENTION_KINDS)


class Work(NamedTuple):
    """Floating-point operations: products of forward passes; sums over tokens and products that are taken off them,
    both at the device's default precision for float32; products in full float32; and element-wise operations of the
    scale search and the walk.
    """  # noqa: D205

    fast: float = 0.0
    sums: float = 0.0
    exact: float = 0.0
    elementwise: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def products(self) -> float:
        """All matrix products."""
        return self.fast + self.sums + self.exact

    def times(self, count: float) -> "Work":
        """The work `count` times over."""
        return Work(*(count * each for each in self))


def gptq_work(rows: int, columns: int, search: ScaleSearch = search_scales) -> Work:
    """GPTQ of one matrix: the feedback is a triangle of products, the search a grid of scales."""
    elementwise = rows * columns * (TRIALS.get(search, TRIALS[search_scales]) * SEARCH_OPS + WALK_OPS)
    return Work(exact=rows * rows * columns, elementwise=elementwise)


def factor_work(rows: int) -> Work:
    """The factor of one Hessian: a Cholesky and a triangular inverse."""
    return Work(exact=2 / 3 * rows**3)


def feedback_work(linear: LinearSpec, samples: int) -> Work:
    """Feedback between the columns of a linear: the Hessian of its outputs and its factor, and the products of a walk.

    A walk multiplies what every row has lost with all of the square that says where it goes.
    """
    walk = 2 * linear.weights * linear.columns
    return Work(sums=samples * linear.columns**2, exact=walk) + factor_work(linear.columns)


def hessian_work(spec: ModuleSpec, tokens: int) -> Work:
    """The Hessians of all groups of linears, half of each being the mirror of the other."""
    return Work(sums=sum(tokens * k * k for k in (group[0].rows for group in spec.groups)))


def linear_work(linear: LinearSpec, tokens: int) -> float:
    """Operations of a product of all tokens with a linear."""
    return 2 * tokens * linear.weights


def forward_work(spec: ModuleSpec, config: ModelConfig, length: int) -> Work:
    """One row's forward pass. All experts of a mixture see all tokens: that is how it is computed."""
    return _products(spec, config, length, {linear.name: 1 for linear in spec.linears}, 1, 1)


def attention_work(spec: ModuleSpec, config: ModelConfig, length: int) -> Work:
    """One row's products of queries with keys and of their weights with values."""
    return _products(spec, config, length, {linear.name: 0 for linear in spec.linears}, 1, 1)


def candidates_work(spec: ModuleSpec, config: ModelConfig, length: int) -> Work:
    """One row's forward passes under all candidates of stock's table, shared products counted once."""
    rows, settings = candidate_rows(spec), distinct_settings(spec)
    counts = {name: len(found) for name, found in settings.items()}
    first = [[settings[x.name].index(row[x.name]) for row in rows] for x in spec.groups[0]]
    counts |= {linear.name: len({tuple(row.values()) for row in rows}) for linear in spec.groups[-1]}
    groups = plan(first)
    return _products(spec, config, length, counts, len(groups), sum(len(group.last) for group in groups))


def distinct_settings(spec: ModuleSpec) -> dict[str, list[QParams]]:
    """The settings that candidates give each linear, once each."""
    rows = candidate_rows(spec)
    return {linear.name: list(dict.fromkeys(row[linear.name] for row in rows)) for linear in spec.linears}


def _products(
    spec: ModuleSpec, config: ModelConfig, length: int, counts: Mapping[str, int], scores: int, values: int
) -> Work:
    """A row's products with every linear `counts` times, and `scores` and `values` products of the attention core."""
    products = float(sum(linear_work(linear, length) * counts[linear.name] for linear in spec.linears))
    if spec.kind in WITH_ATTENTION:
        pairs = _pairs(length, config.window if spec.kind in SLIDING_KINDS else None)
        products += 2 * pairs * config.num_heads * config.head_dim * (scores + values)
    return Work(fast=products)


def _pairs(length: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) / 2 + (length - seen) * seen
