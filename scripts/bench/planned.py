"""Print the table of docs/performance.md on well-known models and named devices, from counts and not measured.

    python -m scripts.bench.planned
    python -m scripts.bench.planned --devices h100,rtx3090 --rows 115,19 --length 2048

`exl2jax plan FOLDER --device NAME` gives the same for any model of which FOLDER holds the config.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exl2jax.estimate import DeviceEstimate, Passes, device_estimate, find_device
from exl2jax.models import ModelConfig, read_config
from exl2jax.variants.recipe import find_recipe

LLAMA = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192, "num_key_value_heads": 8}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 8B": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"vocab_size": 128256},
    "Llama 70B": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"vocab_size": 128256},
    "Mixtral 8x7B": LLAMA
    | MIXTRAL
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"vocab_size": 32000},
}
"""Configurations by name: the shapes that their makers published."""

COLUMNS = ("", "device", "at least, minutes", "most of it", "device memory, GB", "hidden states, GB", "weights up, GB")


def config_of(shape: dict[str, Any]) -> ModelConfig:
    """The configuration of a shape, read as that of a model would be."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(COMMON | shape))
        return read_config(Path(folder))[0]


def lines(devices: Sequence[str], passes: Passes) -> Iterator[tuple[str, ...]]:
    """A line for every model and device: time, its largest part, memory, and the seconds of every part."""
    recipe = find_recipe("best")
    for name, shape in MODELS.items():
        config = config_of(shape)
        for device in devices:
            found = device_estimate(config, recipe, passes, find_device(device))
            yield (name, found.device, *_cells(found))


def _cells(found: DeviceEstimate) -> Iterator[str]:
    yield f"{found.total / 60:.3g}"
    yield found.bound
    yield f"{found.memory / 1e9:.1f}" + ("" if found.fits else ", too much")
    yield f"{found.streams / 1e9:.1f}" + (", stay" if found.streams_fit else ", cross the bus")
    yield f"{found.bytes_up / 1e9:.0f}"
    yield from (f"{seconds:.0f}" for seconds in found.seconds.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    standard = Passes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="h100,rtx4090", help="names that plan --device takes")
    parser.add_argument("--rows", default=f"{standard.rows},{standard.measurement_rows}", help="rows of both passes")
    parser.add_argument("--length", type=int, default=standard.length, help="tokens of a row")
    given = parser.parse_args(argv)
    rows, measured = (int(count) for count in given.rows.split(","))
    passes = Passes(rows=rows, measurement_rows=measured, length=given.length)
    parts = device_estimate(config_of(MODELS["Llama 8B"]), find_recipe("best"), passes, find_device("h100")).seconds
    head = (*COLUMNS, *(f"{part}, s" for part in parts))
    for line in (head, ("---",) * len(head), *lines(given.devices.split(","), passes)):
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
