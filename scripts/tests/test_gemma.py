"""The second model's builder, on a GGUF's metadata and names made by hand: nothing is downloaded."""

from typing import Any

import pytest

from scripts.studies.gemma import build_tokenizer, hf_key, merges_of

TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "<0xC3>", "<0xBF>", "ab", "abc", "bc", "▁a", "▁", "a", "b", "c"]
KINDS = [3, 3, 3, 3, 4, 6, 6, 1, 1, 1, 1, 1, 1, 1, 1]
SCORES = [-1000.0, -1000.0, -1000.0, -1000.0, -1000.0, 0.0, 0.0, -3.0, -9.0, -1.0, -2.0, -10.0, -11.0, -12.0, -13.0]


@pytest.fixture
def metadata() -> dict[str, Any]:
    return {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.scores": SCORES,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_merges_come_by_the_score_of_what_they_make() -> None:
    found = merges_of(TOKENS, KINDS, SCORES)
    # bc (-1), " a" (-2), ab (-3), then both ways to abc (-9); bytes, control and user's tokens take no part.
    assert found == [("b", "c"), ("▁", "a"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_the_tokenizer_merges_as_sentencepiece_does(metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.encode("abc", add_special_tokens=False).tokens == ["abc"]  # by bc, the best-scored pair
    assert tokenizer.encode("ab a\n\nÿ").tokens == ["<bos>", "ab", "▁a", "\n\n", "<0xC3>", "<0xBF>"]
    assert tokenizer.decode(tokenizer.encode("ab a\n\nÿ").ids) == "ab a\n\nÿ"


def test_tensor_names() -> None:
    assert hf_key("token_embd.weight") == "language_model.model.embed_tokens.weight"
    assert hf_key("blk.7.ffn_norm.weight") == ("language_model.model.layers.7.pre_feedforward_layernorm.weight")
    assert hf_key("blk.0.attn_k_norm.weight") == "language_model.model.layers.0.self_attn.k_norm.weight"
