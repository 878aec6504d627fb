"""A mixture whose experts do not fit in memory together: each pass gives piece by piece what it gives of the whole."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax.measure import costs as price
from exl2jax.measure.accuracy import MeasureStep
from exl2jax.measure.costs import PriceStep
from exl2jax.measure.fisher import BackwardStep
from exl2jax.measure.inputs import ForwardStep, InputStack
from exl2jax.measure.perturb import PerturbStep
from exl2jax.models import Decoder, HFModel, Model, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.models.modules import MOE_KIND
from exl2jax.qparams import q
from exl2jax.quantize.step import QuantizeStep
from exl2jax.stream import blocks
from exl2jax.stream.blocks import Block, cut, expert_bytes
from exl2jax.stream.scan import GRADIENT, PERTURBED, REFERENCE, STATES
from exl2jax.testing.states import rows_of, stream_of
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import EXPERTS, HIDDEN, write_tiny
from exl2jax.variants.recipe import find_recipe

ROWS, LENGTH = 4, 24

Scene = tuple[Model, Decoder, ModuleSpec, np.ndarray]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A model, its decoder, the first mixture of it, and states."""
    model = open_model(write_tiny(tmp_path_factory.mktemp("moe") / "qwen3_moe", TINY["qwen3_moe"]))
    spec = next(spec for spec in module_specs(model.config) if spec.kind == MOE_KIND)
    states = np.random.default_rng(0).standard_normal((ROWS, LENGTH, HIDDEN)).astype(np.float32)
    return model, build_decoder(model.config), spec, states


