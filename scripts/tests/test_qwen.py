"""The third model's builder, on a GGUF's metadata made by hand, and the joining of slices: nothing is downloaded."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scripts.make_demo_model import DemoModelError
from scripts.studies import sliced_gguf
from scripts.studies.qwen import build_tokenizer, model_config, named_tokens
from scripts.studies.sliced_gguf import SlicedGguf

TOKENS = ["a", "b", "1", "2", "Ġ", "é", "Ã", "©", "Ċ", "ab", "Ġab", "<|end|>", "<tool>"]
KINDS = [1] * 11 + [3, 4]


@pytest.fixture
def metadata() -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.merges": ["a b", "Ġ ab"],
        "tokenizer.ggml.eos_token_id": 11,
        "tokenizer.ggml.padding_token_id": 11,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 128,
        "qwen2.block_count": 2,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
        "qwen2.context_length": 256,
        "qwen2.rope.freq_base": 1e6,
    }


def test_the_tokenizer_splits_words_digits_and_whole_tokens(metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(metadata)
    # Each digit is a word, the e with a combining accent becomes one letter of two bytes.
    assert tokenizer.encode("ab ab12\n<tool><|end|>").tokens == ["ab", "Ġab", "1", "2", "Ċ", "<tool>", "<|end|>"]
    assert tokenizer.encode("e\u0301").tokens == ["Ã", "©"]
    assert tokenizer.decode(tokenizer.encode("ab<tool>a<|end|>").ids) == "ab<tool>a"


def test_the_config_has_the_decimal_that_was_meant(metadata: dict[str, Any]) -> None:
    config = model_config(metadata)
    assert config["rms_norm_eps"] == 1e-6 and config["vocab_size"] == len(TOKENS)
    assert "bos_token_id" not in config and named_tokens(metadata) == {"eos_token": "<|end|>", "pad_token": "<|end|>"}


def test_slices_come_in_the_order_of_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [bytes([i]) * 100 for i in range(12)]

    def download(folder: Path, requirements: list[str], advice: str) -> None:
        for i, part in enumerate(parts):
            with zipfile.ZipFile(folder / f"some_part{i + 1}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr("some/__init__.py", "# small")
                wheel.writestr(f"some/data/{i}.bin", part)

    monkeypatch.setattr(sliced_gguf, "download", download)
    names = [f"some-part{i + 1}" for i in range(12)]
    source = SlicedGguf(packages=names, version="1.0", sha256=hashlib.sha256(b"".join(parts)).hexdigest())
    assert source.join(tmp_path).read_bytes() == b"".join(parts)
    wrong = SlicedGguf(packages=names, version="1.0", sha256="0" * 64)
    with pytest.raises(DemoModelError, match="the joined slices have SHA-256"):
        wrong.build(tmp_path / "model", lambda gguf, out: None)
    assert not (tmp_path / "model").exists()
