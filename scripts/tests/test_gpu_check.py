"""The check on a GPU: what is cut to be carried, what is made of its times, and how its steps follow each other."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax.calibration import load_tokenizer
from exl2jax.models import module_specs, open_model
from exl2jax.testing.tiny_model import write_tiny_llama
from scripts.gpu.block import parts, whole_model
from scripts.gpu.prepare import cut_model, cut_tokenizer
from scripts.gpu.stock import digest, first_that_differs, state_error, weights_compared
from scripts.gpu.summary import summary

ROOT = Path(__file__).parents[2]


def test_a_model_is_cut(tmp_path: Path) -> None:
    source, out = write_tiny_llama(tmp_path / "source"), tmp_path / "out"
    (source / "special_tokens_map.json").write_text("{}")
    cut_model(source, out, layers=1, vocabulary=300)
    model = open_model(out)
    assert len(module_specs(model.config)) == 2 and model.config.vocab_size == 300
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert not any(".layers.1." in name for name in after)
    np.testing.assert_array_equal(
        after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][:300], strict=True
    )
    same = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(after[same], before[same], strict=True)
    assert max(load_tokenizer(out).encode("The river runs along the town.")) < 300


def test_a_tokenizer_keeps_the_merges_of_its_tokens() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    whole = {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["ab", "c"]]}}
    model = cut_tokenizer(whole, 4)["model"]
    assert model == {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3}, "merges": [["a", "b"]]}
    assert whole["model"]["vocab"] is vocabulary and len(vocabulary) == 5


def modules(first: float, last: float, head: float) -> list[tuple[str, str, dict[str, float]]]:
    """A conversion's modules: the first block takes twice `first`, the second twice `last`."""
    found = []
    for stage in ("forward", "backward", "price", "quantize"):
        found.append((stage, "", {"seconds": 0.25}))
        for layer, seconds in enumerate((first, last)):
            found += [(stage, f"model.layers.{layer}.{kind}", {"seconds": seconds}) for kind in ("self_attn", "mlp")]
    return [*found, ("quantize", "lm_head", {"seconds": head})]


def test_the_time_of_a_whole_model() -> None:
    cold, warm = modules(first=10.0, last=1.0, head=7.0), modules(first=3.0, last=2.0, head=5.0)
    assert parts(warm)["quantize"] == {"first": 6.0, "last": 4.0, "other": 5.25}
    assert whole_model(cold, warm, layers=32) == {
        "compiling": 4 * 18.0,
        "block": 4 * 4.0,
        "head and between": 4 * 0.25 + 5.0,
        "layers": 32,
        "whole": 72.0 + 32 * 16.0 + 6.0,
    }


def test_the_summary_says_what_is_there(tmp_path: Path) -> None:
    stock = {"stock": 26.5, "exl2jax": 26.4, "tokens": 7154, "difference": 26.5 / 26.4 - 1}
    stock |= {"linears": {"equal": 2, "of": 3}, "modules": {"first that differs": None}, "settings": {"a": 1.5}}
    (tmp_path / "stock.json").write_text(json.dumps(stock))
    (tmp_path / "block.json").write_text(json.dumps({"cold": {"stages": {}, "peak_device_bytes": None}}))
    rows = [{"name": "gptq 64x32 4 bits", "seconds": 0.0025, "ratio": 2.5}]
    (tmp_path / "gptq.json").write_text(json.dumps({"rows": rows}))
    assert list(summary(tmp_path)) == [
        "block, cold, two blocks: ",
        f"block: cut off before 'warm' was known, see {tmp_path / 'block.json'}",
        "stock: perplexity 26.5000 in stock, 26.4000 here (7154 tokens), +0.379 %",
        "stock: 2 of 3 weights have the same bits",
        "stock: hidden states differ first after no module",
        "stock, a: 1.5",
        "gptq 64x32 4 bits: 2.50 ms, 2.50 times its limit",
    ]


