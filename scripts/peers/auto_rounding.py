"""Quantize with AutoRound by its defaults, but on rows of our length and at most 64 of them.

.venv-peers/bin/python -m scripts.peers.auto_rounding --model demo/model --out FOLDER --tokens FILE --bits 4 --group 64

Its 200 steps for each block are many for a processor: `frontier.py` runs it only when it is named.
"""

import argparse
import sys

import torch  # pyright: ignore[reportMissingImports]
from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.peers.peer import calibration, grouped_parser_of, timed, write_packed

MOST_ROWS = 64


def run(arguments: argparse.Namespace) -> None:
    """Quantize, save in GPTQ's layout, read the codes back."""
    arguments.rows = min(arguments.rows, MOST_ROWS)
    rows = torch.from_numpy(calibration(arguments))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    packed = arguments.out / "packed"
    with timed() as timer:
        AutoRound(
            model,
            tokenizer,
            scheme=f"W{arguments.bits}A16",
            group_size=arguments.group,
            dataset=list(rows.split(1)),
            seqlen=rows.shape[1],
            nsamples=len(rows),
            device_map="cpu",
            **({} if arguments.steps is None else {"iters": arguments.steps}),
        ).quantize_and_save(str(packed), format="auto_gptq")
    folder = next(packed.rglob("*.safetensors")).parent
    write_packed(arguments, folder, timer, "auto-round", len(rows))


def main() -> int:
    """Read the command line and run."""
    parser = grouped_parser_of("Quantize with AutoRound.")
    parser.add_argument("--steps", type=int, help="steps for each block; the package's default unless given")
    torch.set_num_threads(1)
    run(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(main())
