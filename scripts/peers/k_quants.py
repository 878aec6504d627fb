"""Quantize with llama.cpp (its C API through `llama-cpp-python`), with an importance matrix.

    .venv-peers/bin/python -m scripts.peers.k_quants --model demo/model --out FOLDER --type Q3_K_M --squares FILE

llama.cpp picks the types of the tensors as its own tool does. A row that is no multiple of 256 gets a type of blocks of
32 instead, which takes more bits. With `--join` as many rows as are needed lie end to end, so that every tensor gets
the type that its name says: no program runs such a file, but it shows what the format does where the rows fit.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as library  # pyright: ignore[reportMissingImports]
import numpy as np
from gguf.quants import dequantize
from safetensors.numpy import load_file

from scripts.peers.layout import counted, gguf_name, is_decoder_linear, paired_rows, rows_to_join, split_rows
from scripts.peers.peer import parser_of, source_tensors, timed, write_facts, write_plain

PACKAGES = ("llama-cpp-python", "gguf")


def rotary_heads(config: Mapping[str, Any], key: str) -> int | None:
    """The heads of a q or k projection, None for other tensors."""
    if ".q_proj." in key:
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if ".k_proj." in key else None


def joint(weight: np.ndarray, join: bool) -> int:
    """How many rows of a weight lie end to end in the file."""
    return rows_to_join(*weight.shape) if join and weight.ndim == 2 else 1


def write_gguf(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], join: bool) -> None:
    """Write the source as a GGUF file without a tokenizer: weights in float16, norms in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in tensors.items():
        heads = rotary_heads(config, key)
        lying = value if heads is None else paired_rows(value, heads)
        if value.ndim == 2:
            count = joint(value, join)
            lying = lying.reshape(value.shape[0] // count, -1)
        writer.add_tensor(gguf_name(key), lying if value.ndim == 2 else lying.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(squares: Path, tensors: Mapping[str, np.ndarray], join: bool) -> Any:
    """The importance matrix as the C API takes it: names, vectors, lengths, and an entry of nothing at the end."""
    found = load_file(squares)
    entries = (library.llama_model_imatrix_data * (len(found) + 1))()
    for entry, (linear, vector) in zip(entries, found.items(), strict=False):
        key = f"{linear}.weight"
        values = np.tile(vector, joint(tensors[key], join))
        held = (ctypes.c_float * len(values))(*values.tolist())
        entry.name, entry.size = gguf_name(key).encode(), len(values)
        entry.data = ctypes.cast(held, ctypes.POINTER(ctypes.c_float))
    return entries


def quantize(source: Path, target: Path, kind: str, matrix: Any) -> None:
    """Have llama.cpp quantize a file."""
    params = library.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    params.nthread = 1
    if matrix is not None:
        params.imatrix = matrix
    if library.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp did not quantize to {kind}; its message is above")


def read_back(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], ...]:
    """The dequantized tensors of a file and, by the same keys, how it holds them."""
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values, kinds = {}, {}
    for key, original in tensors.items():
        kinds[key] = held[gguf_name(key)]
        value = dequantize(kinds[key].data, kinds[key].tensor_type).reshape(original.shape)
        heads = rotary_heads(config, key)
        values[key] = value if heads is None else split_rows(value, heads)
    return values, kinds


def run(arguments: argparse.Namespace) -> None:
    """Write, quantize, read back."""
    config = json.loads((arguments.model / "config.json").read_text())
    tensors = source_tensors(arguments.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    source, target = arguments.out / "source.gguf", arguments.out / "quantized.gguf"
    write_gguf(source, config, tensors, arguments.join)
    matrix = importance(arguments.squares, tensors, arguments.join) if arguments.squares else None
    with timed() as timer:
        quantize(source, target, arguments.type, matrix)
    values, held = read_back(target, config, tensors)
    write_plain(arguments.model, arguments.out, values)
    linears = [tensor for key, tensor in held.items() if is_decoder_linear(key)]
    others = [tensor for key, tensor in held.items() if not is_decoder_linear(key) and tensors[key].ndim == 2]
    write_facts(
        arguments.out,
        timer,
        PACKAGES,
        file_bytes=target.stat().st_size,
        decoder_bytes=int(sum(tensor.n_bytes for tensor in linears)),
        note=f"{counted(t.tensor_type.name for t in linears)}; embedding {counted(t.tensor_type.name for t in others)}",
    )
    source.unlink()
    target.unlink()


def main() -> int:
    """Read the command line and run."""
    parser = parser_of("Quantize with llama.cpp.")
    parser.add_argument("--type", required=True, help="file type, such as Q3_K_M")
    parser.add_argument("--squares", type=Path, help="mean squares of the linears' inputs; without, no matrix is used")
    parser.add_argument("--join", action="store_true", help="lay rows end to end until they fit the blocks")
    run(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
