"""Transforms: the rewritten model computes the same, by our decoder and by float64 oracles, and converts like any."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from exl2jax import ConversionConfig, cli, convert
from exl2jax.contrib.transforms import orthogonal
from exl2jax.conversion.context import Context
from exl2jax.conversion.preflight import preflight
from exl2jax.errors import Interrupted, JobError, NumericalError, SettingsError
from exl2jax.evaluation import model_logits
from exl2jax.evaluation.logits import final_states
from exl2jax.exl2.inspect import inspect
from exl2jax.exl2.verify.directory import verify
from exl2jax.lab import read_plan
from exl2jax.models import HFModel, Model, build_decoder, head_norm_spec, module_specs, open_model
from exl2jax.models.transform import layout_of, transformed
from exl2jax.stream.forward import head_logits
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import write_tiny
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants import Choice, choose, registry, variant
from exl2jax.variants.recipe import PRESETS, recipe_from
from exl2jax.variants.transforms import Layout, Pair, Read, Rewritten
from tests.oracles import llama

BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
ROTATED = ("llama", "qwen2", "qwen3", "granite", "minicpm", "phi3", "internlm2", "gemma", "mixtral", "qwen3_moe")
EQUALIZED = ("llama", "qwen3", "phi3", "internlm2", "glm4", "gemma2", "orion", "cohere", "mixtral", "llava")
EXACT = [("rotation:seed=3", name) for name in ROTATED] + [("equalize", name) for name in EQUALIZED]
HALF = 2e-2
"""Absolute, on logits of standard deviation 2 to 3: the turned embedding and routers are rounded to half precision."""


def opened(path: Path, text: str | None = None) -> HFModel:
    model = open_model(path)
    assert isinstance(model, HFModel)
    return transformed(model, None if text is None else choose("transform", text))


def made(folder: Path, name: str) -> Path:
    """A tiny model of an architecture; the Llama is tied, has key/value heads for two queries each, and biases."""
    return write_tiny_llama(folder, **BIASED) if name == "llama" else write_tiny(folder, TINY[name])


def logits(model: Model, ids: np.ndarray) -> np.ndarray:
    return np.asarray(head_logits(build_decoder(model.config), model.head_params(), final_states(model, ids)))


@pytest.mark.parametrize(("text", "name"), EXACT)
def test_the_model_computes_the_same(tmp_path: Path, text: str, name: str) -> None:
    path = made(tmp_path / "model", name)
    ids = np.random.default_rng(1).integers(0, 300, (2, 24), dtype=np.int32)
    before, after = logits(opened(path), ids), logits(opened(path, text), ids)
    assert before.std() > 0.5
    np.testing.assert_allclose(after, before, rtol=0.0, atol=HALF if text.startswith("rotation") else 1e-4)


def oracle_logits(model: HFModel, ids: np.ndarray) -> np.ndarray:
    """A Llama in float64, from the tensors by name."""
    c = model.config

    def linear(key: str) -> dict[str, np.ndarray]:
        bias = {"bias": model.files.read(f"{key}.bias")} if f"{key}.bias" in model.files else {}
        return {"kernel": model.files.read(f"{key}.weight").astype(np.float64).T, **bias}

    def block(layer: int, norm: str, place: str, names: str) -> dict[str, Any]:
        prefix = f"model.layers.{layer}"
        weights = {f"{n}_proj": linear(f"{prefix}.{place}.{n}_proj") for n in names.split()}
        return {"norm": {"weight": model.files.read(f"{prefix}.{norm}.weight")}, **weights}

    h = model.files.read("model.embed_tokens.weight").astype(np.float64)[ids]
    for i in range(c.num_layers):
        mixing = block(i, "input_layernorm", "self_attn", "q k v o")
        turns = llama.plain_frequencies(10000.0, c.head_dim)
        h = llama.attention_block(mixing, h, c.num_heads, c.num_kv_heads, c.norm_eps, turns)[0]
        h = llama.mlp_block(block(i, "post_attention_layernorm", "mlp", "gate up down"), h, c.norm_eps)[0]
    h = llama.rms_norm(h, model.files.read("model.norm.weight"), c.norm_eps)
    return h @ model.files.read(model.head_name).astype(np.float64).T


@pytest.mark.parametrize("text", ["rotation", "equalize:strength=0.7"])
def test_the_same_in_float64(tmp_path: Path, text: str) -> None:
    path = write_tiny_llama(tmp_path / "model", **BIASED)
    ids = np.arange(5, 17, dtype=np.int32)
    before, after = oracle_logits(opened(path), ids), oracle_logits(opened(path, text), ids)
    np.testing.assert_allclose(after, before, rtol=0.0, atol=HALF if text == "rotation" else 1e-5)


def test_rotated_tensors_are_the_products_of_the_papers(tmp_path: Path) -> None:
    path = made(tmp_path / "model", "gemma")
    source, model = opened(path), opened(path, "rotation:seed=7")
    turn = orthogonal(64, 7).astype(np.float64)
    read = {n: source.files.read(n).astype(np.float64) for n in source.files}
    layer = "model.layers.1"
    norm = 1 + read[f"{layer}.post_attention_layernorm.weight"]
    wanted = {
        f"{layer}.mlp.up_proj.weight": read[f"{layer}.mlp.up_proj.weight"] @ np.diag(norm) @ turn,
        f"{layer}.mlp.down_proj.weight": turn.T @ read[f"{layer}.mlp.down_proj.weight"],
        "lm_head.weight": read["model.embed_tokens.weight"] @ np.diag(1 + read["model.norm.weight"]) @ turn,
    }
    for name, value in wanted.items():
        assert model.files.dtype(name) == "F32" and model.files.shape(name) == value.shape
        np.testing.assert_allclose(model.files.read(name), value, rtol=0.0, atol=1e-5 * np.abs(value).max())
    stored = {
        "model.embed_tokens.weight": read["model.embed_tokens.weight"] @ turn,
        "model.norm.weight": np.zeros(64),
    }
    for name, value in stored.items():
        assert model.files.dtype(name) == "F16" and model.files.read(name).dtype == np.float16
        np.testing.assert_allclose(model.files.read(name), value, rtol=1e-3, atol=1e-4)
    assert not model.config.tie_word_embeddings and model.head_name == "lm_head.weight"
    assert source.config.tie_word_embeddings and model.weights_digest() == source.weights_digest()
    assert {"lm_head.weight", *source.files} == set(model.files)


def test_the_rotation_is_orthogonal_and_follows_its_seed() -> None:
    first = orthogonal(96, 5)
    assert first.dtype == np.float32
    np.testing.assert_allclose(first.astype(np.float64).T @ first, np.eye(96), atol=1e-5)
    assert orthogonal(96, 5).tobytes() == first.tobytes() != orthogonal(96, 6).tobytes()


def layout(pair: Pair, *, bias: bool) -> Layout:
    """A model of two linears."""
    return Layout(
        name="Two",
        traits=frozenset(),
        hidden=5,
        embedding="e",
        head="h",
        offset=0.0,
        readers={},
        writers=(),
        pairs=[pair],
        biased=frozenset([pair.first] if bias else []),
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    width=st.integers(1, 4),
    strength=st.floats(0, 1),
    dead=st.booleans(),
)
def test_equalized_pairs_have_the_same_product(
    seed: int, heads: int, group: int, width: int, strength: float, dead: bool
) -> None:
    """Heads by hand: query head `h` reads the values of head `h // group`."""
    rng = np.random.default_rng(seed)
    tensors = {
        "v.weight": rng.standard_normal((heads * width, 5)).astype(np.float32),
        "v.bias": rng.standard_normal(heads * width).astype(np.float32),
        "o.weight": rng.standard_normal((5, heads * group * width)).astype(np.float32),
    }
    if dead:
        tensors["v.weight"][0] = 0
    source = np.asarray([(h // group) * width + i for h in range(heads * group) for i in range(width)])
    chosen = choose("transform", {"name": "equalize", "strength": strength})
    found = chosen.function(
        layout(Pair(first="v", second="o", source=source), bias=True), tensors.__getitem__, chosen.settings
    )
    new = {name: value().astype(np.float64) for name, value in found.items()}
    wide = {name: value.astype(np.float64) for name, value in tensors.items()}
    for h in range(heads * group):
        mine, theirs = slice(h * width, (h + 1) * width), slice((h // group) * width, (h // group + 1) * width)
        for name in ("v.weight", "v.bias"):
            wanted, got = (t["o.weight"][:, mine] @ t[name][theirs] for t in (wide, new))
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    if strength == 0:
        assert all(np.array_equal(new[name], wide[name]) for name in wide)
    if strength == 0.5:
        _require_same_ranges(new, heads, group, width)


def _require_same_ranges(new: Mapping[str, np.ndarray], heads: int, group: int, width: int) -> None:
    outputs = np.abs(new["v.weight"]).max(axis=1)
    inputs = np.abs(new["o.weight"]).max(axis=0).reshape(heads, group, width).max(axis=1).reshape(-1)
    np.testing.assert_allclose(outputs[outputs > 0], inputs[outputs > 0], rtol=1e-5)


def test_equalized_ranges_of_a_model(tmp_path: Path) -> None:
    path = made(tmp_path / "model", "mixtral")
    model = opened(path, "equalize")
    layer = "model.layers.0"
    for first, second in (("w3", "w2"),):
        place = f"{layer}.block_sparse_moe.experts.2"
        up, down = (model.files.read(f"{place}.{n}.weight") for n in (first, second))
        np.testing.assert_allclose(np.abs(up).max(axis=1), np.abs(down).max(axis=0), rtol=1e-5)
    v, o = (np.abs(model.files.read(f"{layer}.self_attn.{n}_proj.weight")) for n in "vo")
    np.testing.assert_allclose(v.max(axis=1), o.max(axis=0).reshape(2, 2, 32).max(axis=1).reshape(-1), rtol=1e-5)
    untouched = "model.embed_tokens.weight"
    assert model.files.dtype(untouched) == "BF16" and "lm_head.weight" in model.files


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("rotation", "gemma2", "Gemma2ForCausalLM has norms after its sublayers"),
        ("rotation", "cohere", "CohereForCausalLM has LayerNorm"),
        ("rotation", "gpt2", "GPT2LMHeadModel has LayerNorm"),
        ("rotation", "index", "IndexForCausalLM has a head that is normalised"),
        ("rotation", "qwen2_vl", "Qwen2VLForConditionalGeneration has a vision tower"),
        ("equalize", "gpt2", "GPT2LMHeadModel has an activation between up and down"),
        ("equalize", "dbrx", "DbrxForCausalLM has clipped values"),
    ],
)
def test_refusals(tmp_path: Path, text: str, name: str, message: str) -> None:
    path = made(tmp_path / "model", name)
    recipe = recipe_from({"preset": "fast", "transform": text}, "mine")
    with pytest.raises(SettingsError, match=f"transform {text}: {message}"):
        convert(ConversionConfig(in_dir=path, out_dir=tmp_path / "work", preset=recipe))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("text", ["rotation:seed=-1", "equalize:strength=1.5", "equalize:strength=nan", "hadamard"])
def test_settings_out_of_range(text: str) -> None:
    with pytest.raises(SettingsError):
        choose("transform", text)


@pytest.mark.parametrize(
    ("tensor", "value", "error"),
    [
        ("model.norm.weight", np.full(64, 1e5), NumericalError),
        ("model.norm.weight", np.ones(63), SettingsError),
        ("lm_head.weight", np.ones((320, 64)), None),
        ("model.layers.7.mlp.up_proj.weight", np.ones(1), SettingsError),
    ],
)
def test_a_transform_of_ones_own(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, value: np.ndarray, error: type[Exception] | None
) -> None:
    """The result of a plugin is checked against the model; a head of its own ends the tie."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @variant("transform", "mine")
    def mine(model: Layout, read: Read, settings: Any) -> Rewritten:
        """Something."""
        return {tensor: lambda: value}

    if error is None:
        model = opened(tiny_llama, "mine")
        assert not model.config.tie_word_embeddings and np.array_equal(model.files.read(tensor), value)
        return
    with pytest.raises(error, match=tensor):
        opened(tiny_llama, "mine").files.read(tensor)


