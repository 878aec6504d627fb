"""Text of the model's own: every token is the one that the whole-row forward pass and the drawn chance call for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from exl2jax.calibration import CalibrationConfig, load_rows, load_tokenizer
from exl2jax.errors import CalibrationError, Interrupted
from exl2jax.evaluation import model_logits
from exl2jax.models import open_model
from exl2jax.stream import sample, stepping
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.stream.sample import draw, model_sampler, remembered
from exl2jax.testing.parity_cases import TINY_CASES

PROMPTS = [[0], [5, 9, 20, 7], [0, 40], [17], [0] * 12]
LENGTH, VOCAB = 40, 290


@pytest.fixture(autouse=True)
def few_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen the caches once instead of seven times: each width is compiled anew."""
    monkeypatch.setattr(sample, "STRETCHES", 2)


SAMPLED = ("plain", "rope_dynamic", "gemma3", "glm4", "gpt2")
"""Between them every kind of head, position, norm and window."""


@pytest.mark.parametrize("case", [case for case in TINY_CASES if case.name in SAMPLED], ids=lambda case: case.name)
def test_each_token_is_drawn_from_the_full_forward_pass(case, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = open_model(case.write(tmp_path / "model"))
    ids = model_sampler(model, VOCAB)(PROMPTS, len(PROMPTS), LENGTH, 3)
    chances = np.random.default_rng(3).random(ids.shape)
    logits = model_logits(model.directory, ids)[:, :, :VOCAB].astype(np.float64)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    above = np.cumsum(shares, axis=-1)
    for row, prompt in enumerate(PROMPTS):
        assert ids[row, : len(prompt)].tolist() == prompt
        for at in range(len(prompt), LENGTH):
            token, chance = ids[row, at], chances[row, at]
            low, high = above[row, at - 1, token] - shares[row, at - 1, token], above[row, at - 1, token]
            assert low - 1e-5 <= chance <= high + 1e-5, (row, at)
    assert len(np.unique(ids)) > 20, "a sampler that repeats itself proves nothing"


def test_draw_by_hand() -> None:
    weights = np.array([[1.0, 2.0, 1.0]] * 5, np.float32)
    assert draw(weights, np.array([0.0, 0.24, 0.25, 0.74, 0.99])).tolist() == [0, 0, 1, 1, 2]
    assert draw(np.array([[0.0, 3.0, 0.0]], np.float32), np.array([0.0])).tolist() == [1], "no id of no weight"


def test_batches_and_memory_change_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny_llama)
    whole = model_sampler(model, VOCAB)(PROMPTS, len(PROMPTS), LENGTH, 0)
    assert (model_sampler(model, VOCAB)(PROMPTS, len(PROMPTS), LENGTH, 0) == whole).all()
    assert (model_sampler(model, VOCAB)(PROMPTS, len(PROMPTS), LENGTH, 1) != whole).any()
    config = model.config
    row = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * LENGTH
    monkeypatch.setattr(sample, "CACHE_BYTES", 2 * row)
    monkeypatch.setattr(stepping, "RESIDENT_BYTES", 0)
    assert (model_sampler(model, VOCAB)(PROMPTS, len(PROMPTS), LENGTH, 0) == whole).all()


def test_rows_of_the_length_of_a_prompt_or_of_one_token(tiny_llama: Path) -> None:
    sampler = model_sampler(open_model(tiny_llama), VOCAB)
    assert sampler([[4, 5, 6]], 1, 3, 0).tolist() == [[4, 5, 6]]
    assert sampler([[4]], 1, 1, 0).tolist() == [[4]]


def test_a_stop_is_heeded(tiny_llama: Path) -> None:
    stop = StopFlag()
    stop.ask()
    with pytest.raises(Interrupted, match="same command"):
        model_sampler(open_model(tiny_llama), VOCAB, RunControl(stop=stop))(PROMPTS, len(PROMPTS), LENGTH, 0)


def test_rows_once_written_are_read_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def count(prompts, n_rows: int, length: int, seed: int) -> np.ndarray:  # type: ignore[no-untyped-def]
        calls.append(seed)
        return np.full((n_rows, length), seed, np.int32)

    sampler = remembered(count, tmp_path / "self", "model")
    first = sampler([[1], [2]], 2, 6, 7)
    assert (sampler([[1], [2]], 2, 6, 7) == first).all()
    assert calls == [7]
    sampler([[1], [3]], 2, 6, 7)
    remembered(count, tmp_path / "self", "another model")([[1], [2]], 2, 6, 7)
    assert calls == [7, 7, 7]


def test_nothing_is_sampled_for_input_that_does_not_serve(tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever stands first in a mixture: the model is asked last."""
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    config = CalibrationConfig(source=f"self:2,{tmp_path / 'short.txt'}:2", length=64)
    with pytest.raises(CalibrationError, match="tokens are there"):
        load_rows(
            config, load_tokenizer(tiny_llama), vocab_size=320, sampler=lambda *_: pytest.fail("the model was asked")
        )


def test_another_process_samples_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """Through the command, which has a process of its own."""
    out = tmp_path / "rows.safetensors"
    command = [sys.executable, "-m", "exl2jax", "calibrate", "-i", tiny_llama, "-c", "self", "-r", "6", "-l", "12"]
    subprocess.run([*command, "--seed", "9", "--out", out], check=True, capture_output=True)
    model, tokenizer = open_model(tiny_llama), load_tokenizer(tiny_llama)
    config = CalibrationConfig(source="self", rows=6, length=12, seed=9)
    sampler = model_sampler(model, min(320, tokenizer.vocab_size))
    here = load_rows(config, tokenizer, vocab_size=320, sampler=sampler)
    assert load_file(out)["input_ids"].tobytes() == here.input_ids.tobytes()
