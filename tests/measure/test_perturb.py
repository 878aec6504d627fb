"""Perturbing one module at a time: against as many whole forward passes, each with one module exchanged."""

from pathlib import Path

import numpy as np
import pytest

from exl2jax import ConversionConfig, convert
from exl2jax.errors import SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.measure.inputs import ForwardStep, InputStack
from exl2jax.measure.perturb import ROUNDING, TOKEN_STRIDE, PerturbStep, divergences, scaled
from exl2jax.models import Decoder, Model, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed, forward
from exl2jax.stream.scan import PERTURBED, STATES, Carry
from exl2jax.testing.states import stream_of
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import Recipe
from tests.oracles import gptq as oracle

ROWS, LENGTH = 2, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_model(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", tie=False))


@pytest.fixture(scope="module")
def specs(model: Model) -> tuple[ModuleSpec, ...]:
    return module_specs(model.config)


@pytest.fixture(scope="module")
def stack(model: Model, specs: tuple[ModuleSpec, ...], tmp_path_factory: pytest.TempPathFactory) -> InputStack:
    """Inputs of all modules on `ROWS + 1` rows, of which the perturbation takes the first ones."""
    states = embed(model, np.random.default_rng(4).integers(0, 300, (ROWS + 1, LENGTH)).astype(np.int32))
    found = InputStack(tmp_path_factory.mktemp("stack") / "inputs.f32", specs, states.shape)
    found.write(0, states)
    step, carry = ForwardStep(decoder=build_decoder(model.config), stack=found), {STATES: stream_of(states)}
    for spec in specs:
        carry, _ = step(carry, Block(spec, model.module_params(spec)))
    return found


def rounded(kernel: np.ndarray) -> np.ndarray:
    """The kernel rounded to nearest at the perturbation's setting: the float64 walk without feedback."""
    rows = kernel.shape[0]
    cut = [(g.rows, g.bits) for g in ROUNDING.groups(rows)]
    return oracle.gptq(kernel, np.arange(rows), np.eye(rows), cut).weight


def exchanged(model: Model, decoder: Decoder, specs: tuple[ModuleSpec, ...], stack: InputStack, at: int) -> np.ndarray:
    """Final states of the model whose module `at` alone is rounded."""
    states = stream_of(stack.read(specs[0])[:ROWS])
    for i, spec in enumerate(specs):
        params = model.module_params(spec)
        if i == at:
            kernels = {x.name: rounded(params[x.name]["kernel"]).astype(np.float16) for x in spec.linears}
            params |= {name: params[name] | {"kernel": kernel} for name, kernel in kernels.items()}
        forward(decoder.module(spec), params, states, states)
    return states.array()


def begun(step: PerturbStep, modules: int) -> Carry:
    return {name: step.place(values) for name, values in step.start(modules).items()}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_one_scan_is_as_many_models(model: Model, specs: tuple[ModuleSpec, ...], stack: InputStack) -> None:
    decoder = build_decoder(model.config)
    fisher = {
        x.key: np.random.default_rng(x.rows).random(x.columns).astype(np.float32) for s in specs for x in s.linears
    }
    step = PerturbStep(decoder=decoder, stack=stack, rows=ROWS, fisher=fisher)
    carry, found = begun(step, len(specs)), []
    for spec in specs:
        carry, output = step(carry, Block(spec, model.module_params(spec)))
        found.append(output)
    moved = carry[PERTURBED].array()
    for i in range(len(specs)):
        ours = moved[i * ROWS : (i + 1) * ROWS]
        np.testing.assert_allclose(ours, exchanged(model, decoder, specs, stack, i), rtol=1e-3, atol=1e-4)
    mask = np.ones((ROWS, LENGTH), np.int32)
    mask[1, 8:] = 0
    head, reference = model.head_params(), stack.final()[:ROWS]
    measured = divergences(decoder, head, moved, reference, mask)
    logits = [
        np.asarray(decoder.logits(head, x), np.float64)[:, ::TOKEN_STRIDE]
        for x in (reference, *moved.reshape(len(specs), ROWS, LENGTH, -1))
    ]
    full, *others = map(log_softmax, logits)
    weight = mask[:, ::TOKEN_STRIDE]
    expected = [(np.sum(np.exp(full) * (full - other), axis=-1) * weight).sum() / weight.sum() for other in others]
    np.testing.assert_allclose(measured, expected, rtol=1e-2)
    for spec, before, after, kl in zip(specs, found, scaled(found, measured), measured, strict=True):
        for linear in spec.linears:
            np.testing.assert_allclose(after[linear.name], fisher[linear.key] * kl / before.predicted, rtol=1e-5)


def test_prediction_is_the_weighted_error_of_the_outputs(
    model: Model, specs: tuple[ModuleSpec, ...], stack: InputStack
) -> None:
    decoder, spec = build_decoder(model.config), specs[1]
    params, inputs = model.module_params(spec), stack.read(spec)[:ROWS]
    trace = decoder.module(spec).forward(params, inputs)
    for fisher in ({x.key: np.linspace(1, 2, x.columns, dtype=np.float32) for x in spec.linears}, None):
        step = PerturbStep(decoder=decoder, stack=stack, rows=ROWS, fisher=fisher)
        _, found = step(begun(step, len(specs)), Block(spec, params))
        total = 0.0
        for linear in spec.linears:
            x = np.asarray(trace.inputs[int(linear in spec.groups[-1])][0], np.float64).reshape(-1, linear.rows)
            kernel = np.asarray(params[linear.name]["kernel"], np.float64)
            error = np.mean(np.square(x @ (rounded(kernel) - kernel)), axis=0)
            energy = np.mean(np.square(x @ kernel), axis=0).sum()
            weight = np.full(linear.columns, 1 / energy) if fisher is None else fisher[linear.key]
            total += 0.5 * float(error @ weight)
        assert found.predicted == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(name="scaled", pricing="fisher", fisher_rows=2, divergence_rows=1),
        Recipe(name="no gradients", pricing="divergence", fisher_rows=2, divergence_rows=2, residual=0.5),
    ],
)
def test_conversion_by_measured_divergence(recipe: Recipe, model: Model, tmp_path: Path) -> None:
    config = ConversionConfig(
        in_dir=model.directory,
        out_dir=tmp_path / "work",
        compile_full=tmp_path / "exl2",
        cal_dataset=np.random.default_rng(5).integers(0, 300, (4, 48)),
        bits=4.5,
        preset=recipe,
    )
    result = convert(config)
    assert result.allocation is not None and result.allocation["pricing"] == recipe.pricing
    assert verify(tmp_path / "exl2").faults == ()


@pytest.mark.parametrize(
    "change",
    [{"divergence_rows": 9}, {"pricing": "divergence"}, {"fisher_rows": 0}, {"residual": 2}, {"weigh_hessians": -0.5}],
)
def test_recipes_that_make_no_sense(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="recipe odd"):
        Recipe(**({"name": "odd", "pricing": "fisher"} | change))  # type: ignore[arg-type]