def test_a_layout_names_what_reads_and_writes_the_stream(tmp_path: Path) -> None:
    config = opened(made(tmp_path / "model", "mixtral")).config
    found = layout_of(config)
    layer = "model.layers.1"
    gates = [f"{layer}.block_sparse_moe.experts.{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")]
    read = found.readers[f"{layer}.post_attention_layernorm.weight"]
    assert sorted(read) == sorted([*gates, f"{layer}.block_sparse_moe.gate.weight"])
    assert found.readers[f"{head_norm_spec(config).key}.weight"] == ("lm_head.weight",)
    assert len(found.writers) == config.num_layers * (1 + 4) and len(found.pairs) == config.num_layers * (1 + 4)
    assert sum(map(len, found.readers.values())) == config.num_layers * (3 + 8 + 1) + 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    """A tied float32 model, so that what is stored in half shows."""
    model = write_tiny_llama(
        tmp_path_factory.mktemp("model") / "tiny", num_layers=1, dtype="float32", attention_bias=True
    )
    given: dict[str, Any] = {"dataset_rows": 4, "length": 32, "measurement_rows": 2, "measurement_length": 32}
    return ConversionConfig(in_dir=model, out_dir=model.parent / "none", bits=7.0, checkpoint_interval=0, **given)


def chosen(base: ConversionConfig, folder: Path, text: str, **changes: Any) -> ConversionConfig:
    recipe = recipe_from({"preset": "fast", "transform": text}, "mine")
    return replace(base, preset=recipe, out_dir=folder / "work", compile_full=folder / "exl2", **changes)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("text", ["rotation:seed=1", "equalize:strength=0.5"])
