"""Evaluation: every figure against plain NumPy on the logits, and where the rows come from."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from exl2jax import cli
from exl2jax.calibration import load_tokenizer
from exl2jax.calibration.texts import package_texts
from exl2jax.errors import CalibrationError
from exl2jax.evaluation import EvalRows, evaluate, evaluate_many, heldout_rows, load_eval_rows, model_logits
from exl2jax.evaluation.rows import HELDOUT, heldout_texts
from exl2jax.testing.tiny_model import write_tiny_llama

LENGTH = 32


@pytest.fixture(scope="module")
def other(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights disturbed a little."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("other") / "model", tie=True)
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    noisy = {n: (t + 0.02 * rng.standard_normal(t.shape)).astype(t.dtype) for n, t in tensors.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rows() -> EvalRows:
    ids = np.random.default_rng(1).integers(3, 300, (6, LENGTH)).astype(np.int32)
    return EvalRows(ids=ids, domains=("a", "a", "b", "b", "b", "c"))


def log_softmax(directory: Path, ids: np.ndarray) -> np.ndarray:
    logits = model_logits(directory, ids)[:, :-1].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_every_figure_against_numpy(tiny_llama: Path, other: Path, rows: EvalRows) -> None:
    log_p, log_ref = log_softmax(other, rows.ids), log_softmax(tiny_llama, rows.ids)
    nll = -np.take_along_axis(log_p, rows.ids[:, 1:, None], -1)[..., 0]
    kl = (np.exp(log_ref) * (log_ref - log_p)).sum(-1)
    agree = log_p.argmax(-1) == log_ref.argmax(-1)
    [(_, found)] = evaluate_many([other], rows, tiny_llama)
    for figures, members in ((found, range(6)), (found.domains["a"], [0, 1]), (found.domains["b"], [2, 3, 4])):
        part = nll[list(members)]
        ppl = np.exp(part.mean())
        assert figures.tokens == part.size
        assert figures.perplexity == pytest.approx(ppl, rel=1e-5)
        error = ppl * part.mean(axis=1).std(ddof=1) / np.sqrt(len(part))
        assert figures.perplexity_se == pytest.approx(error, rel=1e-3)
        divergence = kl[list(members)]
        assert figures.kl_divergence == pytest.approx(divergence.mean(), rel=1e-3)
        wanted = np.percentile(divergence, [50, 90, 99])
        assert [figures.kl_median, figures.kl_p90, figures.kl_p99] == pytest.approx(wanted, rel=1e-2)
        assert figures.top1_agreement == pytest.approx(agree[list(members)].mean())
    assert list(found.domains) == ["a", "b", "c"]
    assert found.domains["c"].perplexity_se is None, "one row says nothing of the spread"
    assert found.tokens_per_second == pytest.approx(rows.ids.size / found.seconds, rel=0.05)


def test_depth_is_the_error_of_the_states(tiny_llama: Path, other: Path, rows: EvalRows) -> None:
    [(_, same), (_, found)] = evaluate_many([tiny_llama, other], rows, tiny_llama)
    assert set(same.depth.values()) == {0.0} and same.kl_divergence == 0.0 and same.top1_agreement == 1.0
    keys = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn", "mlp")]
    assert list(found.depth) == keys and all(0 < error < 1 for error in found.depth.values())


def test_evaluate_takes_bare_ids(tiny_llama: Path, rows: EvalRows) -> None:
    found = evaluate(tiny_llama, rows.ids)
    assert found.kl_divergence is None and not found.domains and not found.depth


def test_heldout_text_is_not_in_the_calibration_texts(tiny_llama: Path) -> None:
    texts = heldout_texts()
    assert list(texts) == ["prose", "encyclopedia", "code", "technical", "multilingual"]
    known = "\n".join(package_texts().texts.values())
    for text in texts.values():
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 60]
        assert lines and not [line for line in lines if line in known]
    found = heldout_rows(load_tokenizer(tiny_llama), 64)
    assert found.ids.shape[1] == 64 and set(found.domains) == set(texts)


def test_first_rows_are_spread_over_the_domains(tiny_llama: Path) -> None:
    few = load_eval_rows(HELDOUT, tiny_llama, 64, 5)
    assert few.domains == tuple(heldout_texts())
    assert load_eval_rows(HELDOUT, tiny_llama, 64).sha256 != few.sha256
    with pytest.raises(CalibrationError, match="at least one row"):
        few.first(0)


def test_text_parquet_and_token_files(tiny_llama: Path, tmp_path: Path) -> None:
    text = "the river runs through the town " * 20
    (tmp_path / "some.txt").write_text(text)
    pq.write_table(pa.table({"text": [text[:300], text[300:]]}), tmp_path / "some.parquet")
    ids = load_eval_rows(tmp_path / "some.txt", tiny_llama, 16)
    assert ids.ids.shape[1] == 16 and not ids.domains
    assert load_eval_rows(tmp_path / "some.parquet", tiny_llama, 16, 3).ids.shape == (3, 16)
    save_file({"input_ids": ids.ids}, tmp_path / "ids.safetensors")
    again = load_eval_rows(tmp_path / "ids.safetensors", tiny_llama, 999)
    assert np.array_equal(again.ids, ids.ids)
    with pytest.raises(CalibrationError, match="tokens, a row needs"):
        load_eval_rows(tmp_path / "some.txt", tiny_llama, 10_000)


def test_different_widths_are_refused(tiny_llama: Path, tmp_path: Path, rows: EvalRows) -> None:
    wide = write_tiny_llama(tmp_path / "wide", hidden_size=96)
    with pytest.raises(CalibrationError, match="not the same model"):
        list(evaluate_many([wide], rows, tiny_llama))


def test_command_on_many_directories(
    tiny_llama: Path, other: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    arguments = ["eval", str(tiny_llama), str(other), "--against", str(tiny_llama), "-l", "64", "-r", "5"]
    assert cli.main([*arguments, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["evaluations"]
    assert first["kl_divergence"] == 0 < second["kl_divergence"]
    assert set(first["domains"]) == set(heldout_texts())
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "multilingual" in shown and "top-1" in shown
    assert cli.main(["eval", str(tiny_llama), "--text", "a", "--tokens", "b"]) == 2
