"""Generated text: every token is the one that whole forward passes and the drawn chance call for."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from exl2jax import cli
from exl2jax.calibration import load_tokenizer
from exl2jax.errors import SettingsError
from exl2jax.evaluation import model_logits
from exl2jax.generation import CHUNK, Sampling, encode_prompt, generate, load_resident
from exl2jax.generation.sampling import pick
from exl2jax.generation.streamed import StreamedText
from exl2jax.stream import stepping
from exl2jax.stream.progress import StopFlag
from exl2jax.testing.parity_cases import TINY_CASES

CASES = ("plain", "rope_dynamic", "gemma3", "glm4", "gpt2", "mixtral")
"""Between them every kind of position, norm and window, a parallel block and experts."""
LONG_PROMPT = [0, *(5 + 7 * i % 250 for i in range(CHUNK + 9))]


def known_vocabulary(directory: Path) -> int:
    return load_tokenizer(directory).vocab_size


@pytest.mark.parametrize("case", [c for c in TINY_CASES if c.name in CASES], ids=lambda case: case.name)
@pytest.mark.parametrize("prompt", [[5], LONG_PROMPT], ids=["one token", "two chunks"])
def test_greedy_tokens_are_those_of_the_full_forward_pass(case, prompt: list[int], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    directory = case.write(tmp_path / "model")
    resident = load_resident(directory)
    prompt = prompt[: resident.context - 8]
    found = generate(resident, prompt, Sampling(new_tokens=8))
    assert found.ended in ("length", "end", "context") and found.ids
    row = [*prompt, *found.ids]
    logits = model_logits(directory, np.asarray([row], np.int32))[0, :, : known_vocabulary(directory)]
    for at in range(len(prompt), len(row)):
        assert logits[at - 1, row[at]] >= logits[at - 1].max() - 1e-4, at


def test_greedy_equals_a_plain_loop(tiny_llama: Path) -> None:
    resident, row = load_resident(tiny_llama), [0, 40, 7]
    found = generate(resident, row, Sampling(new_tokens=10))
    plain = [*row]
    while len(plain) < len(row) + 10:
        token = int(model_logits(tiny_llama, np.asarray([plain], np.int32))[0, -1].argmax())
        if token in resident.ends:
            break
        plain.append(token)
    assert list(found.ids) == plain[len(row) :]
    assert found.text == resident.tokenizer.decode(plain)[len(resident.tokenizer.decode(row)) :]
    assert found.prompt_tokens == 3 and found.tokens_per_second > 0  # type: ignore[operator]


def test_drawn_tokens_are_those_of_the_full_forward_pass(tiny_llama: Path) -> None:
    resident, prompt = load_resident(tiny_llama), [0, 40, 7]
    sampling = Sampling(temperature=0.7, top_p=0.8, seed=3, new_tokens=20)
    found = generate(resident, prompt, sampling)
    assert found.ids == generate(resident, prompt, sampling).ids
    assert found.ids != generate(resident, prompt, Sampling(temperature=0.7, top_p=0.8, seed=4, new_tokens=20)).ids
    chances = np.random.default_rng(3).random(20)
    row = [*prompt, *found.ids]
    logits = model_logits(tiny_llama, np.asarray([row], np.int32))[0, :, : resident.tokenizer.vocab_size]
    for at in range(len(prompt), len(row)):
        assert row[at] == nucleus(logits[at - 1], 0.7, 0.8, chances[at - len(prompt)]), at


def nucleus(logits: np.ndarray, temperature: float, share: float, chance: float) -> int:
    """Nucleus sampling as its paper says it, in loops of float64."""
    values = [float(x) / temperature for x in logits]
    top = max(values)
    masses = [np.exp(v - top) for v in values]
    total, held, kept = sum(masses), 0.0, []
    for token in sorted(range(len(masses)), key=lambda i: (-masses[i], i)):
        if held >= share * total:
            break
        held += masses[token]
        kept.append(token)
    reached = 0.0
    for token in sorted(kept):
        reached += masses[token]
        if chance * held < reached:
            return token
    raise AssertionError("chance is below one")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
def test_pick_against_loops(share: float) -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        logits, chance = (3 * rng.standard_normal(17)).astype(np.float32), float(rng.random())
        assert pick(logits, Sampling(temperature=1.3, top_p=share), chance) == nucleus(logits, 1.3, share, chance)


def test_pick_by_hand() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3]))
    assert pick(logits, Sampling(), 0.99) == 1
    assert [pick(logits, Sampling(temperature=1.0), c) for c in (0.0, 0.09, 0.11, 0.69, 0.71)] == [0, 0, 1, 1, 2]
    assert {pick(logits, Sampling(temperature=1.0, top_p=0.5), c) for c in (0.0, 0.5, 0.999)} == {1}


def test_memory_changes_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(load_resident(tiny_llama), [0, 40], Sampling(new_tokens=6)).ids
    monkeypatch.setattr(stepping, "RESIDENT_BYTES", 0)
    assert generate(load_resident(tiny_llama), [0, 40], Sampling(new_tokens=6)).ids == whole


def test_it_stops_at_end_tokens_the_context_and_on_request(tiny_llama: Path, tmp_path: Path) -> None:
    resident = load_resident(tiny_llama)
    first = generate(resident, [0, 40], Sampling(new_tokens=4))
    assert first.ended == "length" and len(first.ids) == 4
    ends = frozenset({first.ids[2]})
    cut = generate(dataclasses.replace(resident, ends=ends), [0, 40], Sampling(new_tokens=4))
    assert cut.ended == "end" and cut.ids == first.ids[: first.ids.index(first.ids[2])]
    full = generate(resident, [7] * (resident.context - 2), Sampling(new_tokens=4))
    assert full.ended == "context" and len(full.ids) == 2
    stop = StopFlag()
    stop.ask()
    assert generate(resident, [0, 40], Sampling(new_tokens=4), stop=stop).ended == "interrupted"
    with pytest.raises(SettingsError, match="shorten the prompt"):
        generate(resident, [7] * resident.context, Sampling())


def test_end_tokens_of_the_generation_config(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [17, 2]}))
    assert load_resident(folder).ends == {1, 2, 17}


class Letters:
    """A tokenizer whose ids are bytes; a part of a character decodes to the replacement character."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    shown: list[str] = []
    text = StreamedText(Letters(), list(b"before"), ["STOP"], shown.append)  # type: ignore[arg-type]
    steps = [text.add(byte) for byte in "aé ST STOPx".encode()]
    assert steps.index(True) == len("aé ST STO".encode()), "the stop text ends it"
    text.close()
    assert text.text == "".join(shown) == "aé ST "
    assert shown[:2] == ["a", "é"], "half a character is never shown"
    assert all("STO" not in piece for piece in shown)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"new_tokens": 0}]
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Sampling(**settings)  # type: ignore[arg-type]