def test_a_conversion(base: ConversionConfig, tmp_path: Path, text: str) -> None:
    """From the command line: verified, near the source, sized as planned, compared with what it was made of."""
    flags = {"-i": base.in_dir, "-o": tmp_path / "work", "-b": 7, "-r": 4, "-l": 32, "-mr": 2, "-ml": 32}
    command = [str(x) for pair in flags.items() for x in pair] + ["--preset", "fast", "--variant", f"transform={text}"]
    assert cli.main(["convert", *command, "-cf", str(tmp_path / "exl2")]) == 0
    out = tmp_path / "exl2"
    report = verify(out)
    assert report.ok, report.faults
    written = json.loads((out / "config.json").read_text())
    rotated = text.startswith("rotation")
    assert written["tie_word_embeddings"] is not rotated and written["quantization_config"]["transform"] == text
    tensors = {n: t for path in out.glob("*.safetensors") for n, t in load_file(path).items()}
    assert "lm_head.q_weight" in tensors
    assert tensors["model.embed_tokens.weight"].dtype == (np.float16 if rotated else np.float32)
    assert np.array_equal(tensors["model.norm.weight"], np.ones(64)) == rotated
    ids = np.random.default_rng(2).integers(0, 300, (2, 24), dtype=np.int32)
    before, after = (np.asarray(model_logits(path, ids)) for path in (base.in_dir, out))
    assert np.sqrt(np.mean((after - before) ** 2)) < 0.05 * before.std(), "7 bits"
    errors = [x.error or 1 for x in inspect(out, source=base.in_dir)]
    assert max(errors) < 0.3 and np.mean(errors) < 0.05, "against the rewritten source, else above one"
    config = chosen(base, tmp_path, text, measurement=tmp_path / "work" / "measurement.json")
    plan = preflight(Context.open(config, RunControl()), {})
    assert plan.output_exact and plan.output_size == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    job = json.loads((tmp_path / "work" / "job_new.json").read_text())
    assert job["inputs"]["variants"]["transform"] == text
    measured = json.loads((tmp_path / "work" / "measurement.json").read_text())
    assert measured["method"] == f"scales=columns, transform={text}"


