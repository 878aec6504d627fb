"""The layout of a tiny random model of an architecture, written as a Hugging Face directory.

Sizes are chosen to be awkward: heads of another size than hidden over heads, an MLP width and a vocabulary that are no
multiples of 128. Like `tiny_model` this needs no package under test, and runs beside torch on Python 3.11.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.testing.tiny_model import DTYPES, write_directory

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH, LAYERS, VOCABULARY, POSITIONS = 64, 96, 4, 2, 32, 2, 300, 256
WINDOW = 24
EXPERTS = 4

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA = SIZES | {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
GEMMA = SIZES | {"hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}

Shapes = dict[str, tuple[int, ...]]

QKVO: Shapes = {
    "self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * WIDTH, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * WIDTH, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
}
NARROW: Shapes = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
}
"""Two heads and one key/value head of hidden over heads, where a config has no `head_dim`."""
ATTENTION = tuple(QKVO)
GATED: Shapes = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
UNGATED: Shapes = {"mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)}
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
HEAD_NORMS: Shapes = {"self_attn.q_norm": (WIDTH,), "self_attn.k_norm": (WIDTH,)}


PROCESSORS = {
    "pixtral": "PixtralImageProcessor",
    "siglip_vision_model": "Gemma3ImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen2_5_vl": "Qwen2_5_VLImageProcessor",
}
PROCESSOR: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "patch_size": 4,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"longest_edge": 16},
}


@dataclass(frozen=True)
class TinyArchitecture:
    """A config, and what the source's tensors are called.

    `linears`, `norms` and other `plain` weights of a layer by name within it, `biased` those linears that have a bias,
    `layer` the prefix of layers with `{}` for the number, `outer` further tensors by full name. `offset` is where norm
    weights lie around; `transposed` weights are `[in, out]`.
    """

    architecture: str
    config: Mapping[str, Any]
    linears: Shapes = field(default_factory=lambda: QKVO | GATED)
    biased: tuple[str, ...] = ()
    norms: Shapes = field(default_factory=lambda: dict.fromkeys(TWO_NORMS, (HIDDEN,)))
    norm_bias: bool = False
    plain: Shapes = field(default_factory=dict)
    offset: float = 1.0
    layer: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    final: str = "model.norm"
    head: str | None = "lm_head"
    outer: Shapes = field(default_factory=dict)
    transposed: bool = False
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (5, 20, 60)
    seed: int = 11

    def shapes(self) -> Shapes:
        """Every tensor of the model."""
        shapes: Shapes = {f"{self.embedding}.weight": (VOCABULARY, HIDDEN)}
        for i in range(self.layers):
            prefix = self.layer.format(i)
            for name, shape in self.linears.items():
                shapes[f"{prefix}.{name}.weight"] = shape[::-1] if self.transposed else shape
                if name in self.biased:
                    shapes[f"{prefix}.{name}.bias"] = shape[:1]
            shapes |= {f"{prefix}.{name}.weight": shape for name, shape in self.plain.items()}
            for name, shape in self.norms.items():
                shapes |= self._norm(f"{prefix}.{name}", shape)
        shapes |= self._norm(self.final, (HIDDEN,))
        if self.head:
            shapes[f"{self.head}.weight"] = (VOCABULARY, HIDDEN)
        return shapes | self.outer

    @property
    def layers(self) -> int:
        """How many layers the config names."""
        text = {**self.config.get("text_config", {}), **self.config}
        return next(text[key] for key in ("num_hidden_layers", "n_layer", "n_layers") if key in text)

    def _norm(self, name: str, shape: tuple[int, ...]) -> Shapes:
        bias = self.norm_bias and "_norm" not in name.rpartition(".")[2]
        return {f"{name}.{part}": shape for part in (("weight", "bias") if bias else ("weight",))}


def tiny_tensors(tiny: TinyArchitecture) -> dict[str, np.ndarray]:
    """All tensors, each drawn from a stream of its own by seed and name."""
    norms = {n for i in range(tiny.layers) for n in (f"{tiny.layer.format(i)}.{name}" for name in tiny.norms)}
    norms.add(tiny.final)
    out = {}
    for name, shape in tiny.shapes().items():
        stream = np.random.default_rng([tiny.seed, zlib.crc32(name.encode())])
        value = stream.standard_normal(shape)
        if name.endswith(".bias"):
            value *= 0.3
        elif name.rpartition(".")[0] in norms:
            value = tiny.offset + 0.15 * value
        elif name.startswith((tiny.embedding, "wpe", "transformer.wpe")):
            value *= 0.25 if tiny.offset else 0.1  # Gemma's norms lie around zero and its embeddings are scaled up
        else:
            value *= (2.0 if "lm_head" in name else 1.2) * shape[0 if tiny.transposed else -1] ** -0.5
        out[name] = value.astype(DTYPES[tiny.dtype])
    return out


def write_tiny(path: Path, tiny: TinyArchitecture) -> Path:
    """Write the model's directory."""
    write_directory(path, {"architectures": [tiny.architecture], **tiny.config}, tiny_tensors(tiny))
    kind = tiny.config.get("vision_config", {}).get("model_type")
    if kind is not None:
        (path / "preprocessor_config.json").write_text(
            json.dumps(PROCESSOR | {"image_processor_type": PROCESSORS[kind]})
        )
    return path