def test_the_command_streams_and_compares(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(tiny_llama), "--prompt", "the river", "--max-new", "5"]) == 0
    shown = capsys.readouterr()
    resident = load_resident(tiny_llama)
    expected = generate(resident, encode_prompt(resident, "the river"), Sampling(new_tokens=5))
    assert shown.out == f"the river{expected.text}\n"
    assert "5 tokens, " in shown.err and "tokens per second" in shown.err
    both = ["generate", str(tiny_llama), "--prompt", "the river", "--max-new", "5", "--against", str(tiny_llama)]
    assert cli.main(both) == 0
    assert "the first 5 tokens are the same" in capsys.readouterr().out
    assert cli.main([*both, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["generations"]
    assert [r["text"] for r in record] == [expected.text] * 2


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_chat_answers_each_line(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(CHAT)
    monkeypatch.setattr("sys.stdin", io.StringIO("the river\nthe town\n"))
    assert cli.main(["generate", str(folder), "--chat", "--max-new", "4"]) == 0
    resident = load_resident(folder)
    first = generate(
        resident, resident.tokenizer.encode("user: the river\nassistant:").tolist(), Sampling(new_tokens=4)
    )
    talk = f"user: the river\nassistant: {first.text}\nuser: the town\nassistant:"
    second = generate(resident, resident.tokenizer.encode(talk).tolist(), Sampling(new_tokens=4))
    assert capsys.readouterr().out == f"{first.text}\n{second.text}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--max-new", "3"], 2, "--prompt TEXT"),
        (["--prompt", "a", "--chat"], 2, "--prompt TEXT"),
        (["--chat", "--json"], 2, "--chat shows one model"),
        (["--chat"], 1, "has no chat template"),
        (["--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, said: str, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(tiny_llama), *arguments]) == code
    assert said in capsys.readouterr().err
