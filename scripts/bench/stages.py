"""The two passes of a conversion on a model, module by module, with the work that their shapes need."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exl2jax.errors import SettingsError
from exl2jax.estimate.work import Work, candidates_work, distinct_settings, forward_work, gptq_work, hessian_work
from exl2jax.measure.accuracy import MeasureStep
from exl2jax.measure.measurement import candidate_rows
from exl2jax.models import HFModel, ModuleSpec, build_decoder, module_specs
from exl2jax.models.modules import ATTENTION_KIND, MLP_KIND
from exl2jax.qparams import q
from exl2jax.quantize.step import QuantizeStep
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from exl2jax.stream.scan import STATES
from exl2jax.stream.streams import Rows
from exl2jax.variants.recipe import find_recipe
from scripts.bench.plain import plain_attention, plain_gptq, plain_mlp
from scripts.bench.rates import plain_seconds

SETTING = q("4", "1", "128")
"""Every linear's setting in the timed quantization pass."""

PLAIN_COLUMNS = 64
"""Columns of a matrix that the plain loop quantizes; its time is scaled to all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassSizes:
    """Rows of tokens of the measurement, of the quantization and of its final check, and tokens of a row."""

    measured: int = 19
    quantized: int = 115
    check: int = 16
    length: int = 512


class Stage(NamedTuple):
    """A pass: `run(n)` takes it through the first n modules; `work` is that of all of them."""

    run: Callable[[int], None]
    forward: Work
    whole: Work


def measurement(model: HFModel, modules: int, sizes: PassSizes) -> Stage:
    """Stock's exact measurement of the first `modules` modules."""
    specs, decoder, ids = _specs(model, modules), build_decoder(model.config), _tokens(model, sizes.measured, sizes)

    def run(count: int) -> None:
        rows = Rows.of(np.ones(ids.shape), model.config.hidden_size)
        carry, step = {STATES: rows.place(embed(model, ids))}, MeasureStep(decoder=decoder, rows=rows)
        for spec in specs[:count]:
            carry, _ = step(carry, Block.of(model, spec))

    forward = whole = Work()
    for spec in specs:
        row = forward_work(spec, model.config, sizes.length) + candidates_work(spec, model.config, sizes.length)
        forward += row.times(sizes.measured)
        whole += (row + hessian_work(spec, sizes.length)).times(sizes.measured)
        settings = distinct_settings(spec)
        for linear in spec.linears:
            whole += gptq_work(linear.rows, linear.columns).times(len(settings[linear.name]))
    return Stage(run, forward, whole)


def quantization(model: HFModel, modules: int, sizes: PassSizes) -> Stage:
    """The quantization of the first `modules` modules by the stock recipe, packing and storing included."""
    specs, decoder, ids = _specs(model, modules), build_decoder(model.config), _tokens(model, sizes.quantized, sizes)
    check = min(sizes.check, sizes.quantized)

    def run(count: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            step = QuantizeStep(
                decoder=decoder,
                recipe=find_recipe("stock"),
                strategy={s.key: {x.name: SETTING for x in s.linears} for s in specs},
                head_bits=6,
                input_ids=ids,
                rows=Rows.of(np.ones(ids.shape), model.config.hidden_size),
                out_tensor=Path(folder),
                check_rows=check,
            )
            carry = {name: step.rows.place(x) for name, x in step.start(embed(model, ids)).items()}
            for spec in specs[:count]:
                carry, _ = step(carry, Block.of(model, spec))

    forward = whole = Work()
    for spec in specs:
        rows = forward_work(spec, model.config, sizes.length).times(2 * sizes.quantized + check)
        forward += rows
        whole += rows + hessian_work(spec, sizes.length).times(sizes.quantized)
        for linear in spec.linears:
            whole += gptq_work(linear.rows, linear.columns)
    return Stage(run, forward, whole)


def plain_pass(model: HFModel, modules: int, sizes: PassSizes, *, measure: bool) -> float:
    """Core seconds of the stock algorithm as a plain loop: one row and a few columns are timed, the rest is scaled."""
    total, rows = 0.0, sizes.measured if measure else sizes.quantized
    rng = np.random.default_rng(0)
    for spec, times in _by_kind(model, modules):
        params = model.module_params(spec)
        weights = {x.name: np.asarray(params[x.name]["kernel"], np.float32) for x in spec.linears}
        h = rng.standard_normal((sizes.length, model.config.hidden_size)).astype(np.float32)
        one = plain_seconds(lambda s=spec, w=weights, p=params, h=h: _plain_forward(model, s, h, p, w))
        inputs = [rng.standard_normal((sizes.length, g[0].rows)).astype(np.float32) for g in spec.groups]
        hessians = plain_seconds(lambda inputs=inputs: [x.T @ x for x in inputs])
        settings = distinct_settings(spec)
        quantizing = 0.0
        for linear in spec.linears:
            w, u = weights[linear.name][:, :PLAIN_COLUMNS], np.eye(linear.rows, dtype=np.float32)
            spent = plain_seconds(lambda w=w, u=u: plain_gptq(w, u, SETTING.group_size[0], SETTING.bits[0]))
            quantizing += (len(settings[linear.name]) if measure else 1) * spent * linear.columns / w.shape[1]
        passes = 1 + len(candidate_rows(spec)) if measure else 2
        total += times * (rows * (passes * one + hessians) + quantizing)
    return total


def _plain_forward(model: HFModel, spec: ModuleSpec, h: np.ndarray, params: Any, weights: Any) -> np.ndarray:
    norm = np.asarray(params["norm"]["weight"], np.float32)
    if spec.kind == ATTENTION_KIND:
        return plain_attention(h, norm, weights, model.config.num_heads, model.config.num_kv_heads)
    return plain_mlp(h, norm, weights)


def _by_kind(model: HFModel, modules: int) -> Iterator[tuple[ModuleSpec, int]]:
    """The first module of each kind, and how many of the first `modules` are like it."""
    specs = _specs(model, modules)
    for kind in dict.fromkeys(spec.kind for spec in specs):
        like = [spec for spec in specs if spec.kind == kind]
        yield like[0], len(like)


def _specs(model: HFModel, modules: int) -> tuple[ModuleSpec, ...]:
    """The first modules; `SettingsError` where the work of one is not counted here."""
    specs = module_specs(model.config)[:modules]
    for spec in specs:
        if spec.kind not in (ATTENTION_KIND, MLP_KIND) or not model.config.arch.mlp[0]:
            raise SettingsError(f"{spec.key}: the benchmark counts the work of Llama-like models only; name one")
    return specs


def _tokens(model: HFModel, rows: int, sizes: PassSizes) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, sizes.length)).astype(np.int32)
