"""Builders of small source directories with one odd property each, as people bring them to a converter.

Every model is a tiny random Llama of the same sizes, so that compiled programs serve all of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from exl2jax.testing.tiny_model import write_tiny_llama

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VOCABULARY, HIDDEN, LAYERS = 320, 64, 2
STALE_SEED, SEED = 1, 2

type Tensors = dict[str, np.ndarray]


def base(path: Path, *, seed: int = SEED, **options: Any) -> Path:
    """The sound model that each input departs from."""
    sizes = {"hidden_size": HIDDEN, "num_layers": LAYERS, "vocab_size": VOCABULARY}
    return write_tiny_llama(path, seed=seed, **{"tie": False, **sizes, **options})


def edit_tensors(path: Path, change: Callable[[Tensors], Tensors], file: str = WEIGHTS) -> None:
    """Rewrite a weight file."""
    save_file(change(load_file(path / file)), path / file, metadata={"format": "pt"})


def edit_json(path: Path, file: str = CONFIG, **changes: Any) -> None:
    """Lay values over a JSON file."""
    record = json.loads((path / file).read_text(encoding="utf-8"))
    (path / file).write_text(json.dumps({**record, **changes}), encoding="utf-8")


def edited(change: Callable[[Tensors], Tensors], **options: Any) -> Callable[[Path], object]:
    """A builder: the sound model with other tensors."""
    return lambda path: edit_tensors(base(path, **options), change)


def configured(**changes: Any) -> Callable[[Path], object]:
    """A builder: the sound model with other settings."""
    return lambda path: edit_json(base(path), **changes)


def random_head(scale: float = 0.2) -> np.ndarray:
    """A trained head, which is no copy of the embedding."""
    return (np.random.default_rng(7).standard_normal((VOCABULARY, HIDDEN)) * scale).astype(np.float16)


def slow_tokenizer(path: Path) -> None:
    base(path)
    model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])
    (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (path / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def sentence_piece(path: Path) -> None:
    """A model with `tokenizer.model` alone, in the form of sentencepiece."""
    base(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink()
    (path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def write_index(path: Path, names: list[str]) -> dict[str, str]:
    """An index of two shards over the names; returns the shard of each."""
    half = len(names) // 2
    where = {name: f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i, name in enumerate(names)}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return where


def stale_index(path: Path) -> None:
    """Shards of an older model and their index beside the whole file of the newer one."""
    base(path, seed=STALE_SEED)
    old = load_file(path / WEIGHTS)
    base(path)
    where = write_index(path, sorted(old))
    for shard in set(where.values()):
        save_file({name: old[name] for name, s in where.items() if s == shard}, path / shard)


def index_without_shards(path: Path) -> None:
    base(path)
    write_index(path, sorted(load_file(path / WEIGHTS)))


def linked_files(path: Path) -> None:
    """Tokenizer and weights as links into a store outside of the directory."""
    base(path)
    store = path.parent / f"{path.name}-store"
    store.mkdir()
    for i, name in enumerate(("tokenizer.json", WEIGHTS)):
        (path / name).rename(store / f"blob{i}")
        (path / name).symlink_to(store / f"blob{i}")


def adapter_beside(path: Path) -> None:
    base(path)
    adapter(path)


def adapter(path: Path) -> None:
    """A low-rank adapter and its settings."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (8, HIDDEN), "B": (HIDDEN, 8)}
    save_file({name.format(x): np.ones(s, np.float16) for x, s in shapes.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}', encoding="utf-8")


def adapter_only(path: Path) -> None:
    adapter_beside(path)
    (path / WEIGHTS).unlink()


def stored_layers(path: Path) -> None:
    """Four layers stored where the config says two."""
    edit_json(base(path, num_layers=LAYERS + 2), num_hidden_layers=LAYERS)


def head_norms(tensors: Tensors) -> Tensors:
    names = [f"model.layers.{i}.self_attn.{n}.weight" for i in range(LAYERS) for n in ("q_norm", "k_norm")]
    return tensors | dict.fromkeys(names, np.full(16, 3, np.float16))


def packed_weights(path: Path) -> None:
    """A model in GPTQ's form."""
    edit_json(base(path), quantization_config={"quant_method": "gptq", "bits": 4})

    def pack(tensors: Tensors) -> Tensors:
        packed = {name for name in tensors if "_proj.weight" in name}
        words = {name.replace(".weight", ".qweight"): np.zeros((HIDDEN // 8, 96), np.int32) for name in packed}
        return {name: tensor for name, tensor in tensors.items() if name not in packed} | words

    edit_tensors(path, pack)


def pointer(path: Path) -> None:
    """The text that stands for the weights in a clone without large files."""
    text = f"version https://git-lfs.example/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (base(path) / WEIGHTS).write_text(text, encoding="utf-8")


def second_copy(path: Path) -> None:
    """The shards of one library, and the same weights under another library's names, without an index."""
    base(path)
    (path / WEIGHTS).rename(path / "model-00001-of-00001.safetensors")
    save_file(
        {"tok_embeddings.weight": random_head(), "output.weight": random_head()}, path / "consolidated.safetensors"
    )


def added_tokens(path: Path) -> None:
    """A tokenizer with tokens that were added after the embedding was made."""
    base(path)
    record = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    extra = [
        {"id": VOCABULARY + i, "content": f"<extra{i}>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in range(4)
    ]
    fill = {f"<fill{i}>": i for i in range(len(record["model"]["vocab"]), VOCABULARY)}
    record["model"]["vocab"] |= fill
    record["added_tokens"] += extra
    (path / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")


def unknown_windows(path: Path) -> None:
    """A model whose config names sliding layers that its architecture does not have."""
    edit_json(base(path), sliding_window=32, layer_types=["sliding_attention", "full_attention"])


def broken_link(path: Path) -> None:
    base(path)
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").symlink_to(path / "gone")