class Tensor:
    """As much of a torch tensor as a comparison asks for."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __getitem__(self, index: tuple[slice, slice]) -> "Tensor":
        return Tensor(self.values[index])

    def cpu(self) -> "Tensor":
        return self

    def numpy(self) -> np.ndarray:
        return self.values


def stock_linear(weight: np.ndarray) -> SimpleNamespace:
    """A linear as stock holds it: with columns that pad it."""
    padded = np.pad(weight, ((0, 0), (0, 2)), constant_values=1)
    return SimpleNamespace(get_weight_tensor_dq=lambda: Tensor(padded))


def test_weights_are_compared_bit_for_bit() -> None:
    weights = {name: np.full((4, 3), n, np.float16) for n, name in enumerate("abc")}
    ours = {
        "linears": np.array(list(weights)),
        "columns": np.array([3] * 3),
        "digests": np.array([digest(weight) for weight in weights.values()]),
    }
    weights["b"][1, 2] = np.nextafter(np.float16(1), np.float16(2))
    stock = SimpleNamespace(modules_dict={name: stock_linear(weight) for name, weight in weights.items()})
    assert weights_compared(stock, ours) == {"equal": 2, "of": 3, "different": ["b"]}


def test_states_are_compared_token_by_token() -> None:
    """A token of a thousand times the norm does not hide that another one differs."""
    expected = np.array([[3000.0, 4000.0], [3.0, 4.0]])
    assert state_error(expected + np.array([[0, 0], [0, 5]]), expected) == pytest.approx(0.5)
    assert first_that_differs({"embedding": 0.0, "attention": float("nan"), "mlp": 0.5}) == "attention"
    assert first_that_differs({"embedding": 0.0, "attention": 0.001}) is None


def check(tmp_path: Path, python: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a stand-in for Python that answers as `python`, shell text, says."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{python}\n")
    stand_in.chmod(0o755)
    folders = {"OUT": str(tmp_path / "out"), "CARRIED": str(tmp_path / "carried"), "WHEELS": str(tmp_path / "none")}
    return subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), *arguments],
        env=os.environ | folders | {"PYTHON": str(stand_in)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    folder = tmp_path / "carried"
    (folder / "model").mkdir(parents=True)
    save_file({"input_ids": np.zeros((1, 2), np.int32)}, folder / "heldout.safetensors")
    return folder


def test_a_step_that_fails_does_not_stop_the_others(tmp_path: Path, carried: Path) -> None:
    done = check(tmp_path, 'case "$*" in *scripts.gpu.block*) exit 7 ;; esac', "--rehearse")
    said = done.stdout
    assert done.returncode == 1, said
    assert "block of 7B: FAILED (7)" in said
    passed = ("dequantize", "whole conversion, first", "whole conversion, second", "same bytes", "tests")
    assert all(f"{name}: passed" in said for name in (*passed, "GPTQ per shape"))
    assert (tmp_path / "out" / "log.txt").read_text().count("---") >= 7


def test_a_step_ends_at_its_limit_and_what_is_left_of_all(tmp_path: Path, carried: Path) -> None:
    done = check(tmp_path, 'case "$*" in *"gpu.whole"*first.json*) sleep 30 ;; esac', "--rehearse", TOTAL="1")
    assert "whole conversion, first: STOPPED after" in done.stdout
    assert "whole conversion, second: left out, no time is left" in done.stdout and done.returncode == 1


def test_without_a_gpu_it_says_how_far_it_came(tmp_path: Path, carried: Path) -> None:
    done = check(tmp_path, 'case "$*" in *default_backend*) exit 1 ;; esac')
    assert done.returncode == 3 and "JAX finds no GPU: the steps from here on need one" in done.stdout
    assert "dequantize: passed" in done.stdout


def test_only_stock_leaves_the_conversions_out(tmp_path: Path, carried: Path) -> None:
    done = check(tmp_path, "exit 0", "--stock")
    assert done.returncode == 1 and "stock: nvcc or the wheel exllamav2 is missing" in done.stdout
    assert "tests: passed" in done.stdout and "whole conversion" not in done.stdout


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = check(tmp_path, "exit 0", "--rehearse")
    assert done.returncode == 2 and "make it with: python -m scripts.gpu.prepare" in done.stdout
    assert check(tmp_path, "exit 0", "--other").returncode == 2


def test_the_order_that_stock_gives_an_mlp_does_not_count() -> None:
    weight = np.random.default_rng(5).normal(size=(6, 4)).astype(np.float16)
    order = np.array([2, 0, 3, 1])
    gate, down = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"
    assert digest(weight[:, order], gate) == digest(weight, gate)
    assert digest(weight.T[order], down) == digest(weight.T, down)
    assert digest(weight[::-1], gate) != digest(weight, gate)
    assert digest(weight[:, order], "model.layers.0.self_attn.q_proj") != digest(
        weight, "model.layers.0.self_attn.q_proj"
    )
