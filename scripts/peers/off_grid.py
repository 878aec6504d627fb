"""A model with the demo model's function and weights that lie on no grid.

    python -m scripts.peers.off_grid demo/model build/off-grid

The demo model's weights come from a file of type Q4_1: any 32 neighbours in a row take one of 16 evenly spaced values.
A format with the same blocks and levels, such as Q4_K, finds that grid again and loses almost nothing, which it would
not do with other models. Here every input channel of every linear is multiplied by a random factor between 0.7 and
1.4, and what feeds the channel is divided by it: the norm before q, k, v, gate and up, the rows of v before o, and the
rows of up before down. The function is the same up to the rounding of float16.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SEED = 20


def off_grid(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], seed: int = SEED) -> dict[str, np.ndarray]:
    """The tensors of a Llama with random factors between its linears, float32."""
    generator = np.random.default_rng(seed)
    found = {name: value.astype(np.float32) for name, value in tensors.items()}
    shared = config["num_attention_heads"] // config["num_key_value_heads"]

    def scale(feeding: str, fed: tuple[str, ...], repeats: int = 1) -> None:
        rows = len(found[f"{feeding}.weight"])
        factors = np.exp2(generator.uniform(-0.5, 0.5, rows)).astype(np.float32)
        found[f"{feeding}.weight"] /= factors.reshape(-1, *[1] * (found[f"{feeding}.weight"].ndim - 1))
        head = factors.reshape(config["num_key_value_heads"], -1) if repeats > 1 else factors[None]
        for name in fed:
            found[f"{name}.weight"] *= np.repeat(head, repeats, axis=0).reshape(1, -1)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention = [f"{at}.self_attn.{name}_proj" for name in "qkvo"]
        gate, up, down = (f"{at}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        scale(f"{at}.input_layernorm", tuple(attention[:3]))
        scale(attention[2], (attention[3],), shared)
        scale(f"{at}.post_attention_layernorm", (gate, up))
        scale(up, (down,))
    return found


def write_off_grid(model: Path, out: Path) -> None:
    """Write the model at `out` in the number format of the source."""
    tensors = load_file(model / "model.safetensors")
    changed = off_grid(tensors, json.loads((model / "config.json").read_text()))
    out.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, out / path.name)
    kept = {name: value.astype(tensors[name].dtype) for name, value in changed.items()}
    save_file(kept, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description="Write a model of the same function, its weights on no grid.")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_off_grid(arguments.model, arguments.out)


if __name__ == "__main__":
    main()
