"""Compare a finished directory in stock ExLlamaV2 with this package: whether it loads, predictions, differences.

    python -m scripts.gpu.stock build                       compile stock's kernels, nothing else
    python -m scripts.gpu.stock compare RESULT.json EXL2 ROWS.safetensors [--diagnose PLAIN]

Stock and torch are imported here only: the package needs neither. `build` takes minutes and no GPU. `compare` writes
both perplexities first, then how every linear's weight and the hidden states after every module compare. With
`--diagnose` it goes on with the perplexities of a plain float16 directory, and then with those that other settings of
stock give.

Without flash-attn and xformers, stock 0.3.2 runs torch's SDPA and passes it no causal mask: every token sees the tokens
after it. `no_sdpa` selects stock's own product of matrices, which is masked; the perplexity that counts is measured
with it.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

AGREEMENT = 0.005
"""Relative difference of the two perplexities at most."""

HALF_PRECISION = 0.05
"""Relative error of hidden states that float16 may explain: stock keeps them in it, this package in float32."""

MASKED: Mapping[str, Any] = {"no_sdpa": True}
"""Settings of stock under which attention is causal."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "without a mask": {},
    "mask handed to SDPA": {"own_mask": True},
    "without a cache": {**MASKED, "cached": False},
    "without graphs": {**MASKED, "no_graphs": True},
    "in two parts": {**MASKED, "parts": 2},
}
"""Other ways to run stock; the first is its default, the others should agree with `MASKED`."""


def build() -> float:
    """Compile stock's extension, which importing it does: seconds."""
    begun = time.perf_counter()
    __import__("exllamav2")
    return time.perf_counter() - begun


@contextmanager
def loaded(
    directory: Path, length: int, *, no_sdpa: bool = False, no_graphs: bool = False, parts: int = 1
) -> Iterator[Any]:
    """A directory loaded in stock, for rows of `length` tokens that go through in so many parts."""
    import exllamav2  # type: ignore[import-not-found]

    config = exllamav2.ExLlamaV2Config(str(directory))
    config.max_seq_len, config.max_input_len = length, length // parts
    config.no_sdpa, config.no_graphs = no_sdpa, no_graphs
    model = exllamav2.ExLlamaV2(config)
    model.load()
    try:
        yield model
    finally:
        model.unload()


def causal_parameters(length: int) -> Any:
    """Stock's parameters of attention with a causal mask in the one place where its SDPA looks for a mask."""
    import torch  # type: ignore[import-not-found]
    from exllamav2.attn_params import Params  # type: ignore[import-not-found]

    parameters = Params(1, length, 0, None, None)
    parameters.block_diag_mask = torch.full((length, length), -65504.0).triu(1).half().cuda()
    return parameters


def perplexity(
    directory: Path, ids: np.ndarray, *, cached: bool = True, own_mask: bool = False, **settings: Any
) -> float:
    """Stock's perplexity of rows `[R, T]`, rows apart, first token of a row not predicted."""
    import exllamav2  # type: ignore[import-not-found]
    import torch  # type: ignore[import-not-found]

    losses = []
    with loaded(directory, ids.shape[1], **settings) as model, torch.inference_mode():
        cache = exllamav2.ExLlamaV2Cache(model, max_seq_len=ids.shape[1]) if cached else None
        more = {"attn_params": causal_parameters(ids.shape[1])} if own_mask else {}
        for row in ids:
            if cache is not None:
                cache.current_seq_len = 0
            tokens = torch.tensor(row[None], dtype=torch.long)
            logits = model.forward(tokens, cache, **more)[0, :-1, : model.config.vocab_size].float()
            chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None].to(logits.device))
            losses.append(-chosen.double().mean().item())
    return math.exp(sum(losses) / len(losses))


SHUFFLED = {"gate_proj": 1, "up_proj": 1, "down_proj": 0}
"""Axis along which stock reorders a linear of an MLP as it loads: the order of `down_proj` moves into the other two."""


def digest(weight: np.ndarray, name: str = "") -> str:
    """Digest of a weight `[K, N]` in float16; the order along the axis that stock shuffles in `name` does not count."""
    axis = SHUFFLED.get(name.rpartition(".")[2])
    half = np.asarray(weight, np.float16)
    lines = [half] if axis is None else list(np.moveaxis(half, axis, 0))
    return hashlib.sha256(b"".join(sorted(np.ascontiguousarray(line).tobytes() for line in lines))).hexdigest()


