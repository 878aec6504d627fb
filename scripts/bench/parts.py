"""The parts of the quantization pass on one block, and the work of each: where the time goes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from exl2jax.estimate.work import Work, factor_work, forward_work, gptq_work, hessian_work
from exl2jax.models import HFModel, LinearSpec, Module, ModuleSpec, build_decoder, module_specs
from exl2jax.models.modules import ATTENTION_KIND
from exl2jax.ops import HessianFactor, Products, QuantizedLinear
from exl2jax.quantize.linear import in_threads, module_factors, pack_checked, quantize
from exl2jax.stream.forward import forward, relative_error
from exl2jax.stream.hessians import collect
from exl2jax.stream.streams import Rows, Stream
from scripts.bench.stages import SETTING, PassSizes

ROWS = 16
"""Rows of tokens that the parts are timed on: enough to fill four chunks."""


class Part(NamedTuple):
    """A part of the pass, the work that its shapes need, and the least bytes that it moves."""

    name: str
    run: Callable[[], Any]
    work: Work = Work()
    moved: float = 0.0


def parts(model: HFModel, sizes: PassSizes) -> Iterator[Part]:
    """The parts of the first block: forward passes, Hessians beside them, factors, GPTQ, packing with its check."""
    decoder, length = build_decoder(model.config), sizes.length
    for spec in module_specs(model.config)[:2]:
        name = "attention" if spec.kind == ATTENTION_KIND else "MLP"
        states = np.random.default_rng(0).standard_normal((ROWS, length, model.config.hidden_size)).astype(np.float32)
        params = model.module_params(spec)
        ahead = forward_work(spec, model.config, length).times(ROWS)
        module, rows = decoder.module(spec), Rows.of(np.ones(states.shape[:2]), states.shape[-1])
        stream, out = rows.place(states), rows.place(states)
        for label, way in {"": module, ", bfloat16": replace(module, products=Products.BFLOAT16)}.items():
            yield Part(f"{name} forward{label}", partial(_forward, way, params, stream, out), ahead)
        run = partial(collect, module, spec, params, rows, stream, out)
        both = ahead + hessian_work(spec, length).times(ROWS)
        yield Part(f"{name} forward and Hessians", lambda run=run: run().hessians, both)
        yield Part(
            f"{name} error of the output", partial(relative_error, states, states, None), moved=2 * states.nbytes
        )
        hessians = run().hessians
        cubes = [factor_work(group[0].rows) for group in spec.groups]
        yield Part(f"{name} factors", partial(_factors, spec, hessians), sum(cubes, Work()))
        quantized = partial(_quantized, spec, params, module_factors(spec, hessians))
        walks = [gptq_work(x.rows, x.columns) for x in spec.linears]
        yield Part(f"{name} GPTQ", lambda run=quantized: [x.weight for x in run()], sum(walks, Work()))
        done = list(zip(quantized(), spec.linears, strict=True))
        yield Part(f"{name} packing and check", partial(_packed, done), moved=4 * sum(x.weights for x in spec.linears))


def _forward(module: Module, params: Any, states: Stream, out: Stream) -> list[jax.Array]:
    forward(module, params, states, out)
    return out.parts()


def _quantized(spec: ModuleSpec, params: Any, factors: Mapping[str, HessianFactor]) -> list[QuantizedLinear]:
    def run(x: LinearSpec) -> QuantizedLinear:
        return quantize(params[x.name]["kernel"], factors[x.name], SETTING, x).linear

    return in_threads(run, spec.linears)


def _packed(done: list[tuple[QuantizedLinear, LinearSpec]]) -> list[jax.Array]:
    return [pack_checked(result, linear, None).weight for result, linear in done]


def _factors(spec: ModuleSpec, hessians: list[jax.Array]) -> list[jax.Array]:
    return [factor.u for factor in module_factors(spec, hessians).values()]
