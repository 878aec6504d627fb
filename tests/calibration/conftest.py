"""Small tokenizers and texts made from seeds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from exl2jax.calibration import Tokenizer, load_tokenizer

BOS, EOS = "<s>", "</s>"
ALPHABET = "abcdefghijklmnoprstuvwzäéñжшλ水"


def words(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    letters = np.array(list(ALPHABET))
    return ["".join(letters[rng.integers(0, len(letters), size)]) for size in rng.integers(1, 9, count)]


def prose(seed: int, count: int) -> str:
    """Lines of seeded words; every tenth word ends a line."""
    return "".join(word + ("\n" if i % 10 == 9 else " ") for i, word in enumerate(words(seed, count)))


def write_tokenizer(folder: Path, *, merges: int, bos: bool, template: bool = False, config: bool = True) -> Path:
    """A byte-level BPE trained on seeded text, as the files of a model directory."""
    folder.mkdir(parents=True)
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([prose(1, 2000)], trainer)
    if template:
        library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    library.save(str(folder / "tokenizer.json"))
    specials = {"eos_token": EOS, **({"bos_token": {"content": BOS}} if bos else {"bos_token": None})}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials), encoding="utf-8")
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model directories with a tokenizer: with BOS, without, and one that adds BOS by default."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "bos": write_tokenizer(root / "bos", merges=150, bos=True),
        "no-bos": write_tokenizer(root / "no-bos", merges=60, bos=False),
        "template": write_tokenizer(root / "template", merges=0, bos=True, template=True),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dirs: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(tokenizer_dirs["bos"])


@pytest.fixture(scope="session")
def template_tokenizer(tokenizer_dirs: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(tokenizer_dirs["template"])


@pytest.fixture(scope="session")
def standard_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded texts in the layout of the stock converter, enough for 115 rows of 200 tokens of the test tokenizers."""
    folder = tmp_path_factory.mktemp("texts") / "standard"
    folder.mkdir()
    for seed, (name, count) in enumerate({"c4": 2500, "code": 5000, "multilingual": 5000, "technical": 3500}.items()):
        (folder / f"{name}.utf8").write_text(prose(10 + seed, count), encoding="utf-8")
    rng = np.random.default_rng(20)
    articles = [
        f'<doc id="{i}" title="Article {i}">\nArticle {i}\n\n{prose(100 + i, int(rng.integers(5, 160)))}\n</doc>\n'
        for i in range(260)
    ]
    (folder / "wiki.utf8").write_text("".join(articles), encoding="utf-8")
    tales = [prose(1000 + i, int(rng.integers(20, 90))) for i in range(80)]
    (folder / "tiny.utf8").write_text("\n<|endoftext|>\n".join(tales), encoding="utf-8")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a text or bytes into a file of the test's directory."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file
