"""Odd inputs: each is refused before the first pass, or converted with the message that it needs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from exl2jax import cli
from exl2jax.conversion import context as conversion_context
from exl2jax.exl2.verify.directory import verify
from exl2jax.models import head_spec, load_exl2, open_model
from exl2jax.testing.made_up import made_up_measurement
from exl2jax.testing.odd_builders import EMBEDDING, HEAD, LAYERS, VOCABULARY, base, random_head
from exl2jax.testing.odd_inputs import ODD, TRACKERS

RELIABILITY = Path(__file__).parents[1] / "docs" / "reliability.md"
CONVERTED = [name for name, odd in ODD.items() if not odd.refused]
REFUSED = [name for name, odd in ODD.items() if odd.refused]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token rows and a measurement that serve every model, since all have the same shapes."""
    home = tmp_path_factory.mktemp("odd")
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (4, 32))
    save_file({"input_ids": ids.astype(np.int64)}, home / "rows.safetensors")
    made_up_measurement(base(home / "sound"), home / "measurement.json")
    return home


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the passes that have begun."""
    begun: list[str] = []
    scan = conversion_context.scan

    def counted(*args: Any, **kwargs: Any) -> Any:
        begun.append(kwargs["stage"])
        return scan(*args, **kwargs)

    monkeypatch.setattr(conversion_context, "scan", counted)
    yield begun


def convert(model: Path, home: Path, out: Path, *flags: str) -> int:
    job = [
        "convert",
        "-i",
        model,
        "-o",
        out / "work",
        "-cf",
        out / "exl2",
        "-c",
        home / "rows.safetensors",
        "-b",
        "4.5",
    ]
    return cli.main([str(part) for part in (*job, "-m", home / "measurement.json", "--preset", "stock", *flags)])


def plan(model: Path, home: Path) -> int:
    rows = ["-c", home / "rows.safetensors", "-r", "4", "-mr", "2"]
    return cli.main([str(part) for part in ("plan", model, *rows, "--json")])


def missing(words: tuple[str, ...], text: str) -> list[str]:
    return [part for part in words if part not in text]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_pass_by_plan_and_convert(
    name: str, home: Path, tmp_path: Path, passes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ODD[name].build(tmp_path / "model")
    assert plan(tmp_path / "model", home) in (1, 2)
    shown = capsys.readouterr()
    assert not missing(ODD[name].said, shown.err + shown.out), shown
    assert convert(tmp_path / "model", home, tmp_path) in (1, 2)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and not missing(ODD[name].said, message), message
    assert passes == [] and not (tmp_path / "exl2").exists() and not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", CONVERTED)
def test_converted_with_a_word_where_one_is_needed(
    name: str,
    home: Path,
    tmp_path: Path,
    passes: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = ODD[name]
    odd.build(tmp_path / "model")
    assert plan(tmp_path / "model", home) == 0
    planned = json.loads(capsys.readouterr().out)
    short = ("under-calibrated", "not tuned as a whole")  # the text of the tests is
    notes = [line for line in planned["warnings"] if not any(word in line for word in short)]
    assert planned["refused"] == [] and len(notes) == bool(odd.said) and not missing(odd.said, " ".join(notes))
    assert convert(tmp_path / "model", home, tmp_path, "--json") == 0
    shown = capsys.readouterr()
    assert set(notes) <= set(json.loads(shown.out)["warnings"]) and all(note in caplog.messages for note in notes)
    assert passes == ["quantize"] and verify(tmp_path / "exl2").faults == ()


def test_the_stored_head_is_the_one_that_is_quantized(home: Path, tmp_path: Path) -> None:
    ODD["tied_but_stored_head"].build(tmp_path / "model")
    assert convert(tmp_path / "model", home, tmp_path, "-hb", "8") == 0
    model = load_exl2(tmp_path / "exl2")
    found = model.kernel(head_spec(model.config)).astype(np.float32).T
    stored = random_head().astype(np.float32)
    assert np.linalg.norm(found - stored) < 0.02 * np.linalg.norm(stored)
    assert json.loads((tmp_path / "exl2" / "config.json").read_text())["tie_word_embeddings"] is False


def test_an_equal_head_stays_tied(tmp_path: Path) -> None:
    ODD["tied_equal_head"].build(tmp_path / "model")
    model = open_model(tmp_path / "model")
    assert model.config.tie_word_embeddings
    kernel = model.head_params()["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, load_file(tmp_path / "model" / "model.safetensors")[EMBEDDING])


def test_a_head_of_another_float_type_is_compared_by_value(tmp_path: Path) -> None:
    base(tmp_path / "model", tie=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {HEAD: tensors[EMBEDDING].astype(np.float32)}, path)
    assert open_model(tmp_path / "model").config.tie_word_embeddings
    changed = tensors[EMBEDDING].astype(np.float32)
    changed[-1, -1] += 1e-3
    save_file(tensors | {HEAD: changed}, path)
    assert not open_model(tmp_path / "model").config.tie_word_embeddings


def test_the_written_tokenizer_encodes_as_the_source_does(home: Path, tmp_path: Path) -> None:
    base(tmp_path / "with")
    ODD["slow_tokenizer"].build(tmp_path / "model")
    assert convert(tmp_path / "model", home, tmp_path) == 0
    mine, theirs = (Tokenizer.from_file(str(tmp_path / d / "tokenizer.json")) for d in ("exl2", "with"))
    text = "The weaver counts 12 threads;\n\tdef add(left): 'äé'"
    assert mine.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


def test_what_is_copied_and_what_is_not(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tmp_path / "model"
    ODD["adapter_beside"].build(model)
    kept = ("README.md", "LICENSE", "chat_template.jinja", "modeling_tiny.py", "added_tokens.json", "spiece.model")
    left = ("tf_model.h5", "flax_model.msgpack", "model.onnx", "rust_model.ot", "model.tflite", "a.ckpt", "a.pth")
    left += ("optimizer.bin", "trainer_state.json", "training_args.bin", "scheduler.pt", "notes.pdf")
    for name in (*kept, *left):
        (model / name).write_text("{}", encoding="utf-8")
    assert convert(model, home, tmp_path) == 0
    there = {path.name for path in (tmp_path / "exl2").iterdir()}
    assert set(kept) <= there and not there & {*left, "adapter_config.json"}
    said = next(line for line in caplog.messages if line.startswith("not copied"))
    assert not missing(left, said)


def test_old_files_of_a_reused_directory_are_named(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base(tmp_path / "model")
    (tmp_path / "exl2").mkdir()
    for name in ("tokenizer.model", "pytorch_model.bin", "notes.txt"):
        (tmp_path / "exl2" / name).write_text("old", encoding="utf-8")
    assert convert(tmp_path / "model", home, tmp_path) == 0
    said = "not of this model and stay where they are: pytorch_model.bin, tokenizer.model"
    assert any(line.endswith(said) for line in caplog.messages)
    caplog.clear()
    assert convert(tmp_path / "model", home, tmp_path) == 0
    assert any(line.endswith(said) for line in caplog.messages), "the card of the first run is replaced, not left"


@pytest.mark.parametrize(
    ("flags", "prepare", "words"),
    [
        (("-ss", "0.01"), None, ("-ss is 0.01 MB", "model.embed_tokens.weight")),
        ((), "stray", ("extra.safetensors: not of this conversion",)),
        ((), "file", ("exl2: -cf is not a writable directory",)),
        (("--pin", "*.none=4"), None, ("--pin *.none=4: no linear is named so",)),
        (("--exclude-bits", "2", "--exclude-bits", "3", "--pin", "*.q_proj=2"), None, ("keeps to --pin",)),
    ],
)
def test_settings_that_cannot_be_carried_out_are_refused_before_the_first_pass(
    flags: tuple[str, ...],
    prepare: str | None,
    words: tuple[str, ...],
    home: Path,
    tmp_path: Path,
    passes: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base(tmp_path / "model")
    if prepare == "stray":
        (tmp_path / "exl2").mkdir()
        save_file({"x": np.zeros(2, np.float16)}, tmp_path / "exl2" / "extra.safetensors")
    if prepare == "file":
        (tmp_path / "exl2").write_text("", encoding="utf-8")
    rows, job = (
        ["-c", home / "rows.safetensors", "-r", "4", "-mr", "2"],
        ["-cf", tmp_path / "exl2", "--preset", "stock"],
    )
    for command in (["plan", tmp_path / "model"], ["convert", "-i", tmp_path / "model", "-o", tmp_path / "work"]):
        assert cli.main([str(part) for part in (*command, *rows, *job, *flags)]) in (1, 2)
        shown = capsys.readouterr()
        assert not missing(words, " ".join((shown.err + shown.out).replace("│", " ").split())), (command, shown)
    assert passes == [] and not (tmp_path / "work").exists()


def test_a_measurement_that_cannot_be_delivered_is_refused_at_once(
    home: Path, tmp_path: Path, passes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path / "model")
    (tmp_path / "file").write_text("", encoding="utf-8")
    job = ["convert", "-i", tmp_path / "model", "-o", tmp_path / "work", "-om", tmp_path / "file" / "m.json"]
    assert cli.main([str(part) for part in (*job, "-c", home / "rows.safetensors", "-mr", "2")]) == 1
    assert "-om is not a writable directory" in capsys.readouterr().err
    assert passes == []


def test_a_file_too_large_to_be_copied_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path / "model")
    os.truncate(tmp_path / "model" / "generation_config.json", 2**29)  # sparse
    assert convert(tmp_path / "model", home, tmp_path) == 1
    assert "generation_config.json: 537 MB are more than" in capsys.readouterr().err


def test_every_layer_of_a_warning_counts(tmp_path: Path) -> None:
    """Layers that predict several tokens are known to be unused, as far as the config says how many there are."""
    ODD["more_layers_than_config"].build(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for extra, unread in ((1, 9), (2, 0)):
        path.write_text(json.dumps(config | {"num_nextn_predict_layers": extra}), encoding="utf-8")
        notes = open_model(tmp_path / "model").notes  # type: ignore[attr-defined]
        assert [note.split()[0] for note in notes] == ([str(unread)] if unread else [])
    assert LAYERS == 2


def test_the_documentation_lists_every_input() -> None:
    assert len(TRACKERS) >= 10
    text = RELIABILITY.read_text(encoding="utf-8")
    rows = [f"| {odd.brought} | {odd.happens} |" for odd in ODD.values()]
    assert not [row for row in rows if row not in text]
