"""The standard set against an oracle: docs/format.md 5.1 with plain lists and the bare tokenizers library."""

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Library

from exl2jax.calibration import NOISE_ID, CalibrationConfig, CalibrationRows, Tokenizer, load_rows, load_tokenizer
from exl2jax.calibration.standard import standard_rows
from exl2jax.calibration.stdlib import code_fillers, technical_fillers
from exl2jax.calibration.texts import StandardTexts, stories, web_text, wiki_articles
from exl2jax.errors import CalibrationError

ROOT = Path(__file__).parents[2]
VOCAB = 512
DOMAINS = ("web", "wiki", "code", "tiny", "multilingual", "multilingual-shuffled", "random", "technical")
COUNTS = {
    False: dict(zip(DOMAINS, (10, 48, 15, 10, 15, 5, 2, 10), strict=True)),
    True: dict(zip(DOMAINS, (2, 4, 3, 2, 3, 1, 2, 2), strict=True)),
}


class Oracle:
    """Expected rows of the domains that involve no chance, from a directory in the stock layout."""

    def __init__(self, model_dir: Path, texts: Path, bos: list[int], length: int) -> None:
        self.library = Library.from_file(str(model_dir / "tokenizer.json"))
        self.texts, self.bos, self.length = texts, bos, length

    def read(self, name: str) -> str:
        with (self.texts / f"{name}.utf8").open(encoding="utf-8") as file:
            return file.read()

    def ids(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def running(self, text: str, count: int) -> list[list[int]]:
        ids = self.ids(text)
        return [ids[i * self.length : (i + 1) * self.length] for i in range(count)]

    def documents(self, texts: list[str], count: int) -> list[list[int]]:
        queue, rows = list(texts), []
        for row in range(count):
            ids: list[int] = []
            while len(ids) < self.length + 1:
                ids += self.bos + self.ids(queue.pop(0)) + [1]
            skip = len(self.bos) if row < count // 2 else 0
            rows.append(ids[skip : skip + self.length])
        return rows

    def rows(self, counts: dict[str, int]) -> dict[str, list[list[int]]]:
        with (self.texts / "c4.utf8").open(encoding="utf-8") as file:
            web = "\n\n".join(file.readlines())
        articles = [part[part.find("\n") + 1 :] for part in self.read("wiki").split("</doc>\n")]
        tales = [part.strip() for part in self.read("tiny").split("<|endoftext|>")]
        return {
            "web": self.running(web, counts["web"]),
            "wiki": self.documents(articles, counts["wiki"]),
            "code": self.running(self.read("code"), counts["code"]),
            "tiny": self.documents(tales, counts["tiny"]),
            "multilingual": self.running(self.read("multilingual"), counts["multilingual"]),
            "technical": self.running(self.read("technical"), counts["technical"]),
        }


def of_domain(rows: CalibrationRows, domain: str) -> list[list[int]]:
    return [ids.tolist() for ids, name in zip(rows.input_ids, rows.domains, strict=True) if name == domain]


def load(source: str, tokenizer: Tokenizer, **settings: object) -> CalibrationRows:
    return load_rows(CalibrationConfig(source=source, **settings), tokenizer, vocab_size=VOCAB)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["bos", "no-bos", "template"])
@pytest.mark.parametrize(("length", "measure"), [(64, False), (100, False), (200, False), (200, True), (333, True)])
def test_a_directory_gives_the_rows_of_the_oracle(
    tokenizer_dirs: dict[str, Path], standard_dir: Path, name: str, length: int, measure: bool
) -> None:
    rows = load(f"standard:{standard_dir}", load_tokenizer(tokenizer_dirs[name]), length=length, measure=measure)
    counts = COUNTS[measure]
    expected_order = [domain for domain, count in counts.items() for _ in range(count)]
    assert list(rows.domains) == expected_order
    assert rows.input_ids.shape == (sum(counts.values()), length)
    assert rows.input_ids.dtype == np.int32
    assert rows.attention_mask is None
    assert rows.notes == ()
    oracle = Oracle(tokenizer_dirs[name], standard_dir, [] if name == "no-bos" else [0], length)
    for domain, expected in oracle.rows(counts).items():
        assert of_domain(rows, domain) == expected, domain