@pytest.fixture
def tight(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Calling it leaves room for two experts; from then on those that are alive are counted."""
    on_host, on_device, most = list[weakref.ref[Any]](), list[weakref.ref[Any]](), 0
    read, make = HFModel.linear_params, Block._piece

    def counted_read(self: HFModel, linear: Any, *, narrow: bool) -> dict[str, np.ndarray]:
        nonlocal most
        params = read(self, linear, narrow=narrow)
        on_host[:] = [ref for ref in on_host if ref() is not None] + [weakref.ref(params["kernel"])]
        most = max(most, len(on_host))
        return params

    def counted_piece(self: Block, decoder: Decoder, piece: ModuleSpec) -> Any:
        gc.collect()  # JAX lets go of host arrays that it shared when there is occasion
        assert not any(ref() is not None for ref in on_device), "a piece is asked for while another is still there"
        made = make(self, decoder, piece)
        on_device[:] = [weakref.ref(made.params[x.name]["kernel"]) for x in piece.linears]
        return made

    def tighten() -> None:
        monkeypatch.setattr(blocks, "EXPERT_BYTES", 2 * expert_bytes(scene[2]))
        monkeypatch.setattr(HFModel, "linear_params", counted_read)
        monkeypatch.setattr(Block, "_piece", counted_piece)

    yield tighten
    assert 0 < most <= 2 * 3  # w1, w3 and w2 of two experts


@pytest.mark.parametrize(("room", "runs"), [(0.5, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (2, [2, 2]), (3, [2, 2]), (4, [4])])
def test_pieces_are_as_long_as_there_is_room(
    room: float, runs: list[int], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = scene[2]
    monkeypatch.setattr(blocks, "EXPERT_BYTES", int(room * expert_bytes(spec)))
    pieces = cut(spec)
    assert [len(piece.stages[0]) for piece in pieces] == runs
    assert [x for piece in pieces for x in piece.stages[1]] == list(spec.stages[1])
    assert (pieces == (spec,)) == (runs == [EXPERTS])
    dense = replace(spec, kind="mlp")
    assert cut(dense) == (dense,)


def test_more_copies_take_more_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = scene[2]
    monkeypatch.setattr(blocks, "EXPERT_BYTES", EXPERTS * expert_bytes(spec))
    assert len(cut(spec)) == 1 < len(cut(spec, settings=8))


def test_forward_and_backward(scene: Scene, tight: Callable[[], None], tmp_path: Path) -> None:
    model, decoder, spec, states = scene
    gradient = np.random.default_rng(1).standard_normal(states.shape).astype(np.float32)

    def run(name: str) -> tuple[np.ndarray, np.ndarray, Any]:
        stack = InputStack(tmp_path / name, (spec,), (ROWS, LENGTH, HIDDEN))
        stack.write(0, states)
        out, _ = ForwardStep(decoder=decoder, stack=stack)({STATES: stream_of(states)}, Block.of(model, spec))
        rows = rows_of(states, single=True)
        step = BackwardStep(decoder=decoder, stack=stack, rows=rows, tokens=ROWS * LENGTH)
        back, columns = step({GRADIENT: rows.place(gradient)}, Block.of(model, spec))
        return out[STATES].array(), back[GRADIENT].array(), columns

    whole = run("whole")
    tight()
    pieces = run("pieces")
    close(pieces[0], whole[0])
    close(pieces[1], whole[1])
    assert set(pieces[2]) == {x.name for x in spec.linears}
    for name, column in pieces[2].items():
        close(column, whole[2][name])


def test_prices_and_perturbations(
    scene: Scene, tight: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price, "MEASURED", price.MEASURED[1:3])  # two settings show what seven would
    model, decoder, spec, states = scene
    fisher = {x.key: np.linspace(1, 2, x.columns, dtype=np.float32) for x in spec.linears}
    stack = InputStack(tmp_path / "stack", (spec,), (ROWS, LENGTH, HIDDEN))
    stack.write(0, states)

    def run() -> tuple[np.ndarray, Any, np.ndarray, Any]:
        costing = PriceStep(decoder=decoder, rows=rows_of(states), fisher=fisher)
        perturb = PerturbStep(decoder=decoder, stack=stack, rows=2, fisher=fisher)
        carry, costs = costing({STATES: stream_of(states)}, Block.of(model, spec))
        moved, found = perturb({PERTURBED: perturb.place(perturb.start(1)[PERTURBED])}, Block.of(model, spec))
        return carry[STATES].array(), costs, moved[PERTURBED].array(), found

    out, costs, moved, found = run()
    tight()
    out_again, costs_again, moved_again, found_again = run()
    close(out_again, out)
    close(moved_again, moved)
    assert found_again.predicted == pytest.approx(found.predicted, rel=1e-3)
    assert set(found_again.columns) == set(found.columns)
    assert set(costs_again) == set(costs) == {x.key for x in spec.linears}
    for key, cost in costs_again.items():
        for setting, tiles in cost.measured.items():
            np.testing.assert_allclose(tiles, costs[key].measured[setting], rtol=0.02)


def test_candidates(scene: Scene, tight: Callable[[], None]) -> None:
    model, decoder, spec, states = scene
    step = MeasureStep(decoder=decoder, rows=rows_of(states))
    whole, found = step({STATES: stream_of(states)}, Block.of(model, spec))
    tight()
    pieces, again = step({STATES: stream_of(states)}, Block.of(model, spec))
    close(pieces[STATES].array(), whole[STATES].array())
    assert [(c.qparams, c.total_bits) for c in again[spec.key]] == [(c.qparams, c.total_bits) for c in found[spec.key]]
    ours, theirs = ([1 - c.accuracy for c in rows[spec.key]] for rows in (again, found))
    np.testing.assert_allclose(ours, theirs, rtol=0.01)


@pytest.mark.parametrize("preset", ["stock", "best"])
def test_quantization(preset: str, scene: Scene, tight: Callable[[], None], tmp_path: Path) -> None:
    model, decoder, spec, states = scene

    def run(folder: Path) -> tuple[Any, Any, dict[str, np.ndarray]]:
        folder.mkdir()
        step = QuantizeStep(
            decoder=decoder,
            recipe=find_recipe(preset),
            strategy={spec.key: {x.name: q("4", "1", "32") for x in spec.linears}},
            head_bits=6,
            input_ids=np.zeros((ROWS, LENGTH), np.int32),
            rows=rows_of(states),
            out_tensor=folder,
            check_rows=2,
        )
        rows = ROWS if step.recipe.propagates else 2
        carry = {STATES: stream_of(states), REFERENCE: stream_of(states[:rows] + np.float32(0.01))}
        carry, report = step(carry, Block.of(model, spec))
        arrays = {name: stream.array() for name, stream in carry.items()}
        return arrays, report, {k: v for path in folder.glob("*") for k, v in load_file(path).items()}

    whole, report, packed = run(tmp_path / "whole")
    tight()
    pieces, again, tensors = run(tmp_path / "pieces")
    close(pieces[REFERENCE], whole[REFERENCE])
    # A code on the edge may round the other way: the quantized stream is compared more loosely.
    close(pieces[STATES], whole[STATES], 5e-3)
    assert again.bits == report.bits and set(again.damping) == set(report.damping)
    assert set(tensors) == set(packed)
    same = [np.mean(tensors[name] == tensor) for name, tensor in packed.items() if name.endswith("q_weight")]
    assert np.mean(same) > 0.98


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))