def test_a_stopped_conversion_ends_in_the_same_bytes(base: ConversionConfig, tmp_path: Path) -> None:
    """Under the same transform; another is another job."""
    convert(chosen(base, tmp_path / "whole", "rotation"))
    stop = StopFlag()
    stop.asked = True
    with pytest.raises(Interrupted):
        convert(chosen(base, tmp_path / "again", "rotation"), RunControl(stop=stop))
    with pytest.raises(JobError, match="variants"):
        convert(chosen(base, tmp_path / "again", "rotation:seed=1"))
    convert(chosen(base, tmp_path / "again", "rotation"))
    found = [weights(tmp_path / name / "exl2") for name in ("whole", "again")]
    assert found[0] == found[1] and found[0]


def test_a_measurement_of_the_source_itself_is_named(base: ConversionConfig, tmp_path: Path) -> None:
    measured = tmp_path / "m.json"
    convert(replace(base, preset="fast", out_dir=tmp_path / "m", output_measurement=measured))
    result = convert(chosen(base, tmp_path, "equalize", measurement=measured))
    assert any("other variants (scales=columns)" in w and "transform=equalize" in w for w in result.warnings)
    plain = convert(chosen(base, tmp_path / "plain", "none", measurement=measured))
    assert not any("other variants" in w for w in plain.warnings)


def test_cells_of_a_sweep_measure_apart(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    variants = {
        "best": "",
        "turned": 'transform = "rotation:seed=1"',
        "otherwise": "transform = {name = 'rotation', seed = 2}",
        "pulled": 'transform = {name = "rotation", seed = 2}\npropagation = 0.25',
    }
    tables = "\n".join(f"[variants.{name}]\n{body}" for name, body in variants.items())
    path.write_text(f'models = ["some/model"]\ntargets = [3.0]\n{tables}\n')
    names = {cell.variant: cell.measurement for cell in read_plan(path).cells()}
    assert len(set(names.values())) == 3 and names["otherwise"] == names["pulled"]


def test_the_stock_name_rewrites_nothing(tiny_llama: Path) -> None:
    recipe = recipe_from({"preset": "fast", "transform": "none"}, "mine")
    assert recipe.transform is None and recipe.measured_by == PRESETS["fast"].measured_by
    choice = recipe.chosen("transform")
    assert isinstance(choice, Choice)
    model = transformed(opened(tiny_llama), choice)
    assert model.config == opened(tiny_llama).config and module_specs(model.config)
    name = "model.embed_tokens.weight"
    assert model.files.read(name).tobytes() == opened(tiny_llama).files.read(name).tobytes()