@pytest.mark.parametrize("length", [200, 256, 300, 512])
def test_shuffled_rows_are_pieces_of_the_multilingual_text(
    tokenizer_dirs: dict[str, Path], standard_dir: Path, length: int
) -> None:
    rows = load(f"standard:{standard_dir}", load_tokenizer(tokenizer_dirs["bos"]), length=length)
    piece = min(128, length // 2)
    ids = Oracle(tokenizer_dirs["bos"], standard_dir, [0], length).running(
        (standard_dir / "multilingual.utf8").read_text("utf-8"), 1000
    )
    flat = [i for row in ids for i in row]
    pieces = Counter(tuple(flat[i : i + piece]) for i in range(0, len(flat), piece))
    used: Counter[tuple[int, ...]] = Counter()
    for row in of_domain(rows, "multilingual-shuffled"):
        whole = [tuple(row[i : i + piece]) for i in range(0, length - piece + 1, piece)]
        used.update(whole)
        tail = tuple(row[len(whole) * piece :])
        assert not tail or any(found[: len(tail)] == tail for found in pieces)
    assert used <= pieces
    assert of_domain(rows, "multilingual-shuffled") != of_domain(rows, "multilingual")[:5]


def test_random_rows_cover_the_ids_that_tokenizer_and_embedding_share(tokenizer: Tokenizer, standard_dir: Path) -> None:
    rows = of_domain(load(f"standard:{standard_dir}", tokenizer, length=512), "random")
    assert all(0 <= i < tokenizer.vocab_size for row in rows for i in row)
    assert len({i for row in rows for i in row}) > tokenizer.vocab_size * 0.85
    assert rows[0] != rows[1]


def test_only_the_rows_of_chance_depend_on_the_seed(tokenizer: Tokenizer, standard_dir: Path) -> None:
    first, again, other = (load(f"standard:{standard_dir}", tokenizer, length=128, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    changed = {
        domain for domain, a, b in zip(first.domains, first.input_ids, other.input_ids, strict=True) if (a != b).any()
    }
    assert changed == {"multilingual-shuffled", "random"}


def test_another_process_gives_the_same_bytes(tokenizer_dirs: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from exl2jax.calibration import *\n"
        "t = load_tokenizer(Path(sys.argv[1]))\n"
        f"print(load_rows(CalibrationConfig(length=96, seed=5), t, vocab_size={VOCAB}).sha256)"
    )
    command = [sys.executable, "-c", code, str(tokenizer_dirs["bos"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "77"})
    here = load("standard", load_tokenizer(tokenizer_dirs["bos"]), length=96, seed=5)
    assert done.stdout.strip() == here.sha256


def test_golden_rows_of_the_stock_converter(shared: Path, demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    for name, measure in (("quant", False), ("measure", True)):
        golden = load_file(shared / "data" / "golden" / f"cal_{name}_512.safetensors")["input_ids"]
        config = CalibrationConfig(source=f"standard:{shared / 'data' / 'standard_cal'}", length=512, measure=measure)
        rows = load_rows(config, tokenizer, vocab_size=49152)
        assert rows.input_ids.shape == golden.shape
        for domain, mine, stock in zip(rows.domains, rows.input_ids, golden, strict=True):
            if domain not in ("multilingual-shuffled", "random"):
                np.testing.assert_array_equal(mine, stock)


def test_noise_rows_stand_last(tokenizer: Tokenizer, standard_dir: Path) -> None:
    rows = load(f"standard:{standard_dir}", tokenizer, length=64, measure=True, noise_rows=5)
    assert rows.domains[-5:] == ("noise",) * 5
    assert (rows.input_ids[-5:] == NOISE_ID).all()
    assert (rows.input_ids[:-5] >= 0).all()
    assert rows.notes == ()


def test_fewer_or_more_rows_keep_the_proportions(tokenizer: Tokenizer, standard_dir: Path) -> None:
    rows = load(f"standard:{standard_dir}", tokenizer, length=64, rows=32)
    assert rows.composition == dict(zip(DOMAINS, (3, 13, 4, 3, 4, 1, 1, 3), strict=True))
    assert len(load(f"standard:{standard_dir}", tokenizer, length=64, rows=150).domains) == 150


def is_run_of(row: list[int], streams: list[list[int]]) -> bool:
    """Whether a row occurs in one of some token streams."""
    text = "," + ",".join(map(str, row)) + ","
    return any(text in "," + ",".join(map(str, stream)) + "," for stream in streams)


def test_the_built_in_set_holds_its_own_text_by_the_rules(tokenizer: Tokenizer) -> None:
    """Every row of a domain is a run of that domain's tokens, documents stand between BOS and EOS, nothing repeats."""
    length = 160
    rows = load("standard", tokenizer, length=length)
    assert rows.composition == COUNTS[False]
    assert len({tuple(row) for row in rows.input_ids.tolist()}) == len(rows.domains)
    data = resources.files("exl2jax.calibration") / "data"
    for domain in ("web", "code", "multilingual", "technical"):
        text = (data / f"{domain}.utf8").read_text(encoding="utf-8")
        stream = tokenizer.encode(web_text(text) if domain == "web" else text).tolist()
        assert all(is_run_of(row, [stream]) for row in of_domain(rows, domain)), domain
        starts = [
            i // length for i in range(0, len(stream), length) if stream[i : i + length] in of_domain(rows, domain)
        ]
        assert max(starts) > 0.7 * (len(stream) // length), "rows are spread over the whole text"
    for domain, split in (("wiki", wiki_articles), ("tiny", stories)):
        documents = [
            tokenizer.encode(t, bos=True, eos=True).tolist()
            for t in split((data / f"{domain}.utf8").read_text("utf-8"))
        ]
        stream = [i for document in documents for i in document]
        found = of_domain(rows, domain)
        for row in found:
            ends = [-1, *(i for i, token in enumerate(row) if token == 1), len(row)]
            pieces = [row[a + 1 : b] for a, b in pairwise(ends)]
            assert all(is_run_of([token for token in piece if token != 0], [stream]) for piece in pieces if piece)
        half = len(found) // 2
        assert all(row[0] != 0 for row in found[:half])
        assert all(row[0] == 0 for row in found[half:])
        for row in found:
            assert all(row[i + 1] == 0 for i in range(len(row) - 1) if row[i] == 1)


TEXTS = dict.fromkeys(("web", "code", "multilingual", "technical"), "ab cd ef gh " * 60)


def short_texts(wiki: list[str], tales: list[str]) -> StandardTexts:
    wiki_text = "".join(f"<doc>\n{article}</doc>\n" for article in wiki)
    return StandardTexts(
        texts={**TEXTS, "wiki": wiki_text, "tiny": "<|endoftext|>".join(tales)}, origin="these texts", spread=False
    )


def test_cut_off_ends_make_further_rows(tokenizer: Tokenizer) -> None:
    """Two long documents, four rows wanted: two start documents, the others are what those had to cut off."""
    wiki = ["".join(f"{word} " for word in "abcdefgh" * 12), "".join(f"{word} " for word in "stuvw" * 14)]
    built = standard_rows(short_texts(wiki, ["a"]), (("wiki", 4),), tokenizer, length=40, seed=0, vocab_size=VOCAB)
    first, second = (tokenizer.encode(text, bos=True, eos=True).tolist() for text in wiki)
    assert len(first[41:]) > 41 > len(second[41:])
    once = [0, *first[41:]]
    twice = [0, *once[41:], 0, *second[41:]]
    expected = [twice[1:41], once[1:41], first[:40], second[:40]]
    assert built.blocks[0].ids.tolist() == expected
    assert built.missing == {}


def test_a_document_that_fills_a_row_only_with_its_bos_is_joined_by_the_next(tokenizer: Tokenizer) -> None:
    texts = ["abc def ghi", "jkl mno prs"]
    first, second = (tokenizer.encode(text, bos=True, eos=True).tolist() for text in texts)
    built = standard_rows(
        short_texts(texts, ["a"]), (("wiki", 1),), tokenizer, length=len(first), seed=0, vocab_size=VOCAB
    )
    assert built.blocks[0].ids.tolist() == [first]
    built = standard_rows(
        short_texts(texts * 2, ["a"]), (("wiki", 2),), tokenizer, length=len(first), seed=0, vocab_size=VOCAB
    )
    assert built.blocks[0].ids.tolist() == [[*first[1:], second[0]], first]


def test_random_rows_stay_inside_a_small_embedding(tokenizer: Tokenizer) -> None:
    built = standard_rows(short_texts(["a"], ["a"]), (("random", 2),), tokenizer, length=500, seed=0, vocab_size=50)
    assert set(built.blocks[0].ids.ravel().tolist()) == set(range(50))


def test_short_texts_give_fewer_rows_and_say_so(tokenizer: Tokenizer) -> None:
    built = standard_rows(
        short_texts(["abc abc"], ["abc"]),
        (("web", 2), ("wiki", 3), ("tiny", 2), ("multilingual-shuffled", 9)),
        tokenizer,
        length=200,
        seed=0,
        vocab_size=VOCAB,
    )
    tokens = len(tokenizer.encode(TEXTS["multilingual"]))
    have = {block.domain: len(block.ids) for block in built.blocks}
    assert built.missing["wiki"] == 3
    assert built.missing["tiny"] == 2
    assert have["multilingual-shuffled"] == tokens // 100 // 2
    assert have["web"] + built.missing.get("web", 0) == 2


def test_fillers_go_on_where_a_text_ends(tokenizer: Tokenizer) -> None:
    texts = short_texts(["a"], ["a"])
    own = tokenizer.encode(texts.texts["code"]).tolist()
    filler = tokenizer.encode("uvw uvw uvw ").tolist()
    built = standard_rows(
        texts,
        (("code", len(own) // 50 + 2),),
        tokenizer,
        length=50,
        seed=0,
        vocab_size=VOCAB,
        fillers={"code": lambda: ["uvw uvw uvw "] * 100},
    )
    stream = own + filler * 100
    assert built.blocks[0].ids.ravel().tolist() == stream[: built.blocks[0].ids.size]
    assert built.missing == {}
    assert "standard library" in built.notes[0]


def test_standard_library_fillers_hold_code_and_prose() -> None:
    code, prose = next(code_fillers()), next(technical_fillers())
    assert "def " in code
    assert len(prose) > 1000
    assert next(code_fillers()) == code


def test_rows_that_nothing_fills_are_an_error(tokenizer: Tokenizer, standard_dir: Path) -> None:
    with pytest.raises(CalibrationError, match="fill no row of 900000 tokens"):
        load(f"standard:{standard_dir}", tokenizer, length=900_000, measure=True)


def test_the_model_fills_what_the_text_cannot(tokenizer: Tokenizer, standard_dir: Path) -> None:
    asked: list[Sequence[int]] = []

    def sampler(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        asked.extend(prompts)
        return np.full((n_rows, length), 9) + np.arange(n_rows)[:, None] % 7

    config = CalibrationConfig(source=f"standard:{standard_dir}", length=2000, fill_with_self=True)
    rows = load_rows(config, tokenizer, vocab_size=VOCAB, sampler=sampler)
    assert len(rows.domains) == 115
    assert rows.composition["self"] == len(asked) > 0
    assert any("written by the model" in note for note in rows.notes)


def test_the_built_in_set_is_filled_unless_that_is_turned_off(tokenizer: Tokenizer, standard_dir: Path) -> None:
    def sampler(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        return np.full((n_rows, length), 9) + np.arange(n_rows)[:, None] % 7

    def composition(source: str, fill: bool | None, **more: Any) -> dict[str, int]:
        config = CalibrationConfig(source=source, length=9000, fill_with_self=fill)
        return load_rows(config, tokenizer, vocab_size=VOCAB, **more).composition

    full = composition("standard", None, sampler=sampler)
    assert sum(full.values()) == 115 and full["self"] > 0
    assert "self" not in composition("standard", False, sampler=sampler)
    assert "self" not in composition("standard", None), "there is no model to write"
    assert "self" not in composition(f"standard:{standard_dir}", None, sampler=sampler)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c4.utf8", None, r"c4\.utf8 missing"),
        ("wiki.utf8", b"abc\xff\xfe", r"wiki\.utf8: not valid UTF-8 at byte 3"),
    ],
)
def test_directories_that_do_not_serve(
    tokenizer: Tokenizer, standard_dir: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    for file in standard_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load(f"standard:{tmp_path}", tokenizer, length=64)
    with pytest.raises(CalibrationError, match="no such directory"):
        load(f"standard:{tmp_path}/none", tokenizer, length=64)


def test_line_endings_and_byte_order_marks_do_not_matter(
    tokenizer: Tokenizer, standard_dir: Path, tmp_path: Path
) -> None:
    for file in standard_dir.iterdir():
        (tmp_path / file.name).write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert (
        load(f"standard:{tmp_path}", tokenizer, length=64).sha256
        == load(f"standard:{standard_dir}", tokenizer, length=64).sha256
    )


def test_architectures_that_ask_for_noise_get_it(tokenizer: Tokenizer, standard_dir: Path) -> None:
    for measure, expected in ((True, 5), (False, 30)):
        config = CalibrationConfig(source=f"standard:{standard_dir}", length=64, measure=measure)
        rows = load_rows(config, tokenizer, vocab_size=500, architecture="Qwen2VLForConditionalGeneration")
        assert rows.composition["noise"] == expected
        assert (rows.input_ids[-expected:] == NOISE_ID).all()
        assert "noise" not in load_rows(config, tokenizer, vocab_size=500, architecture="LlamaForCausalLM").composition
