"""Trying candidates, against one float64 forward pass for each of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2jax.measure.trials import Shared, Stack, candidate_errors, plan
from exl2jax.models import build_decoder, module_specs, open_model
from exl2jax.models.modules import ATTENTION_KIND
from exl2jax.stream import chunks
from exl2jax.stream.forward import mean_of_rows
from exl2jax.stream.streams import read
from exl2jax.testing.states import rows_of
from tests.oracles import llama as oracle

PICKS = {"q_proj": (0, 1, 1, 0, 2), "k_proj": (0, 1, 1, 0, 0), "v_proj": (0, 0, 1, 0, 2), "o_proj": (0, 1, 1, 2, 0)} | {
    "gate_proj": (0, 1, 1, 0, 2),
    "up_proj": (0, 0, 1, 0, 2),
    "down_proj": (0, 1, 1, 2, 0),
}
"""Settings of five candidates: 1 and 2 share all but the last linear of the first stage, 0 and 3 the whole stage."""


@pytest.mark.parametrize("kind", ["self_attn", "mlp"])
@pytest.mark.parametrize("masked", [False, True])
def test_errors_are_those_of_a_forward_pass_each(
    kind: str, masked: bool, tiny_llama_untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 48)  # two rows a chunk, the last one padded
    model = open_model(tiny_llama_untied)
    spec = next(spec for spec in module_specs(model.config) if spec.kind == kind)
    params = model.module_params(spec)
    rng = np.random.default_rng(0)
    h = rng.standard_normal((5, 24, model.config.hidden_size)).astype(np.float32)
    mask = (rng.random((5, 24)) < 0.7).astype(np.float32) if masked else None
    stacks = {
        x.name: Stack([_noisy(params[x.name]["kernel"], rng) for _ in range(3)], PICKS[x.name]) for x in spec.linears
    }
    reference = np.stack([_run(spec.kind, params, row) for row in h]).astype(np.float32)
    rows, module = rows_of(h, mask), build_decoder(model.config).module(spec)
    errors = candidate_errors(module, spec, params, stacks, rows, rows.place(h), rows.place(reference))
    found = [mean_of_rows(rows.spans, read(stream.parts())) for stream in errors]
    for i, error in enumerate(found):
        weights = {
            name: params[name] | {"kernel": np.asarray(stack.weights[stack.picks[i]])} for name, stack in stacks.items()
        }
        out = np.stack([_run(spec.kind, params | weights, row) for row in h])
        weight = np.ones((5, 24, 1)) if mask is None else mask[:, :, None]
        difference, norm = (np.linalg.norm(x * weight, axis=(1, 2)) for x in (out - reference, reference))
        np.testing.assert_allclose(error, (difference / norm).mean(), rtol=2e-4)


def _noisy(kernel: np.ndarray, rng: np.random.Generator) -> Any:
    return (kernel + 0.02 * rng.standard_normal(kernel.shape)).astype(np.float16)


def _run(kind: str, params: Any, h: np.ndarray) -> np.ndarray:
    """The tiny model's module in float64: 4 heads, 2 of them for keys, of 16."""
    if kind == ATTENTION_KIND:
        return oracle.attention_block(params, h, 4, 2, 1e-5, oracle.plain_frequencies(10000.0, 16))[0]
    return oracle.mlp_block(params, h, 1e-5)[0]


def test_a_plan_by_example() -> None:
    assert plan([(0, 1, 1, 0), (0, 1, 1, 0), (0, 0, 1, 0)]) == (
        Shared((0, 0), {0: (0, 3)}),
        Shared((1, 1), {0: (1,), 1: (2,)}),
    )


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=20))
def test_a_plan_holds_every_candidate_once_under_its_own_settings(rows: list[tuple[int, ...]]) -> None:
    groups = plan([*zip(*rows, strict=True)])
    found = {i: (*g.picks, last) for g in groups for last, members in g.last.items() for i in members}
    assert found == dict(enumerate(rows))
    assert sum(len(m) for g in groups for m in g.last.values()) == len(rows)
    assert len({g.picks for g in groups}) == len(groups)
