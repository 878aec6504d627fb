"""How a Llama's tensors lie in a GGUF file, and the arithmetic of bits: nothing but NumPy."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

SUPER_BLOCK = 256
"""Weights of a super-block of llama.cpp's k-quants and i-quants: a row must be a multiple of it."""

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Head(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    shape: tuple[int, ...]
    nbytes: int


def paired_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k weight from Hugging Face's rotary layout (i, i + d/2) to GGUF's (2i, 2i + 1)."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `paired_rows`."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def rows_to_join(rows: int, columns: int, block: int = SUPER_BLOCK) -> int:
    """The fewest rows that, laid end to end, are a whole number of blocks; 1 where no number of them divides `rows`."""
    count = block // np.gcd(columns, block)
    return int(count) if rows % count == 0 else 1


def gguf_name(key: str) -> str:
    """GGUF's name of a Hugging Face key: `model.layers.4.mlp.up_proj.weight` is `blk.4.ffn_up.weight`."""
    path, _, kind = key.rpartition(".")
    if not path.startswith("model.layers."):
        return f"{_TOP[path]}.{kind}"
    layer, _, module = path.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_BLOCK[module]}.{kind}"


def is_decoder_linear(name: str) -> bool:
    """Whether a tensor, by its Hugging Face name, is a linear of a decoder layer or a part of its quantized form."""
    return name.startswith("model.layers.") and "_proj." in name


def read_heads(path: Path) -> dict[str, Head]:
    """The tensors of a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries: dict[str, dict[str, list[int]]] = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {name: Head(tuple(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0]) for name, e in entries.items()}


def heads_of(directory: Path) -> dict[str, Head]:
    """The tensors of all safetensors files of a directory."""
    found: dict[str, Head] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= read_heads(path)
    return found


def decoder_weights(heads: Mapping[str, Head]) -> int:
    """Number of weights in the linears of a plain model's decoder."""
    return sum(int(np.prod(h.shape)) for name, h in heads.items() if is_decoder_linear(name) and len(h.shape) == 2)


def decoder_bytes(heads: Mapping[str, Head]) -> int:
    """Bytes of the decoder's linears with their scales, orders and whatever else lies beside them."""
    return sum(head.nbytes for name, head in heads.items() if is_decoder_linear(name))


def weight_bytes(directory: Path) -> int:
    """Bytes of the safetensors files of a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def bits_per_weight(nbytes: int, weights: int) -> float:
    """Bits that one weight takes."""
    return 8 * nbytes / weights


def spread(rows: int, most: int) -> np.ndarray:
    """Numbers of at most `most` of the rows, evenly spaced: calibration rows lie by domain."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).round().astype(int))


def counted(names: Iterable[str]) -> str:
    """How often each name comes, the most frequent first: `IQ4_NL 180, Q3_K 30`."""
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda item: -item[1]))
