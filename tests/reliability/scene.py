"""The conversion that is harmed: a tiny model, two passes over four modules, a checkpoint after each."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, convert
from exl2jax.testing.tiny_model import write_tiny_llama

ROWS, LENGTH = 4, 32


@dataclass(frozen=True)
class Scene:
    """A source model and its calibration rows; a base directory holds `work` and `exl2` of one conversion."""

    model: Path
    tokens: Path

    def config(self, base: Path, **changes: Any) -> ConversionConfig:
        settings: dict[str, Any] = {
            "in_dir": self.model,
            "out_dir": base / "work",
            "compile_full": base / "exl2",
            "cal_dataset": str(self.tokens),
            "bits": 4.5,
            "dataset_rows": ROWS,
            "measurement_rows": 2,
            "checkpoint_interval": 0,
        }
        return ConversionConfig(**settings | changes)

    def command(self, base: Path) -> list[str]:
        """The arguments of `exl2jax` for the same conversion."""
        flags = ["convert", "-i", self.model, "-o", base / "work", "-cf", base / "exl2", "-c", self.tokens]
        flags += ["-b", 4.5, "-r", ROWS, "-mr", 2, "--checkpoint-interval", 0]
        return [str(flag) for flag in flags]

    def run(self, base: Path) -> None:
        """Convert, or resume."""
        convert(self.config(base))


def make_scene(home: Path) -> Scene:
    home.mkdir(parents=True, exist_ok=True)
    model = write_tiny_llama(home / "model", seed=3)
    tokens = home / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(5).integers(0, 300, (ROWS, LENGTH)).astype(np.int64)}, tokens)
    return Scene(model, tokens)


def outcome(base: Path) -> dict[str, str]:
    """SHA-256 of every file that a conversion leaves; times and the place itself are taken out of the job file."""
    found = {}
    for path in sorted(p for p in base.rglob("*") if p.is_file() and p.name != ".lock"):
        content = path.read_bytes()
        if path.name == "job_new.json":
            record = json.loads(content.replace(str(base).encode(), b"BASE"))
            record["records"].pop("seconds", None)
            record["records"].get("summary", {}).pop("seconds", None)
            record.pop("sha256")
            content = json.dumps(record, sort_keys=True).encode()
        found[str(path.relative_to(base))] = hashlib.sha256(content).hexdigest()
    return found


def differences(base: Path, expected: dict[str, str]) -> list[str]:
    """Files that are missing, left over or different from an undisturbed run's."""
    found = outcome(base)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def fresh(base: Path) -> Path:
    """An empty base directory."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    return base
