"""Whether a finished directory loads in stock ExLlamaV2 and predicts there as it does here.

    python -m scripts.gpu.stock build                       compile stock's kernels, nothing else
    python -m scripts.gpu.stock compare RESULT.json EXL2 ROWS.safetensors

Stock and torch are imported here only: the package needs neither. `build` takes minutes and no GPU.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

AGREEMENT = 0.005
"""Relative difference of the two perplexities at most."""


def build() -> float:
    """Compile stock's extension, which importing it does: seconds."""
    begun = time.perf_counter()
    __import__("exllamav2")
    return time.perf_counter() - begun


def stock_perplexity(directory: Path, ids: np.ndarray) -> float:
    """Perplexity of rows `[R, T]`, rows apart, first token of a row not predicted."""
    import exllamav2  # type: ignore[import-not-found]
    import torch  # type: ignore[import-not-found]

    config = exllamav2.ExLlamaV2Config(str(directory))
    config.max_seq_len = config.max_input_len = ids.shape[1]
    model = exllamav2.ExLlamaV2(config)
    model.load()
    cache = exllamav2.ExLlamaV2Cache(model, max_seq_len=ids.shape[1])
    losses = []
    with torch.inference_mode():
        for row in ids:
            cache.current_seq_len = 0
            tokens = torch.tensor(row[None], dtype=torch.long)
            logits = model.forward(tokens, cache)[0, :-1, : config.vocab_size].float()
            chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None].to(logits.device))
            losses.append(-chosen.double().mean().item())
    return math.exp(sum(losses) / len(losses))


def compare(directory: Path, rows: Path) -> dict[str, Any]:
    """Both perplexities of a directory, and whether they agree."""
    ids = load_file(rows)["input_ids"]
    theirs = stock_perplexity(directory, ids)
    # In a process of its own: torch and JAX each bring libraries of CUDA.
    command = [sys.executable, "-m", "exl2jax", "eval", str(directory), "--tokens", str(rows), "--json"]
    ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)["perplexity"]
    difference = theirs / ours - 1
    return {
        "tokens": int(ids.shape[0] * (ids.shape[1] - 1)),
        "stock": theirs,
        "exl2jax": ours,
        "difference": difference,
        "agree": abs(difference) <= AGREEMENT,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Build, or compare: 0 where the perplexities agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    comparing = commands.add_parser("compare")
    comparing.add_argument("result", type=Path)
    comparing.add_argument("directory", type=Path)
    comparing.add_argument("rows", type=Path)
    given = parser.parse_args(argv)
    if given.command == "build":
        print(f"built in {build():.0f} s")
        return 0
    found = compare(given.directory, given.rows)
    given.result.write_text(json.dumps(found, indent=1))
    return int(not found["agree"])


if __name__ == "__main__":
    sys.exit(main())
