"""Experts and parallel blocks in the pipeline: whose tokens a Hessian is made of, and how stock's files spell them."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from exl2jax.measure.measurement import Candidate, Measurement, candidate_rows, module_bits, read_measurement
from exl2jax.models import ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.models.modules import MOE_KIND
from exl2jax.quantize.diagnostics import starved_experts
from exl2jax.quantize.propagate import StageTask, Strengths, stage_terms
from exl2jax.stream.hessians import Collected, collect
from exl2jax.testing.states import rows_of, stream_of
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import EXPERTS, HIDDEN, write_tiny

ROWS, LENGTH, LOST = 3, 16, 2


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Decoder, spec and parameters of a mixture whose expert `LOST` is never chosen, and states."""
    model = open_model(write_tiny(tmp_path_factory.mktemp("moe") / "mixtral", TINY["mixtral"]))
    spec = next(spec for spec in module_specs(model.config) if spec.kind == MOE_KIND)
    params = model.module_params(spec)
    states = np.random.default_rng(0).standard_normal((ROWS, LENGTH, HIDDEN)).astype(np.float32)
    # All normed states lean towards one direction, and the lost expert's router weight points away from it.
    states += 2.0
    params["router"] = {"weight": params["router"]["weight"].copy()}
    params["router"]["weight"][LOST] = -1.0
    return build_decoder(model.config).module(spec), spec, params, states


def collected(moe: Any, **settings: Any) -> Collected:
    module, spec, params, states = moe
    return collect(module, spec, params, rows_of(states), stream_of(states), stream_of(states), **settings)


def normed(params: Any, h: np.ndarray) -> np.ndarray:
    wide = h.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * params["norm"]["weight"]


def chosen(params: Any, x: np.ndarray) -> np.ndarray:
    """Which two experts each token goes to, `[tokens, experts]`."""
    logits = x @ params["router"]["weight"].astype(np.float64).T
    best = np.argsort(logits, axis=-1)[:, ::-1][:, :2]
    return (best[:, :, None] == np.arange(EXPERTS)).any(axis=1)


def test_hessians_of_experts_come_from_their_tokens(moe: Any) -> None:
    _, _, params, states = moe
    found = collected(moe)
    x = normed(params, states).reshape(-1, HIDDEN)
    mask = chosen(params, x)
    assert mask[:, LOST].sum() == 0 and mask.sum() == 2 * len(x)
    assert found.tokens == [int(n) for n in mask.sum(axis=0)] * 2
    for e in range(EXPERTS):
        mine = x[mask[:, e]]
        inner = mine @ params[f"w1.{e}"]["kernel"]
        inner = inner / (1 + np.exp(-inner)) * (mine @ params[f"w3.{e}"]["kernel"])
        for index, y in ((e, mine), (EXPERTS + e, inner)):
            expected = y.T @ y / ROWS if e != LOST else np.eye(y.shape[1])
            np.testing.assert_allclose(found.hessians[index], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_all_tokens_on_request(moe: Any) -> None:
    _, _, params, states = moe
    found = collected(moe, routed_only=False)
    assert found.tokens == [ROWS * LENGTH] * 2 * EXPERTS
    x = normed(params, states).reshape(-1, HIDDEN)
    for e in range(EXPERTS):
        np.testing.assert_allclose(found.hessians[e], x.T @ x / ROWS, rtol=1e-3, atol=1e-2)


def test_the_output_is_the_chosen_experts_weighted(moe: Any) -> None:
    module, _, params, states = moe
    x = normed(params, states).reshape(-1, HIDDEN)
    logits = x @ params["router"]["weight"].astype(np.float64).T
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True)) * chosen(params, x)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = states.reshape(-1, HIDDEN).astype(np.float64)
    for e in range(EXPERTS):
        inner = x @ params[f"w1.{e}"]["kernel"]
        inner = inner / (1 + np.exp(-inner)) * (x @ params[f"w3.{e}"]["kernel"])
        expected = expected + weights[:, e, None] * (inner @ params[f"w2.{e}"]["kernel"])
    out = jax.jit(module.forward)(params, states).hidden
    np.testing.assert_allclose(np.asarray(out).reshape(-1, HIDDEN), expected, atol=1e-3)


def test_cross_terms_of_experts(moe: Any) -> None:
    """With nothing quantized there is nothing to correct, and the Hessians are those of the plain pass."""
    module, spec, params, states = moe
    plain, rows, stream = collected(moe), rows_of(states), stream_of(states)
    for stage in range(2):
        task = StageTask(module, spec, stage, params, params, rows, stream, stream, Strengths(0.5, 0.5))
        terms, tokens, *_ = stage_terms(task)
        start = stage * EXPERTS
        assert tokens == plain.tokens[start : start + EXPERTS]
        for g, term in enumerate(terms):
            np.testing.assert_allclose(term.hessian, plain.hessians[start + g], rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(term.cross if stage == 0 else term.owed, 0, atol=1e-3)


def test_experts_that_starve_are_named(moe: Any) -> None:
    _, spec, _, _ = moe
    (line,) = starved_experts(spec, [50, 40, 0, 60] * 2)
    assert f"{spec.key}: expert {LOST} saw 0 calibration tokens" in line and "`moe_calibration` all" in line
    assert starved_experts(spec, [50, 40, 10, 60] * 2) == []


def candidates(slot: ModuleSpec) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(qparams=row, total_bits=module_bits(slot, row), accuracy=0.9 + 0.001 * i)
        for i, row in enumerate(candidate_rows(slot))
    )


@pytest.mark.parametrize(
    ("name", "keys", "roles"),
    [
        ("mixtral", ["model.layers.0.self_attn", "model.layers.0.block_sparse_moe"], ["w1", "w3", "w2"]),
        ("cohere", ["model.layers.0.parallel_decoder"], ["gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ["model.layers.0.self_attn", "model.layers.0.mlp"], ["up_proj", "down_proj"]),
    ],
)
def test_measurement_files_are_spelled_as_stock_does(
    name: str, keys: list[str], roles: list[str], tmp_path: Path
) -> None:
    specs = module_specs(open_model(write_tiny(tmp_path / name, TINY[name])).config)
    modules = {slot.key: candidates(slot) for spec in specs for slot in spec.slots}
    path = tmp_path / "measurement.json"
    Measurement(modules=modules).write(path, specs)
    record = json.loads(path.read_text())
    rows = record["measurement"]
    assert list(rows)[: len(keys)] == keys
    assert rows["model.norm.norm"] is None and rows["lm_head.linear"] is None
    # Embedding, learned positions if there are any, modules, norm, head.
    assert record["last_module_idx"] == 2 * len(keys) + 2 + (name == "gpt2")
    last = rows[keys[-1]]
    if name == "cohere":
        assert list(last) == ["attn", "mlp"]
        last = last["mlp"]
    assert len(last) == 17
    assert list(last[0]) == ["accuracy", "total_bits", *roles]
    rows["model.wpe.pos_emb"] = None  # as stock lists learned positions
    path.write_text(json.dumps(record))
    assert read_measurement(path, specs).modules == modules
