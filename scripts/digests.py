"""Print the SHA-256 of everything that fixed conversions write, to compare two states of the code byte for byte.

    python scripts/digests.py > after.txt            the package that Python finds first
    PYTHONPATH=OTHER_CHECKOUT python scripts/digests.py > before.txt
    diff before.txt after.txt

Each conversion runs the command in a process of its own on a tiny model made here from a fixed seed, one for every
preset, and on the demo model where `demo/model` was built. Rows are random ids, so that the result does not depend on
a text or on the version of a tokenizer. The version of the package is part of a job's inputs, but not of these files.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "demo" / "model"
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCAB = 64, 160, 2, 4, 256
CONVERSIONS = {
    "best": ("--preset", "best", "-b", "3.2"),
    "fast": ("--preset", "fast", "-b", "4.5"),
    "stock": ("--preset", "stock", "-b", "4.0"),
    "annealing": ("--preset", "stock", "--variant", "solver=annealing", "-b", "4.0"),
    "one-scale": ("--preset", "best", "--variant", "scales=stock", "-b", "5.0"),
}
DEMO = ("--preset", "best", "-b", "4.0")


def write_model(folder: Path) -> Path:
    """A Llama in float16 with fixed random weights and a tokenizer of one token for each byte."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(7)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (INTERMEDIATE, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{at}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    tensors = {
        name: (1 + 0.1 * random.normal(size=shape) if len(shape) == 1 else random.normal(size=shape) * 0.08)
        for name, shape in shapes.items()
    }
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {chr(0x100 + i): i for i in range(VOCAB)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def convert(model: Path, rows: Path, home: Path, flags: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the measurement and of every shard that one conversion writes, by file name."""
    work, out = home / "work", home / "exl2"
    exl2jax = [sys.executable, "-P", "-m", "exl2jax"]
    command = [*exl2jax, "convert", "-i", model, "-o", work, "-cf", out, "-c", rows, *flags]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    files = [work / "measurement.json", *sorted(out.glob("*.safetensors"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_rows(path: Path, vocab: int, rows: int, length: int) -> Path:
    """Random token rows from a fixed seed."""
    ids = np.random.default_rng(11).integers(2, vocab, (rows, length))
    save_file({"input_ids": ids.astype(np.int64)}, path)
    return path


def main() -> None:
    """Convert everything and print a line for every file."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tiny = write_model(home / "tiny")
        rows = write_rows(home / "tiny.rows.safetensors", VOCAB, rows=4, length=48)
        jobs = {name: (tiny, rows, (*flags, "-r", "4", "-mr", "2")) for name, flags in CONVERSIONS.items()}
        if DEMO_MODEL.is_dir():
            vocab = json.loads((DEMO_MODEL / "config.json").read_text())["vocab_size"]
            demo_rows = write_rows(home / "demo.rows.safetensors", vocab, rows=4, length=128)
            jobs["demo"] = (DEMO_MODEL, demo_rows, (*DEMO, "-r", "4", "-mr", "2"))
        for name, (model, tokens, flags) in jobs.items():
            for file, digest in convert(model, tokens, home / name, flags).items():
                print(f"{digest}  {name}/{file}", flush=True)


if __name__ == "__main__":
    main()
