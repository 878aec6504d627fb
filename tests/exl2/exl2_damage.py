"""Kinds of damage to a tiny EXL2 directory, and the names that `verify` has to give each."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.exl2.exl2_dir import (
    HIDDEN,
    LAYERS,
    LINEARS,
    PADDED_VOCABULARY,
    SHARDS,
    VOCABULARY,
    add_tensors,
    edit_config,
    edit_tensors,
    shard_of,
)

Q, K_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
GATE, DOWN, HEAD_KEY = "model.layers.1.mlp.gate_proj", "model.layers.0.mlp.down_proj", "lm_head"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.layers.1.post_attention_layernorm.weight"
CONFIG = "config.json"
BIASED = tuple(f"model.layers.{i}.self_attn.{n}_proj.bias" for i in range(LAYERS) for n in "qkvo")

Damage = Callable[[Path], object]


def edit(changes: dict[str, Callable[[np.ndarray], np.ndarray] | None]) -> Damage:
    return lambda directory: edit_tensors(directory, changes)


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return edit({name: function})


def put(name: str, index: int | tuple[Any, ...], value: float) -> Damage:
    """One entry of a tensor overwritten."""

    def apply(tensor: np.ndarray) -> np.ndarray:
        tensor[index] = value
        return tensor

    return change(name, apply)


def drop(*tensors: str) -> Damage:
    return edit(dict.fromkeys(tensors))


def drop_linear(key: str) -> Damage:
    return drop(*(f"{key}.{n}" for n in ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")))


def cast(name: str, dtype: type) -> Damage:
    return change(name, lambda t: t.astype(dtype))


def config(**changes: Any) -> Damage:
    return lambda directory: edit_config(directory, changes)


def quantization(entry: str, value: Any) -> Damage:
    return lambda directory: edit_config(directory, {f"quantization_config.{entry}": value})


def add(file: str, **tensors: np.ndarray) -> Damage:
    return lambda directory: add_tensors(directory, file, tensors)


def overwrite(file: str, function: Callable[[bytes], bytes]) -> Damage:
    return lambda directory: (directory / file).write_bytes(function((directory / file).read_bytes()))


def swap(name: str, a: int, b: int) -> Damage:
    def apply(tensor: np.ndarray) -> np.ndarray:
        tensor[[a, b]] = tensor[[b, a]]
        return tensor

    return change(name, apply)


def fill(file: str, make: Callable[[Path], object]) -> Damage:
    """A file of the directory removed and something else put in its place."""

    def apply(directory: Path) -> None:
        (directory / file).unlink()
        make(directory / file)

    return apply


def copy_tensor(name: str, file: str) -> Damage:
    return lambda d: add_tensors(d, file, {name: load_file(shard_of(d, name))[name]})


def without_shards(directory: Path) -> None:
    for shard in SHARDS:
        (directory / shard).unlink()


def merge_last_groups(key: str) -> Damage:
    """The last two groups made one, in all three tensors that count groups."""
    return edit(
        {
            f"{key}.q_groups": lambda t: t[:-2],
            f"{key}.q_scale_max": lambda t: t[:-1],
            f"{key}.q_scale": lambda t: t[:-1],
        }
    )


def source_shard(directory: Path) -> None:
    tensors = {f"{key}.weight": np.zeros((HIDDEN, HIDDEN), np.float16) for key in (Q, GATE)}
    add_tensors(directory, "model-00001-of-00002.safetensors", tensors)


def five(key: str) -> set[str]:
    return {f"{key}.{n}" for n in ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")}


def layer_names(i: int, *, stored: bool) -> set[str]:
    """The contents of a layer: its norms, and its linears by tensor if `stored`, else by name; biases by tensor."""
    prefix = f"model.layers.{i}"
    keys = [f"{prefix}.{name}" for name in LINEARS]
    linears = set().union(*map(five, keys)) if stored else set(keys)
    norms = {f"{prefix}.{n}_layernorm.weight" for n in ("input", "post_attention")}
    return linears | norms | {f"{prefix}.self_attn.{n}_proj.bias" for n in "qkvo"}


# Damage and the exact set of names that must be reported, no other tensor accused.
FILES: dict[str, tuple[Damage, Iterable[str]]] = {
    "tensor in two files": (copy_tensor(f"{Q}.q_scale", "more.safetensors"), {f"{Q}.q_scale"}),
    "norm in two files": (copy_tensor(NORM, "model.safetensors"), {NORM}),
    "left-over source shard": (
        source_shard,
        {"model-00001-of-00002.safetensors", f"{Q}.weight", f"{GATE}.weight"},
    ),
    "unquantized weight beside the codes": (
        add(SHARDS[0], **{f"{DOWN}.weight": np.zeros((HIDDEN, 256), np.float16)}),
        {f"{DOWN}.weight"},
    ),
    "unquantized head": (
        add(SHARDS[1], **{"lm_head.weight": np.zeros((VOCABULARY, HIDDEN), np.float16)}),
        {"lm_head.weight"},
    ),
    "unknown tensor": (
        add(SHARDS[0], **{"model.rotary_emb.inv_freq": np.zeros(16, np.float32)}),
        {"model.rotary_emb.inv_freq"},
    ),
    "unknown tensor of a linear": (add(SHARDS[0], **{f"{Q}.g_idx": np.zeros(HIDDEN, np.int32)}), {f"{Q}.g_idx"}),
    "calibration rows left behind": (
        add("cal_data.safetensors", input_ids=np.zeros((2, 8), np.int64)),
        {"input_ids"},
    ),
    "empty extra file": (lambda d: (d / "extra.safetensors").touch(), {"extra.safetensors"}),
    "directory named like a shard": (lambda d: (d / "extra.safetensors").mkdir(), {"extra.safetensors"}),
    "dangling link": (lambda d: (d / "extra.safetensors").symlink_to(d / "gone"), {"extra.safetensors"}),
    "text in place of a shard": (
        lambda d: (d / "extra.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        {"extra.safetensors"},
    ),
}

SETTINGS: dict[str, tuple[Damage, Iterable[str]]] = {
    "no config": (lambda d: (d / CONFIG).unlink(), {CONFIG}),
    "config cut short": (overwrite(CONFIG, lambda b: b[: len(b) // 2]), {CONFIG}),
    "config not an object": (overwrite(CONFIG, lambda _: b"[]"), {CONFIG}),
    "config not text": (overwrite(CONFIG, lambda _: b"\xff\xfe\x00"), {CONFIG}),
    "config nested without end": (overwrite(CONFIG, lambda _: b"[" * 200_000), {CONFIG}),
    "config is a directory": (fill(CONFIG, lambda p: p.mkdir()), {CONFIG}),
    "unknown architecture": (config(architectures=["PonyForCausalLM"]), {CONFIG}),
    "no architecture": (config(architectures=...), {CONFIG}),
    "no hidden size": (config(hidden_size=...), {CONFIG}),
    "negative hidden size": (config(hidden_size=-128), {CONFIG}),
    "infinite rope factor": (config(rope_scaling={"type": "linear", "factor": 10**400}), {CONFIG}),
    "no quantization config": (config(quantization_config=...), {CONFIG}),
    "quantization config not an object": (config(quantization_config="exl2"), {CONFIG}),
    "other method": (quantization("quant_method", "gptq"), {CONFIG}),
    "no version": (quantization("version", ...), {CONFIG}),
    "version not text": (quantization("version", 3), {CONFIG}),
    "no bits": (quantization("bits", ...), {CONFIG}),
    "bits as text": (quantization("bits", "4.6"), {CONFIG}),
    "bits NaN": (quantization("bits", float("nan")), {CONFIG}),
    "bits a truth value": (quantization("bits", True), {CONFIG}),
    "bits beyond any number": (quantization("bits", 10**400), {CONFIG}),
    "bits above the count": (quantization("bits", 6.5), {CONFIG}),
    "bits below the count": (quantization("bits", 4.0), {CONFIG}),
    "no head bits": (quantization("head_bits", ...), {CONFIG}),
    "head bits unknown": (quantization("head_bits", 7), {CONFIG}),
    "head bits of another head": (quantization("head_bits", 6), {"lm_head.q_groups"}),
    "no calibration": (quantization("calibration", ...), {CONFIG}),
    "no calibration rows": (quantization("calibration.rows", 0), {CONFIG}),
    "calibration length as text": (quantization("calibration.length", "2048"), {CONFIG}),
    "no calibration data set": (quantization("calibration.dataset", ...), {CONFIG}),
    "a layer more": (config(num_hidden_layers=LAYERS + 1), layer_names(LAYERS, stored=False)),
    "a layer fewer": (config(num_hidden_layers=LAYERS - 1), layer_names(LAYERS - 1, stored=True)),
    "a thousand million layers": (config(num_hidden_layers=10**9), {CONFIG}),
    "other vocabulary": (config(vocab_size=400), {EMBEDDING, "lm_head.q_weight", "lm_head.q_scale"}),
    "biases not announced": (config(attention_bias=False), BIASED),
    "biases announced": (
        config(mlp_bias=True),
        {f"model.layers.{i}.mlp.{n}_proj.bias" for i in range(LAYERS) for n in ("gate", "up", "down")},
    ),
}

HEADERS: dict[str, tuple[Damage, Iterable[str]]] = {
    **{f"no {n}": (drop(f"{Q}.{n}"), {f"{Q}.{n}"}) for n in ("q_weight", "q_scale", "q_scale_max")},
    **{f"no {n}": (drop(f"{GATE}.{n}"), {f"{GATE}.{n}"}) for n in ("q_groups", "q_invperm")},
    "no linear": (drop_linear(K_PROJ), {K_PROJ}),
    "no head": (drop_linear(HEAD_KEY), {HEAD_KEY}),
    "q_weight int64": (cast(f"{Q}.q_weight", np.int64), {f"{Q}.q_weight"}),
    "q_weight float": (cast(f"{Q}.q_weight", np.float32), {f"{Q}.q_weight"}),
    "q_scale unsigned": (change(f"{Q}.q_scale", lambda t: t.view(np.uint32)), {f"{Q}.q_scale"}),
    "q_scale_max float32": (cast(f"{DOWN}.q_scale_max", np.float32), {f"{DOWN}.q_scale_max"}),
    "q_groups int32": (cast(f"{DOWN}.q_groups", np.int32), {f"{DOWN}.q_groups"}),
    "q_invperm int16": (cast(f"{DOWN}.q_invperm", np.int16), {f"{DOWN}.q_invperm"}),
    "q_weight a column short": (change(f"{Q}.q_weight", lambda t: t[:, :-1]), {f"{Q}.q_weight"}),
    "q_weight without padding": (change("lm_head.q_weight", lambda t: t[:, :VOCABULARY]), {"lm_head.q_weight"}),
    "q_weight transposed": (change(f"{Q}.q_weight", np.transpose), {f"{Q}.q_weight"}),
    "q_weight flat": (change(f"{Q}.q_weight", np.ravel), {f"{Q}.q_weight"}),
    "q_weight empty": (change(f"{Q}.q_weight", lambda t: t[:0]), {f"{Q}.q_weight"}),
    "q_weight a word row short": (
        change(f"{Q}.q_weight", lambda t: t[:-1]),
        {f"{Q}.q_weight", f"{Q}.q_groups"},  # they contradict each other
    ),
    "q_weight a group short": (
        change(f"{Q}.q_weight", lambda t: t[:-3]),
        {f"{Q}.q_weight", f"{Q}.q_groups"},
    ),
    "q_weight twice as long": (
        change(f"{DOWN}.q_weight", lambda t: np.concatenate([t, t])),
        {f"{DOWN}.q_weight", f"{DOWN}.q_groups"},
    ),
    "q_scale a group short": (change(f"{Q}.q_scale", lambda t: t[:-1]), {f"{Q}.q_scale"}),
    "q_scale a word short": (change(f"{Q}.q_scale", lambda t: t[:, :-1]), {f"{Q}.q_scale"}),
    "q_scale unpacked": (change(f"{Q}.q_scale", lambda t: np.repeat(t, 8, 1)), {f"{Q}.q_scale"}),
    "q_scale_max a group more": (change(f"{Q}.q_scale_max", lambda t: np.append(t, t[:1])), {f"{Q}.q_scale_max"}),
    "q_scale_max with an axis more": (change(f"{Q}.q_scale_max", lambda t: t[:, None]), {f"{Q}.q_scale_max"}),
    "q_groups a group short": (change(f"{Q}.q_groups", lambda t: t[:-2]), {f"{Q}.q_groups"}),
    "q_groups of odd length": (change(f"{Q}.q_groups", lambda t: t[:-1]), {f"{Q}.q_groups"}),
    "q_groups as pairs": (change(f"{Q}.q_groups", lambda t: t.reshape(-1, 2)), {f"{Q}.q_groups"}),
    "q_invperm a row short": (change(f"{Q}.q_invperm", lambda t: t[:-1]), {f"{Q}.q_invperm"}),
    "q_invperm a row more": (
        change(f"{Q}.q_invperm", lambda t: np.append(t, t.dtype.type(HIDDEN))),
        {f"{Q}.q_invperm"},
    ),
}

VALUES: dict[str, tuple[Damage, Iterable[str]]] = {
    "group of 7 bits": (put(f"{Q}.q_groups", 0, 7), {f"{Q}.q_groups"}),
    "group of 0 bits": (put(f"{Q}.q_groups", 2, 0), {f"{Q}.q_groups"}),
    "first start not 0": (put(f"{Q}.q_groups", 1, 1), {f"{Q}.q_groups"}),
    "start off by one": (put(f"{Q}.q_groups", 3, 5), {f"{Q}.q_groups"}),
    "start off by 32 rows": (put(f"{DOWN}.q_groups", 5, 20), {f"{DOWN}.q_groups"}),
    "start off by 64 rows": (put(f"{DOWN}.q_groups", 5, 32), {f"{DOWN}.q_groups"}),
    "two starts equal": (put(f"{Q}.q_groups", 5, 4), {f"{Q}.q_groups"}),
    "two starts swapped": (swap(f"{Q}.q_groups", 3, 5), {f"{Q}.q_groups"}),
    "negative start": (put(f"{Q}.q_groups", 5, -7), {f"{Q}.q_groups"}),
    "start beyond the end": (put(f"{Q}.q_groups", 7, 1000), {f"{Q}.q_groups"}),
    "widths unsorted": (swap(f"{Q}.q_groups", 0, 2), {f"{Q}.q_groups"}),
    "narrow group among wide ones": (put(f"{DOWN}.q_groups", 2, 2), {f"{DOWN}.q_groups"}),
    "other width of the last group": (put(f"{Q}.q_groups", 6, 2), {f"{Q}.q_groups", f"{Q}.q_weight"}),
    "bits and starts exchanged": (
        change(f"{Q}.q_groups", lambda t: t.reshape(-1, 2)[:, ::-1].reshape(-1)),
        {f"{Q}.q_groups"},
    ),
    "table of zeros": (change(f"{Q}.q_groups", np.zeros_like), {f"{Q}.q_groups"}),
    "last group longer than the others": (merge_last_groups(Q), {f"{Q}.q_groups"}),
    "group of 224 rows": (merge_last_groups(DOWN), {f"{DOWN}.q_groups"}),
    "permutation entry twice": (change(f"{Q}.q_invperm", lambda t: np.append(t[:-1], t[:1])), {f"{Q}.q_invperm"}),
    "permutation entry negative": (put(f"{Q}.q_invperm", 9, -1), {f"{Q}.q_invperm"}),
    "permutation entry too large": (put(f"{Q}.q_invperm", 9, HIDDEN), {f"{Q}.q_invperm"}),
    "permutation counted from one": (change(f"{Q}.q_invperm", lambda t: t + 1), {f"{Q}.q_invperm"}),
    "permutation of zeros": (change(f"{Q}.q_invperm", np.zeros_like), {f"{Q}.q_invperm"}),
    "scale NaN": (put(f"{GATE}.q_scale_max", 1, np.nan), {f"{GATE}.q_scale_max"}),
    "scale infinite": (put(f"{GATE}.q_scale_max", 0, np.inf), {f"{GATE}.q_scale_max"}),
    "scale minus infinity": (put("lm_head.q_scale_max", 3, -np.inf), {"lm_head.q_scale_max"}),
    "scale negative": (put(f"{GATE}.q_scale_max", 1, -0.25), {f"{GATE}.q_scale_max"}),
    "scale zero under codes": (put(f"{GATE}.q_scale_max", 1, 0.0), {f"{GATE}.q_scale_max"}),
    "scale beyond half precision": (put(f"{GATE}.q_scale_max", 1, 65504.0), {f"{GATE}.q_scale_max"}),
    "padded code not zero": (put("lm_head.q_weight", (0, VOCABULARY), 0x20820821), {"lm_head.q_weight"}),
    "padding of zeros": (put("lm_head.q_weight", (slice(None), slice(VOCABULARY, None)), 0), {"lm_head.q_weight"}),
}

FLOATS: dict[str, tuple[Damage, Iterable[str]]] = {
    "no bias": (drop(f"{Q}.bias"), {f"{Q}.bias"}),
    "bias float32": (cast(f"{Q}.bias", np.float32), {f"{Q}.bias"}),
    "bias short": (change(f"{Q}.bias", lambda t: t[:-1]), {f"{Q}.bias"}),
    "bias as a row": (change(f"{Q}.bias", lambda t: t[None]), {f"{Q}.bias"}),
    "bias NaN": (put(f"{K_PROJ}.bias", 5, np.nan), {f"{K_PROJ}.bias"}),
    "bias where none belongs": (add(SHARDS[0], **{f"{GATE}.bias": np.zeros(256, np.float16)}), {f"{GATE}.bias"}),
    "bias of the head": (
        add(SHARDS[0], **{"lm_head.bias": np.zeros(PADDED_VOCABULARY, np.float16)}),
        {"lm_head.bias"},
    ),
    "no embedding": (drop(EMBEDDING), {EMBEDDING}),
    "embedding of integers": (cast(EMBEDDING, np.int16), {EMBEDDING}),
    "embedding a token short": (change(EMBEDDING, lambda t: t[:-1]), {EMBEDDING}),
    "embedding transposed": (change(EMBEDDING, np.transpose), {EMBEDDING}),
    "embedding NaN": (put(EMBEDDING, (299, 127), np.nan), {EMBEDDING}),
    "no norm": (drop(NORM), {NORM}),
    "norm float64": (cast(NORM, np.float64), {NORM}),
    "norm short": (change(NORM, lambda t: t[:-1]), {NORM}),
    "norm infinite": (put(NORM, 0, np.inf), {NORM}),
    "no final norm": (drop("model.norm.weight"), {"model.norm.weight"}),
}

# Damage to a shard, after which every tensor of it is missing too.
SHARD: dict[str, Damage] = {
    "gone": lambda d: (d / SHARDS[0]).unlink(),
    "empty": overwrite(SHARDS[0], lambda _: b""),
    "cut by one byte": overwrite(SHARDS[0], lambda b: b[:-1]),
    "cut in half": overwrite(SHARDS[0], lambda b: b[: len(b) // 2]),
    "cut inside the header": overwrite(SHARDS[0], lambda b: b[:100]),
    "with bytes after the end": overwrite(SHARDS[0], lambda b: b + bytes(8)),
    "with an absurd header size": overwrite(SHARDS[0], lambda b: b"\xff" * 8 + b[8:]),
    "with a broken header": overwrite(SHARDS[0], lambda b: b[:8] + b"[" + b[9:]),
    "of another dtype name": overwrite(SHARDS[0], lambda b: b.replace(b'"I32"', b'"X32"')),
    "of zeros": overwrite(SHARDS[0], lambda b: bytes(len(b))),
}

DAMAGES = FILES | SETTINGS | HEADERS | VALUES | FLOATS