def weights_compared(model: Any, ours: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The number of linears that stock dequantizes to the same bits, and the names of the others."""
    different = []
    for name, columns, expected in zip(ours["linears"], ours["columns"], ours["digests"], strict=True):
        weight = model.modules_dict[str(name)].get_weight_tensor_dq()[:, : int(columns)]
        if digest(weight.cpu().numpy(), str(name)) != expected:
            different.append(str(name))
    return {"equal": len(ours["linears"]) - len(different), "of": len(ours["linears"]), "different": different}


def states_compared(model: Any, ids: np.ndarray, ours: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Errors of the hidden states of one row after every module, and the first module that differs."""
    import torch  # type: ignore[import-not-found]

    count = len(ours["states"])
    tokens = torch.tensor(ids[:1], dtype=torch.long)
    # Stock gives the states before a module.
    before = model.forward_chunk(tokens, extract_state_indices=list(range(1, count + 1)))["states"]
    states = [before[i][0].float().cpu().numpy() for i in range(1, count + 1)]
    errors = {str(n): state_error(*pair) for n, *pair in zip(ours["modules"], states, ours["states"], strict=True)}
    return {"first that differs": first_that_differs(errors), "errors": errors}


def state_error(states: np.ndarray, expected: np.ndarray) -> float:
    """Mean over the tokens of the relative error of their states `[T, D]`; few tokens hold nearly all of the norm."""
    errors = np.linalg.norm(states - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(errors.mean())


def first_that_differs(errors: Mapping[str, float]) -> str | None:
    """The first module whose error half precision does not explain; NaN is such an error."""
    return next((name for name, error in errors.items() if not error <= HALF_PRECISION), None)


def run_ours(*arguments: str) -> str:
    """The output of a command of this package, run in its own process: torch and JAX each bring CUDA libraries."""
    return subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def our_perplexity(directory: Path, rows: Path) -> float:
    """The package's perplexity of a directory."""
    return json.loads(run_ours("exl2jax", "eval", str(directory), "--tokens", str(rows), "--json"))["perplexity"]


def agreement(stock: float, ours: float) -> dict[str, Any]:
    """Two perplexities, and whether they agree."""
    difference = stock / ours - 1
    return {"stock": stock, "exl2jax": ours, "difference": difference, "agree": abs(difference) <= AGREEMENT}


def attempted(directory: Path, ids: np.ndarray, settings: Mapping[str, Any]) -> float | str:
    """Stock's perplexity under some settings, or the error, so that the other settings are still tried."""
    try:
        return perplexity(directory, ids, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compared(directory: Path, rows: Path, plain: Path | None) -> Iterator[dict[str, Any]]:
    """The result so far, after each step: both perplexities first, then where a difference comes from."""
    import torch  # type: ignore[import-not-found]

    ids = load_file(rows)["input_ids"]
    found: dict[str, Any] = {"tokens": int(ids.shape[0] * (ids.shape[1] - 1))}
    found |= agreement(perplexity(directory, ids, **MASKED), our_perplexity(directory, rows))
    yield found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.npz"
        run_ours("scripts.gpu.ours", str(path), str(directory), str(rows))
        with np.load(path) as file:
            ours = dict(file)
    with loaded(directory, ids.shape[1], **MASKED) as model, torch.inference_mode():
        yield (found := found | {"linears": weights_compared(model, ours)})
        yield (found := found | {"modules": states_compared(model, ids, ours)})
    if plain is not None:
        yield (found := found | {"plain": agreement(perplexity(plain, ids, **MASKED), our_perplexity(plain, rows))})
        for name, settings in SETTINGS.items():
            others = found.get("settings", {}) | {name: attempted(directory, ids, settings)}
            yield (found := found | {"settings": others})


def main(argv: Sequence[str] | None = None) -> int:
    """Build, or compare: 0 where the perplexities agree and every weight is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    comparing = commands.add_parser("compare")
    comparing.add_argument("result", type=Path)
    comparing.add_argument("directory", type=Path)
    comparing.add_argument("rows", type=Path)
    comparing.add_argument("--diagnose", type=Path, help="float16 directory to compare as well")
    given = parser.parse_args(argv)
    if given.command == "build":
        print(f"built in {build():.0f} s")
        return 0
    found: dict[str, Any] = {}
    for found in compared(given.directory, given.rows, given.diagnose):
        given.result.write_text(json.dumps(found, indent=1))
    return int(not (found["agree"] and not found["linears"]["different"]))


if __name__ == "__main__":
    sys.exit(main())
