"""Compute the reference logits of `tests/models/reference` with torch and transformers.

    .venv-parity/bin/python -m scripts.parity.reference --write     make them, leaving those alone that agree already
    .venv-parity/bin/python -m scripts.parity.reference --check     compare them; exit code 1 on a difference

Both also load what `dequantize` writes and compare its logits with ours, which `.venv` computes (case `dequantized`).
Run from the root of the repository, in the environment that `scripts/setup.sh parity` makes: `make parity-write` and
`make parity` do both. The demo model is read from `demo/model`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from exl2jax.testing.parity_cases import (
    DEMO_CASE,
    REFERENCE_DIR,
    TINY_CASES,
    ParityCase,
    kept_positions,
    make_input_ids,
)
from exl2jax.testing.tiny_model import weights_digest
from scripts.parity.stand_ins import auto_class, load_reference

DEMO_MODEL = Path("demo/model")
ROUNDING = 1e-4  # float32 logits of another processor or thread count stay within this
TOLERANCE = 1e-3  # between our float32 logits and those of torch, as in tests/models/test_parity.py
DEQUANTIZED = "dequantized"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "ml_dtypes")

Arrays = dict[str, Any]  # NumPy arrays by their name in the file


def versions() -> str:
    """The software that computes the logits, as JSON."""
    return json.dumps({"python": platform.python_version(), **{name: version(name) for name in PACKAGES}})


def reference_arrays(case: ParityCase, model_dir: Path) -> Arrays:
    """The arrays of one reference file, as `exl2jax/testing/parity_cases.py` describes them."""
    arrays = {
        "column_stride": np.array(case.stride),
        "weights_sha256": np.array(weights_digest(model_dir)),
        "versions": np.array(versions()),
    }
    for length in case.lengths:
        # A fresh model per length: dynamic rope scaling remembers the longest sequence it has seen.
        model = load_reference(model_dir)
        ids = make_input_ids(length, model.config.get_text_config().vocab_size)
        positions = kept_positions(length)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits[:, positions.tolist()]
        arrays[f"input_ids_{length}"] = ids
        arrays[f"positions_{length}"] = positions
        arrays[f"logits_{length}"] = logits[:, :, :: case.stride].numpy()
        arrays[f"logsumexp_{length}"] = logits.double().logsumexp(dim=-1).numpy()
    return arrays


def difference(fresh: Arrays, stored: Arrays) -> float:
    """Largest absolute difference of the logits; infinite where anything else differs (but for the versions)."""
    if fresh.keys() != stored.keys():
        return np.inf
    largest = 0.0
    for key, value in fresh.items():
        if key.startswith("log"):
            same_shape = value.shape == stored[key].shape
            largest = max(largest, float(np.abs(value - stored[key]).max()) if same_shape else np.inf)
        elif key != "versions" and not np.array_equal(value, stored[key]):
            return np.inf
    return largest


def settle(case: ParityCase, fresh: Arrays, *, write: bool) -> bool:
    """Compare one case with its file, or bring the file up to date; returns whether they agree then."""
    found = np.inf
    if case.reference.is_file():
        with np.load(case.reference) as stored:
            found = difference(fresh, dict(stored))
    if found <= ROUNDING:
        print(f"{case.name}: agrees, largest difference {found:.2g}")
        return True
    if write:
        REFERENCE_DIR.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(case.reference, **fresh)
        print(f"{case.name}: written, {case.reference.stat().st_size} bytes")
        return True
    reason = (
        f"largest difference {found:.2g}" if np.isfinite(found) else "no such reference, or of other weights or inputs"
    )
    print(f"{case.name}: DIFFERS, {reason}; after a wanted change run `make parity-write`")
    return False


def check_dequantized() -> bool:
    """Whether plain directories that `dequantize` wrote load, complete, and give our logits of the EXL2 directory."""
    well = True
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([".venv/bin/python", "-m", "scripts.parity.dequantized", folder], check=True)
        for stored in sorted(Path(folder).glob("*.npz")):
            plain = stored.with_suffix("")
            model, info = auto_class(json.loads((plain / "config.json").read_text())).from_pretrained(
                plain, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            with np.load(stored) as ours, torch.no_grad():
                logits = model(torch.from_numpy(ours["input_ids"].astype(np.int64)), use_cache=False).logits
                found = float(np.abs(logits.numpy() - ours["logits"]).max())
            amiss = {kind: sorted(names) for kind, names in info.items() if names}
            changed = changed_settings(stored.with_suffix(".source"), plain)
            agrees = found <= TOLERANCE and not amiss and not changed
            print(
                f"{DEQUANTIZED}: {stored.stem} {'agrees' if agrees else 'DIFFERS'}, largest difference {found:.2g}",
                *(part for part in (amiss, changed) if part),
            )
            well &= agrees
    return well


def changed_settings(source: Path, plain: Path) -> dict[str, tuple[Any, Any]]:
    """Keys that `transformers` reads differently from the source's config and the plain one, but for head and dtype."""
    before, after = (dict(_settings(AutoConfig.from_pretrained(path).to_dict())) for path in (source, plain))
    return {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif key not in ("dtype", "tie_word_embeddings", "_name_or_path"):
            yield f"{prefix}{key}", value


def run(names: list[str], *, write: bool) -> bool:
    """Compare or write all cases, or those named; returns whether all agree."""
    well = check_dequantized() if not names or DEQUANTIZED in names else True
    for case in TINY_CASES:
        if names and case.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            well &= settle(case, reference_arrays(case, case.write(Path(folder))), write=write)
    if names and DEMO_CASE.name not in names:
        return well
    if not (DEMO_MODEL / "config.json").is_file():
        print(f"{DEMO_CASE.name}: {DEMO_MODEL} is not there; build it with `make demo-model`")
        return False
    fresh = reference_arrays(DEMO_CASE, DEMO_MODEL)
    return settle(DEMO_CASE, fresh, write=write) and well


def main() -> int:
    """Read the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compute reference logits with torch and transformers.")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the references that are missing or differ")
    mode.add_argument("--check", action="store_true", help="only compare; exit code 1 on a difference")
    parser.add_argument("cases", nargs="*", help="names of cases; all if none is given")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    return 0 if run(args.cases, write=args.write) else 1


if __name__ == "__main__":
    sys.exit(main())
