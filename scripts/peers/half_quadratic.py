"""Quantize with HQQ (half-quadratic quantization), which needs no calibration rows.

.venv-peers/bin/python -m scripts.peers.half_quadratic --model demo/model --out FOLDER --bits 3 --group 64
"""

import argparse
import sys

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file

from scripts.peers.layout import is_decoder_linear
from scripts.peers.peer import grouped_parser_of, source_tensors, timed, write_facts, write_plain


def quantize(weight: np.ndarray, bits: int, group: int) -> HQQLinear:
    """One linear, by the package's defaults: zeros and scales in float16, groups along the inputs."""
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = torch.from_numpy(weight.astype(np.float32))
    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", initialize=True)


def parts_of(layer: HQQLinear) -> dict[str, np.ndarray]:
    """The arrays that are stored of a quantized linear."""
    held = {"qweight": layer.W_q, "scale": layer.meta["scale"], "zero": layer.meta["zero"]}
    return {name: value.detach().cpu().contiguous().numpy() for name, value in held.items()}


def run(arguments: argparse.Namespace) -> None:
    """Quantize every linear of the decoder; embedding, norms and head stay in float16."""
    tensors = source_tensors(arguments.model)
    linears = {key: value for key, value in tensors.items() if is_decoder_linear(key)}
    with timed() as timer:
        layers = {key: quantize(value, arguments.bits, arguments.group) for key, value in linears.items()}
    values = {key: layer.dequantize().float().numpy() for key, layer in layers.items()}
    write_plain(arguments.model, arguments.out, values)
    stored = {key: value for key, value in tensors.items() if key not in linears}
    decoder_bytes = 0
    for key, layer in layers.items():
        parts = parts_of(layer)
        decoder_bytes += sum(value.nbytes for value in parts.values())
        stored |= {f"{key.removesuffix('weight')}{name}": value for name, value in parts.items()}
    path = arguments.out / "quantized.safetensors"
    save_file(stored, path)
    write_facts(
        arguments.out,
        timer,
        ("hqq", "torch"),
        file_bytes=path.stat().st_size,
        decoder_bytes=decoder_bytes,
        note="embedding float16",
    )


def main() -> int:
    """Read the command line and run."""
    torch.set_num_threads(1)
    run(grouped_parser_of("Quantize with HQQ.").parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
