"""The scorer against NumPy, and the harness's interface: its documented questions, and the harness itself if there."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from exl2jax import cli
from exl2jax.errors import SettingsError
from exl2jax.evaluation import model_logits
from exl2jax.evaluation.harness import MISSING, Scorer, harness_model, run_tasks


class Request(NamedTuple):
    """A request of the harness to a model: `args` of one question."""

    args: tuple[Any, ...]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `lm_eval.api.model` with the abstract class that the harness documents."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].LM = type("LM", (), {})  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def expected(scorer: Scorer, directory: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model_logits(directory, np.asarray([context + continuation], np.int32))[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(log_p[i, token] for i, token in zip(at, continuation, strict=True))
    return float(total), all(int(logits[i].argmax()) == t for i, t in zip(at, continuation, strict=True))


def test_likelihoods_against_numpy(tiny_llama: Path) -> None:
    scorer = Scorer(tiny_llama)
    pairs = [("the river", " runs along"), ("a", " b"), ("", "the town"), ("long " * 30, "end"), ("x ", "y")]
    for (context, continuation), found in zip(pairs, scorer.score(pairs), strict=True):
        bare = context.rstrip()
        whole = scorer.tokenizer.encode(bare + context[len(bare) :] + continuation).tolist()
        count = len(scorer.tokenizer.encode(bare))
        first = [scorer.tokenizer.bos_id]
        wanted = expected(scorer, tiny_llama, whole[:count] or first, whole[count:])  # type: ignore[arg-type]
        assert found[0] == pytest.approx(wanted[0], rel=1e-4) and found[1] == wanted[1]


def test_whole_texts_predict_every_token_once(tiny_llama: Path) -> None:
    scorer = Scorer(tiny_llama)
    text = "the children run along the river in the morning. " * 12
    ids = scorer.tokenizer.encode(text).tolist()
    step = scorer.context - 1
    assert len(ids) > step, "the text should need two windows"
    parts = [(ids[:step], [scorer.tokenizer.bos_id]), (ids[step:], [ids[step - 1]])]
    wanted = sum(expected(scorer, tiny_llama, before, part)[0] for part, before in parts)  # type: ignore[arg-type]
    assert scorer.score_whole([text, "ab"])[0] == pytest.approx(wanted, rel=1e-4)


def test_completion_is_greedy_and_stops(tiny_llama: Path) -> None:
    scorer = Scorer(tiny_llama)
    text = scorer.complete("the river", [], 5)
    [(_, greedy)] = scorer._score_ids([([0, *scorer.tokenizer.encode("the river").tolist()], _greedy(scorer))])
    assert greedy and text == scorer.tokenizer.decode(_greedy(scorer))
    assert scorer.complete("the river", [text[1]], 5) == text[: text.index(text[1])]


def _greedy(scorer: Scorer) -> list[int]:
    ids = [0, *scorer.tokenizer.encode("the river").tolist()]
    begun = len(ids)
    for _ in range(5):
        ids.append(int(model_logits(scorer.directory, np.asarray([ids], np.int32))[0, -1].argmax()))
    return ids[begun:]


def test_the_documented_interface(tiny_llama: Path, stand_in: None) -> None:
    model = harness_model(tiny_llama)
    scorer = Scorer(tiny_llama)
    assert model.loglikelihood([Request(("the", " river"))]) == scorer.score([("the", " river")])
    assert model.loglikelihood_rolling([Request(("the river",))]) == scorer.score_whole(["the river"])
    settings = {"until": ["\n"], "max_gen_toks": 3}
    assert model.generate_until([Request(("the", settings))]) == [scorer.complete("the", ["\n"], 3)]
    with pytest.raises(SettingsError, match="draws at random"):
        model.generate_until([Request(("the", {"do_sample": True}))])


def test_without_the_harness_the_flag_says_how_to_get_it(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert cli.main(["eval", str(tiny_llama), "--task", "arc_easy"]) == 2
    assert MISSING in capsys.readouterr().err


TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_the_harness_itself(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    scorer = Scorer(tiny_llama)
    records, right = [], 0
    for i, question in enumerate(("the river", "the weaver", "in the 12th")):
        choices = [" runs", " counts", " year"]
        scores = [score for score, _ in scorer.score([(question, c) for c in choices])]
        right += int(np.argmax(scores)) == i
        records.append({"question": question, "choices": choices, "answer": i})
    import json

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=file))
    found = run_tasks(tiny_llama, [str(tmp_path / "tiny.yaml")])
    assert found["tiny_choice"]["acc,none"] == pytest.approx(right / 3)
