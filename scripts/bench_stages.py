"""The two passes of a conversion on a model, module by module, with the work that their shapes call for."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exl2jax.candidates import ATTENTION, MLP
from exl2jax.models import HFModel, ModelConfig, ModuleSpec, build_decoder, module_specs
from exl2jax.models.modules import ATTENTION_KIND
from exl2jax.pipeline.measure import STATES, Block, measure_step
from exl2jax.pipeline.quantize import REFERENCE, QuantizeStep
from exl2jax.pipeline.recipe import find_recipe
from exl2jax.pipeline.stream import embed
from exl2jax.pipeline.trials import plan
from exl2jax.qparams import QParams, q
from scripts.bench_plain import plain_attention, plain_gptq, plain_mlp
from scripts.bench_rates import SEARCH_OPS, WALK_OPS, timed

SETTING = q("4", "1", "128")
"""Every linear's setting in the timed quantization pass."""

PLAIN_COLUMNS = 64
"""Columns of a matrix that the plain loop quantizes; its time is scaled to all of them."""


class Work(NamedTuple):
    """Floating-point operations: matrix products, and element-wise ones of the scale search and the walk."""

    products: float
    elementwise: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.products + other.products, self.elementwise + other.elementwise)


class Stage(NamedTuple):
    """A pass: its steps, one call each, and the work they hold."""

    run: Any
    forward: Work
    whole: Work


def gptq_work(rows: int, columns: int) -> Work:
    """GPTQ of one matrix: the feedback is a triangle of products, the search 97 trials of every weight."""
    return Work(rows * rows * columns, rows * columns * (97 * SEARCH_OPS + WALK_OPS))


def forward_work(spec: ModuleSpec, config: ModelConfig, length: int, settings: int | None = None) -> Work:
    """Products of one row's forward pass; with `settings` set, those of all candidates, shared ones counted once."""
    if settings is None:
        counts = {linear.name: 1 for linear in spec.linears}
        cores = values = 1
    else:
        table = ATTENTION if spec.kind == ATTENTION_KIND else MLP
        picks = [[row[i] for row in table] for i in range(len(spec.linears))]
        distinct = [list(dict.fromkeys(column)) for column in picks]
        counts = {x.name: len(d) for x, d in zip(spec.linears, distinct, strict=True)}
        groups = plan([[d.index(p) for p in c] for d, c in zip(distinct[:-1], picks[:-1], strict=True)])
        cores, values = len(groups), sum(len(g.last) for g in groups)
        counts[spec.linears[-1].name] = len(set(table))
    products = sum(2 * length * linear.weights * counts[linear.name] for linear in spec.linears)
    if spec.kind == ATTENTION_KIND:
        causal = length * (length + 1) / 2
        products += 2 * causal * config.num_heads * config.head_dim * (cores + values)
    return Work(products)


def hessian_work(spec: ModuleSpec, length: int) -> Work:
    """Both Hessians of one row, half of each being the mirror of the other."""
    return Work(sum(length * k * k for k in (group[0].rows for group in spec.groups)))


def measurement(model: HFModel, ids: np.ndarray, modules: int) -> Stage:
    """Stock's exact measurement of the first `modules` modules."""
    specs, decoder = module_specs(model.config)[:modules], build_decoder(model.config)
    rows, length = ids.shape

    def run() -> None:
        carry = {STATES: embed(model, ids)}
        for spec in specs:
            carry, _ = measure_step(carry, Block(spec, model.module_params(spec)), decoder=decoder, mask=None)

    forward = whole = Work(0)
    for spec in specs:
        row = forward_work(spec, model.config, length) + forward_work(spec, model.config, length, len(ATTENTION))
        forward += Work(row.products * rows)
        whole += Work((row + hessian_work(spec, length)).products * rows)
        table = ATTENTION if spec.kind == ATTENTION_KIND else MLP
        for i, linear in enumerate(spec.linears):
            single, count = gptq_work(linear.rows, linear.columns), len({row[i] for row in table})
            whole += Work(single.products * count, single.elementwise * count)
    return Stage(run, forward, whole)


def quantization(model: HFModel, ids: np.ndarray, modules: int, check_rows: int) -> Stage:
    """The quantization of the first `modules` modules by the stock recipe, packing and storing included."""
    specs, decoder = module_specs(model.config)[:modules], build_decoder(model.config)
    rows, length = ids.shape
    strategy: dict[str, dict[str, QParams]] = {s.key: {x.name: SETTING for x in s.linears} for s in specs}

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            step = QuantizeStep(
                decoder=decoder,
                recipe=find_recipe("stock"),
                strategy=strategy,
                head_bits=6,
                input_ids=ids,
                mask=None,
                out_tensor=Path(folder),
                check_rows=check_rows,
            )
            states = embed(model, ids)
            carry = {STATES: states, REFERENCE: states[:check_rows].copy()}
            for spec in specs:
                carry, _ = step(carry, Block(spec, model.module_params(spec)))

    forward = whole = Work(0)
    for spec in specs:
        row = forward_work(spec, model.config, length)
        forward += Work(row.products * (2 * rows + min(check_rows, rows)))
        whole += Work(row.products * (2 * rows + min(check_rows, rows)) + hessian_work(spec, length).products * rows)
        for linear in spec.linears:
            whole += gptq_work(linear.rows, linear.columns)
    return Stage(run, forward, whole)


def plain_pass(model: HFModel, rows: int, length: int, modules: int, *, measure: bool) -> float:
    """Core seconds of the stock algorithm as a plain loop: one row and a few columns are timed, the rest is scaled."""
    total = 0.0
    for spec, times in _by_kind(model, modules):
        params = model.module_params(spec)
        weights = {x.name: params[x.name]["kernel"] for x in spec.linears}
        h = np.random.default_rng(0).standard_normal((length, model.config.hidden_size)).astype(np.float32)
        one = timed(lambda s=spec, w=weights, p=params, h=h: _plain_forward(model, s, h, p, w), 1).cpu_seconds
        tables = ATTENTION if spec.kind == ATTENTION_KIND else MLP
        passes = 1 + len(tables) if measure else 2
        quantizing = 0.0
        for i, linear in enumerate(spec.linears):
            count = len({row[i] for row in tables}) if measure else 1
            w, u = weights[linear.name][:, :PLAIN_COLUMNS], np.eye(linear.rows, dtype=np.float32)
            spent = timed(lambda w=w, u=u: plain_gptq(w, u, 128, 4), 1).cpu_seconds
            quantizing += count * spent * linear.columns / w.shape[1]
        total += times * (rows * passes * one + quantizing)
    return total


def _plain_forward(model: HFModel, spec: ModuleSpec, h: np.ndarray, params: Any, weights: Any) -> np.ndarray:
    norm = params["norm"]["weight"]
    if spec.kind == ATTENTION_KIND:
        return plain_attention(h, norm, weights, model.config.num_heads, model.config.num_kv_heads)
    return plain_mlp(h, norm, weights)


def _by_kind(model: HFModel, modules: int) -> Iterator[tuple[ModuleSpec, int]]:
    """The first module of each kind, and how many of the first `modules` are like it."""
    specs = module_specs(model.config)[:modules]
    for kind in dict.fromkeys(spec.kind for spec in specs):
        like = [spec for spec in specs if spec.kind == kind]
        yield like[0], len(like)
