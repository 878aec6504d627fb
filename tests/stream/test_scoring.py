"""Likelihood, divergence and agreement against NumPy, and the errors of a module's output."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exl2jax import evaluate
from exl2jax.conversion.result import perplexity_warnings
from exl2jax.models import Decoder, build_decoder, open_model
from exl2jax.stream import chunks as stream
from exl2jax.stream.chunks import row_spans
from exl2jax.stream.forward import embed, relative_error
from exl2jax.stream.scoring import perplexity, score
from tests.oracles.llama import log_softmax, rms_norm

ROWS, LENGTH = 3, 10


@pytest.fixture(scope="module")
def head(tiny_llama_untied: Path) -> tuple[Decoder, dict[str, Any]]:
    model = open_model(tiny_llama_untied)
    return build_decoder(model.config), model.head_params()


def states_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((ROWS, LENGTH, 64)).astype(np.float32)


def log_probabilities(params: dict[str, Any], states: np.ndarray) -> np.ndarray:
    """Of the next token at every position but the last, `[R, T - 1, vocab]`."""
    x = rms_norm(states, params["norm"]["weight"], 1e-5)
    return log_softmax(x @ params["lm_head"]["kernel"].astype(np.float64))[:, :-1]


@pytest.mark.parametrize("logits", [1 << 24, 7 * 320, 1], ids=["at once", "in chunks", "token by token"])
def test_scores_against_a_reference(head: Any, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOGITS", logits)
    decoder, params = head
    kernel = params["lm_head"]["kernel"]
    noise = np.random.default_rng(4).standard_normal(kernel.shape).astype(np.float32) * 0.1
    other = params | {"lm_head": {"kernel": kernel + noise}}
    ids = np.random.default_rng(1).integers(0, 320, (ROWS, LENGTH)).astype(np.int32)
    ours, theirs = states_of(2), states_of(2) + 0.1 * states_of(3)
    found = score(decoder, params, ours, ids, (other, theirs))
    log_p, log_ref = log_probabilities(params, ours), log_probabilities(other, theirs)
    rows, positions = np.indices((ROWS, LENGTH - 1))
    np.testing.assert_allclose(found.nll, -log_p[rows, positions, ids[:, 1:]], rtol=1e-4, atol=1e-5)
    assert found.kl is not None
    assert found.agree is not None
    np.testing.assert_allclose(found.kl, (np.exp(log_ref) * (log_ref - log_p)).sum(axis=-1), rtol=1e-3, atol=1e-5)
    assert np.array_equal(found.agree, log_p.argmax(axis=-1) == log_ref.argmax(axis=-1))
    assert 0 < found.agree.mean() < 1
    alone = score(decoder, params, ours, ids)
    assert alone.kl is None
    assert alone.agree is None
    np.testing.assert_allclose(alone.nll, found.nll, rtol=1e-6)


def test_a_model_agrees_with_itself(tiny_llama_untied: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 320, (ROWS, LENGTH)).astype(np.int32)
    found = evaluate(tiny_llama_untied, ids, tiny_llama_untied)
    assert found.tokens == ROWS * (LENGTH - 1)
    assert found.kl_divergence == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1


def test_perplexity_leaves_padding_out() -> None:
    nll = np.log(np.asarray([[2.0, 4.0, 1e30], [8.0, 1e30, 1e30]], np.float32))
    mask = np.asarray([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert perplexity(nll, mask) == pytest.approx(4.0)
    assert perplexity(nll[:1, :2]) == pytest.approx(8**0.5)
    assert perplexity(np.full((1, 2), 1e4, np.float32)) == np.inf
    assert np.isnan(perplexity(np.full((1, 2), np.nan, np.float32)))


def test_warnings_of_the_final_check() -> None:
    assert perplexity_warnings(30.0) == ()
    assert "above 30: poor" in perplexity_warnings(30.1)[0]
    assert "above 30: poor" in perplexity_warnings(1000.0)[0]
    assert "FAILED" in perplexity_warnings(1000.1)[0] and "FAILED" in perplexity_warnings(1000.1, 1000.0)[0]
    (line,) = perplexity_warnings(1200.0, 1100.0)
    assert "so is that of the source (1100.0)" in line and "FAILED" not in line


def test_relative_error_is_a_mean_over_rows_without_padding() -> None:
    rng = np.random.default_rng(0)
    reference, out = rng.standard_normal((2, 7, 40, 64)).astype(np.float32)
    mask = (np.arange(40) < rng.integers(5, 41, 7)[:, None]).astype(np.int32)
    for m in (None, mask):
        kept = np.ones((7, 40)) if m is None else m
        expected = np.mean(
            [np.linalg.norm((o - r) * k[:, None]) / np.linalg.norm(r * k[:, None])
             for o, r, k in zip(out.astype(np.float64), reference.astype(np.float64), kept, strict=True)]
        )  # fmt: skip
        assert relative_error(out, reference, m) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 512), (19, 512), (7, 300), (3, 5000), (115, 2048)])
def test_chunks_cover_every_row_once_in_one_shape(rows: int, length: int) -> None:
    found = row_spans(rows, length, 64)
    assert [i for chunk in found for i in range(chunk.start, chunk.stop)] == list(range(rows))
    assert len({chunk.rows for chunk in found}) == 1
    assert all(chunk.stop - chunk.start <= chunk.rows for chunk in found)
    assert found[0].rows * length <= max(2048, length)


def test_rows_of_negative_ids_become_seeded_noise(tiny_llama: Path) -> None:
    model = open_model(tiny_llama)
    ids = np.asarray([[3, 4, 5], [-1, -1, -1], [6, 7, 8]], np.int32)
    table = model.embedding()
    first, again, other = (embed(model, ids, seed) for seed in (0, 0, 1))
    assert np.array_equal(first[[0, 2]], table[ids[[0, 2]]])
    assert np.array_equal(first, again)
    assert not np.array_equal(first[1], other[1])
    assert 0.5 < first[1].std() / table.std() < 2
