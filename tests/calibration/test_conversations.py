"""Conversations, identifiers, nulls and JSON lines: what of a file becomes text, and what is said about it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exl2jax.calibration import CalibrationConfig, Tokenizer, load_rows
from exl2jax.calibration.chat import ChatTemplate, conversation, read_chat_template
from exl2jax.calibration.columns import is_identifier
from exl2jax.calibration.documents import json_file, json_lines
from exl2jax.calibration.parquet import chosen_columns, parquet_texts
from exl2jax.errors import CalibrationError, ModelError

SOURCE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATE = ChatTemplate(source=SOURCE, tokens={"bos_token": "<s>"}, where="tokenizer_config.json")
TALK = [{"role": "user", "content": "two plus two"}, {"role": "assistant", "content": "four"}]
SHAREGPT = [{"from": "human", "value": "two plus two"}, {"from": "gpt", "value": "four"}]
SAID = "<s>[user] two plus two\n[assistant] four\n"


def render(value: Any, where: str) -> str:
    return TEMPLATE.render(conversation(value, where))


def test_both_spellings_are_one_conversation() -> None:
    assert conversation(TALK, "x") == conversation(SHAREGPT, "x") == TALK
    assert TEMPLATE.render(TALK) == SAID and TEMPLATE.render(TALK[:1], reply=True).endswith("two plus two\n[assistant]")
    roles = [m["role"] for m in conversation([{"from": n, "value": ""} for n in ("system", "chatgpt", "tool")], "x")]
    assert roles == ["system", "assistant", "tool"]


@pytest.mark.parametrize("value", [[], "text", [3], [{"role": "user"}], [{"role": "user", "content": ["parts"]}]])
def test_what_is_no_conversation(value: Any) -> None:
    with pytest.raises(CalibrationError, match=r"^place"):
        conversation(value, "place")


@pytest.mark.parametrize(
    ("source", "said"),
    [("{{ raise_exception('no system role') }}", "no system role"), ("{% if %}", "refuses"), ("{{ 1 / 0 }}", "refuses"),
     ("{{ ''.__class__.__mro__ }}", "unsafe|refuses")],
)  # fmt: skip
def test_templates_that_fail(source: str, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        ChatTemplate(source=source, tokens={}, where="file").render(TALK)


def test_reading_templates(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template \(chat_template.jinja, or chat_template in"):
        read_chat_template(tmp_path)
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "tool", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no chat template"):
        read_chat_template(tmp_path)
    config["chat_template"].append({"name": "default", "template": SOURCE})  # type: ignore[union-attr]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_chat_template(tmp_path).render(TALK) == SAID
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert read_chat_template(tmp_path).render([{"content": "<é>"}]) == '[{"content": "<é>"}]'


def test_json_lines_of_conversations(tmp_path: Path) -> None:
    records = [{"messages": TALK}, {"conversations": SHAREGPT, "id": "a1"}, {"text": "plain", "messages": TALK}]
    lines = "\n".join(map(json.dumps, records))
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(lines)
    assert list(json_lines(tmp_path / "a.jsonl", (), render)) == [SAID, SAID, "plain"]
    assert list(json_file(tmp_path / "a.json", (), render)) == [SAID, SAID, "plain"], "JSON lines in a .json file"
    assert next(json_lines(tmp_path / "a.jsonl", ("messages",), render)) == SAID
    with pytest.raises(CalibrationError, match="field 'messages' holds a list, not text"):
        list(json_lines(tmp_path / "a.jsonl", ()))


def test_nulls_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\nnull\n{"text": ""}\n{"text": "two"}\n')
    assert list(json_lines(path, ())) == ["one", "two"]
    (tmp_path / "b.json").write_text('[{"text": "one", "more": null}, {"text": null, "more": null}]')
    assert list(json_file(tmp_path / "b.json", ("text", "more"))) == ["one"]


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_identifiers_are_not_text(tmp_path: Path) -> None:
    ids = [f"{n:032x}" for n in range(20)]
    path = table(tmp_path / "a.parquet", id=ids, text=[f"line {n}" for n in range(20)])
    assert list(parquet_texts(path, ())) == [f"line {n}" for n in range(20)]
    note = chosen_columns(path, ()).note
    assert note.endswith("text of text; not of id, which looks like identifiers; choose others with `cal_columns`")
    assert next(parquet_texts(path, ("id", "text"))) == f"{ids[0]} line 0"
    assert chosen_columns(path, ("id",)).note == ""
    alone = table(tmp_path / "b.parquet", id=ids)
    assert list(parquet_texts(alone, ())) == ids, "the only column is taken whatever it holds"


def test_identifiers_by_hand() -> None:
    ids = [f"row-{n}" for n in range(10)]
    assert is_identifier(ids) and is_identifier([*ids, None, ""])
    assert not is_identifier([*ids, "row-1"]), "repeated"
    assert not is_identifier([*ids, "two words"])
    assert not is_identifier([*ids, "x" * 65]) and not is_identifier(ids[:3])


def test_a_table_of_conversations(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", prompt=["two plus two"], messages=[TALK], n=[1])
    assert list(parquet_texts(path, (), render)) == [SAID]
    assert "text of messages; not of prompt;" in chosen_columns(path, ()).note
    assert list(parquet_texts(path, ("prompt",), render)) == ["two plus two"]
    assert list(parquet_texts(table(tmp_path / "b.parquet", conversations=[SHAREGPT, None]), (), render)) == [SAID]
    with pytest.raises(CalibrationError, match="chat template"):
        list(parquet_texts(path, ()))


def test_rows_of_conversations_and_their_notes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = table(tmp_path / "a.parquet", prompt=["x"] * 8, messages=[TALK] * 8)
    config = CalibrationConfig(source=path, rows=2, length=12)
    rows = load_rows(config, tokenizer, vocab_size=500, chat=lambda: TEMPLATE)
    expected = tokenizer.encode(SAID).tolist() * 8
    assert rows.input_ids.ravel().tolist() == expected[:24]
    assert any("text of messages; not of prompt" in note for note in rows.notes)
    with pytest.raises(CalibrationError, match="no model whose chat template"):
        load_rows(config, tokenizer, vocab_size=500)
