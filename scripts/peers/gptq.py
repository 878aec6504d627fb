"""Quantize with GPTQModel by its defaults: symmetric, groups in the inputs' order, its group-aware reordering.

.venv-peers/bin/python -m scripts.peers.gptq --model demo/model --out FOLDER --tokens FILE --bits 4 --group 32
"""

import argparse
import os
import sys

import torch  # pyright: ignore[reportMissingImports]

from scripts.peers.peer import calibration, grouped_parser_of, timed, write_packed

WORKERS = "2"
"""On two processors the package would start one worker and then miss the two that load a model."""


def run(arguments: argparse.Namespace) -> None:
    """Quantize, save, read the codes back."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", WORKERS)
    from gptqmodel import GPTQConfig, GPTQModel  # pyright: ignore[reportMissingImports]

    arguments.model, arguments.out = arguments.model.resolve(), arguments.out.resolve()
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calibration(arguments)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.out)  # the package writes its logs where it runs
    config = GPTQConfig(bits=arguments.bits, group_size=arguments.group)
    model = GPTQModel.load(str(arguments.model), config, device="cpu", dtype=torch.float16)
    with timed() as timer:
        model.quantize(rows, batch_size=1)
    packed = arguments.out / "packed"
    model.save(str(packed))
    write_packed(arguments, packed, timer, "gptqmodel", len(rows))


def main() -> int:
    """Read the command line and run."""
    torch.set_num_threads(1)
    run(grouped_parser_of("Quantize with GPTQModel.").parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
