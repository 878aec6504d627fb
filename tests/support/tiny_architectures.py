"""A tiny random model of every architecture, all its options on, as a Hugging Face directory.

Sizes are chosen to be awkward: heads of another size than hidden over heads, an MLP width and a vocabulary that are no
multiples of 128. Like `tiny_model` this needs no package under test, and runs beside torch on Python 3.11.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tiny_model import DTYPES, write_directory

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH, LAYERS, VOCABULARY, POSITIONS = 64, 96, 4, 2, 32, 2, 300, 256
WINDOW = 24

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
GATED: Shapes = {
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
UNGATED: Shapes = {"mlp.c_fc": (INNER, HIDDEN), "mlp.c_proj": (HIDDEN, INNER)}
TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
HEAD_NORMS: Shapes = {"self_attn.q_norm": (WIDTH,), "self_attn.k_norm": (WIDTH,)}


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
    return path


ATTENTION = tuple(QKVO)
EXPERTS = 4


def experts(place: str, names: tuple[str, str, str]) -> Shapes:
    """Linears of all experts: gate, up, down under their names."""
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return {f"{place.format(e)}.{n}": s for e in range(EXPERTS) for n, s in zip(names, shapes, strict=True)}


def vision_language(model_type: str, tower: str, vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a language model beside a vision tower."""
    return {
        "model_type": model_type,
        "image_token_index": 299,
        "vision_config": {"model_type": tower, **vision},
        "text_config": dict(text),
        **{key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")},
    }


PIXTRAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "rope_theta": 10000.0,
}
PIXTRAL_TOWER: Shapes = {
    "vision_tower.patch_conv.weight": (32, 3, 14, 14),
    "vision_tower.ln_pre.weight": (32,),
    **{f"vision_tower.transformer.layers.0.attention.{n}_proj.weight": (32, 32) for n in "qkvo"},
    "vision_tower.transformer.layers.0.feed_forward.gate_proj.weight": (48, 32),
    "vision_tower.transformer.layers.0.feed_forward.up_proj.weight": (48, 32),
    "vision_tower.transformer.layers.0.feed_forward.down_proj.weight": (32, 48),
    "vision_tower.transformer.layers.0.attention_norm.weight": (32,),
    "vision_tower.transformer.layers.0.ffn_norm.weight": (32,),
}
QWEN_TOWER: Shapes = {
    "visual.patch_embed.proj.weight": (32, 3, 2, 14, 14),
    "visual.blocks.0.norm1.weight": (32,),
    "visual.blocks.0.norm2.weight": (32,),
    "visual.blocks.0.attn.qkv.weight": (96, 32),
    "visual.blocks.0.attn.qkv.bias": (96,),
    "visual.blocks.0.attn.proj.weight": (32, 32),
    "visual.blocks.0.attn.proj.bias": (32,),
    "visual.merger.ln_q.weight": (32,),
    "visual.merger.mlp.0.weight": (128, 128),
    "visual.merger.mlp.0.bias": (128,),
    "visual.merger.mlp.2.weight": (HIDDEN, 128),
    "visual.merger.mlp.2.bias": (HIDDEN,),
}

TINY: dict[str, TinyArchitecture] = {
    "mistral": TinyArchitecture(
        "MistralForCausalLM", LLAMA | {"model_type": "mistral", "sliding_window": WINDOW}, dtype="float16"
    ),
    "qwen2": TinyArchitecture(
        "Qwen2ForCausalLM",
        LLAMA
        | {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        biased=ATTENTION[:3],
        head=None,
    ),
    "qwen3": TinyArchitecture(
        "Qwen3ForCausalLM",
        LLAMA
        | {
            "model_type": "qwen3",
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
        },
        biased=ATTENTION,
        norms=dict.fromkeys(TWO_NORMS, (HIDDEN,)) | HEAD_NORMS,
        dtype="float32",
    ),
    "yi": TinyArchitecture(
        "YiForCausalLM",
        LLAMA | {"model_type": "Yi"},
        norms=dict.fromkeys(("ln1", "ln2"), (HIDDEN,)),
    ),
    "granite": TinyArchitecture(
        "GraniteForCausalLM",
        LLAMA
        | {
            "model_type": "granite",
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 0.5,
        },
        biased=(*QKVO, *GATED),
    ),
    "minicpm": TinyArchitecture(
        "MiniCPMForCausalLM",
        LLAMA
        | {
            "model_type": "minicpm",
            "scale_emb": 6,
            "scale_depth": 0.8,
            "dim_model_base": 128,
            "tie_word_embeddings": ...,
        },
        head=None,
    ),
    "index": TinyArchitecture("IndexForCausalLM", LLAMA | {"model_type": "index", "norm_head": 1}),
    "phi3": TinyArchitecture(
        "Phi3ForCausalLM",
        LLAMA
        | {
            "model_type": "phi3",
            "sliding_window": WINDOW,
            "head_dim": ...,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 48,
            "max_position_embeddings": 192,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + 0.5 * i for i in range(12)],
                "short_factor": [1.0 + 0.05 * i for i in range(12)],
            },
        },
        linears={
            "self_attn.qkv_proj": (2 * 32 + 2 * 32, HIDDEN),
            "self_attn.o_proj": (HIDDEN, 2 * 32),
            "mlp.gate_up_proj": (2 * INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        },
    ),
    "internlm2": TinyArchitecture(
        "InternLM2ForCausalLM",
        LLAMA
        | {
            "model_type": "internlm2",
            "bias": False,
            "max_position_embeddings": 32,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        linears={
            "attention.wqkv": ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN),
            "attention.wo": (HIDDEN, HEADS * WIDTH),
            "feed_forward.w1": (INNER, HIDDEN),
            "feed_forward.w3": (INNER, HIDDEN),
            "feed_forward.w2": (HIDDEN, INNER),
        },
        norms=dict.fromkeys(("attention_norm", "ffn_norm"), (HIDDEN,)),
        embedding="model.tok_embeddings",
        head="output",
    ),
    "glm4": TinyArchitecture(
        "Glm4ForCausalLM",
        {k: v for k, v in LLAMA.items() if k != "rope_theta"}
        | {
            "model_type": "glm4",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
        linears=QKVO | {"mlp.gate_up_proj": (2 * INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)},
        biased=ATTENTION[:3],
        norms=dict.fromkeys((*TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"), (HIDDEN,)),
    ),
    "orion": TinyArchitecture("OrionForCausalLM", LLAMA | {"model_type": "orion"}, norm_bias=True),
    "gemma": TinyArchitecture(
        "GemmaForCausalLM",
        GEMMA | {"model_type": "gemma", "num_key_value_heads": 1},
        linears=QKVO | {"self_attn.k_proj": (WIDTH, HIDDEN), "self_attn.v_proj": (WIDTH, HIDDEN)} | GATED,
        offset=0.0,
        head=None,
    ),
    "gemma2": TinyArchitecture(
        "Gemma2ForCausalLM",
        GEMMA
        | {
            "model_type": "gemma2",
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
        norms=dict.fromkeys(FOUR_NORMS, (HIDDEN,)),
        offset=0.0,
        head=None,
    ),
    "gemma3": TinyArchitecture(
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "image_token_index": 299,
            "mm_tokens_per_image": 4,
            "sliding_window_pattern": 2,
            "text_config": GEMMA
            | {
                "model_type": "gemma3_text",
                "sliding_window": WINDOW,
                "sliding_window_pattern": 2,
                "query_pre_attn_scalar": 24,
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 10000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        norms=dict.fromkeys(FOUR_NORMS, (HIDDEN,)) | HEAD_NORMS,
        offset=0.0,
        layer="language_model.model.layers.{}",
        embedding="language_model.model.embed_tokens",
        final="language_model.model.norm",
        head=None,
        outer={
            "multi_modal_projector.mm_input_projection_weight": (32, HIDDEN),
            "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
            "vision_tower.vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
            "vision_tower.vision_model.embeddings.patch_embedding.bias": (32,),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (4, 32),
            "vision_tower.vision_model.post_layernorm.weight": (32,),
            "vision_tower.vision_model.post_layernorm.bias": (32,),
            **{
                f"vision_tower.vision_model.encoder.layers.0.{name}": shape
                for name, shape in {
                    "layer_norm1.weight": (32,),
                    "layer_norm1.bias": (32,),
                    "layer_norm2.weight": (32,),
                    "layer_norm2.bias": (32,),
                    "mlp.fc1.weight": (48, 32),
                    "mlp.fc1.bias": (48,),
                    "mlp.fc2.weight": (32, 48),
                    "mlp.fc2.bias": (32,),
                    **{f"self_attn.{p}.weight": (32, 32) for p in ("q_proj", "k_proj", "v_proj", "out_proj")},
                    **{f"self_attn.{p}.bias": (32,) for p in ("q_proj", "k_proj", "v_proj", "out_proj")},
                }.items()
            },
        },
    ),
    "gpt2": TinyArchitecture(
        "GPT2LMHeadModel",
        {
            "model_type": "gpt2",
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_inner": INNER,
            "n_positions": POSITIONS,
            "vocab_size": VOCABULARY,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
        },
        linears={"attn.c_attn": (3 * HIDDEN, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), **UNGATED},
        biased=("attn.c_attn", "attn.c_proj", *UNGATED),
        norms=dict.fromkeys(("ln_1", "ln_2"), (HIDDEN,)),
        norm_bias=True,
        layer="h.{}",
        embedding="wte",
        final="ln_f",
        head=None,
        outer={"wpe.weight": (POSITIONS, HIDDEN)},
        transposed=True,
        dtype="float32",
    ),
    "gpt_bigcode": TinyArchitecture(
        "GPTBigCodeForCausalLM",
        {
            "model_type": "gpt_bigcode",
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_inner": INNER,
            "n_positions": POSITIONS,
            "vocab_size": VOCABULARY,
            "multi_query": True,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_pytorch_tanh",
        },
        linears={"attn.c_attn": (HIDDEN + 64, HIDDEN), "attn.c_proj": (HIDDEN, HIDDEN), **UNGATED},
        biased=("attn.c_attn", "attn.c_proj", *UNGATED),
        norms=dict.fromkeys(("ln_1", "ln_2"), (HIDDEN,)),
        norm_bias=True,
        layer="transformer.h.{}",
        embedding="transformer.wte",
        final="transformer.ln_f",
        head=None,
        outer={"transformer.wpe.weight": (POSITIONS, HIDDEN)},
    ),
    "starcoder2": TinyArchitecture(
        "Starcoder2ForCausalLM",
        SIZES
        | {
            "model_type": "starcoder2",
            "head_dim": ...,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "rope_theta": 10000.0,
            "use_bias": True,
            "sliding_window": WINDOW,
        },
        linears=NARROW | UNGATED,
        biased=(*QKVO, *UNGATED),
        norm_bias=True,
        head=None,
    ),
    "mixtral": TinyArchitecture(
        "MixtralForCausalLM",
        LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        linears=QKVO | experts("block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
        plain={"block_sparse_moe.gate": (EXPERTS, HIDDEN)},
    ),
    "qwen3_moe": TinyArchitecture(
        "Qwen3MoeForCausalLM",
        LLAMA
        | {
            "model_type": "qwen3_moe",
            "intermediate_size": 256,
            "moe_intermediate_size": INNER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": WINDOW,
        },
        linears=QKVO | experts("mlp.experts.{}", ("gate_proj", "up_proj", "down_proj")),
        norms=dict.fromkeys(TWO_NORMS, (HIDDEN,)) | HEAD_NORMS,
        plain={"mlp.gate": (EXPERTS, HIDDEN)},
    ),
    "dbrx": TinyArchitecture(
        "DbrxForCausalLM",
        {
            "model_type": "dbrx",
            "d_model": HIDDEN,
            "n_heads": 2,
            "n_layers": LAYERS,
            "max_seq_len": POSITIONS,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "rope_theta": 50000.0,  # transformers 5 does not read that of attn_config
            "attn_config": {"model_type": "", "clip_qkv": 1.5, "kv_n_heads": 1, "rope_theta": 50000.0},
            "ffn_config": {
                "model_type": "",
                "ffn_act_fn": {"name": "silu"},
                "ffn_hidden_size": INNER,
                "hidden_size": HIDDEN,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": 1.0,
            },
        },
        linears={
            "norm_attn_norm.attn.Wqkv": (HIDDEN + 2 * 32, HIDDEN),
            "norm_attn_norm.attn.out_proj": (HIDDEN, HIDDEN),
        },
        norms=dict.fromkeys(("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"), (HIDDEN,)),
        plain={"ffn.router.layer": (EXPERTS, HIDDEN)},
        layer="transformer.blocks.{}",
        embedding="transformer.wte",
        final="transformer.norm_f",
        outer={
            f"transformer.blocks.{i}.ffn.experts.mlp.{name}": (EXPERTS * INNER, HIDDEN)
            for i in range(LAYERS)
            for name in ("w1", "v1", "w2")
        },
    ),
    "gemmoe": TinyArchitecture(
        "GemmoeForCausalLM",
        GEMMA | {"model_type": "gemmoe", "num_local_experts": 4, "num_experts_per_tok": 2},
        linears=QKVO | experts("block_sparse_moe.experts.{}", ("w1", "w3", "w2")),
        plain={"block_sparse_moe.gate": (EXPERTS, HIDDEN)},
        offset=0.0,
        head=None,
    ),
    "cohere": TinyArchitecture(
        "CohereForCausalLM",
        SIZES
        | {
            "model_type": "cohere",
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "use_qk_norm": True,
            "attention_bias": True,
            "logit_scale": 0.5,
            "head_dim": ...,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        linears=NARROW | GATED,
        biased=ATTENTION,
        norms={"input_layernorm": (HIDDEN,), "self_attn.q_norm": (2, 32), "self_attn.k_norm": (1, 32)},
        head=None,
    ),
    "cohere2": TinyArchitecture(
        "Cohere2ForCausalLM",
        SIZES
        | {
            "model_type": "cohere2",
            "hidden_act": "silu",
            "layer_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "logit_scale": 0.5,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        norms={"input_layernorm": (HIDDEN,)},
        head=None,
    ),
    "llava": TinyArchitecture(
        "LlavaForConditionalGeneration",
        vision_language("llava", "pixtral", PIXTRAL, LLAMA | {"model_type": "mistral", "sliding_window": WINDOW})
        | {"vision_feature_layer": -1, "image_seq_length": 4, "projector_hidden_act": "gelu"},
        layer="language_model.model.layers.{}",
        embedding="language_model.model.embed_tokens",
        final="language_model.model.norm",
        head="language_model.lm_head",
        outer=PIXTRAL_TOWER
        | {
            "multi_modal_projector.linear_1.weight": (HIDDEN, 32),
            "multi_modal_projector.linear_1.bias": (HIDDEN,),
            "multi_modal_projector.linear_2.weight": (HIDDEN, HIDDEN),
            "multi_modal_projector.linear_2.bias": (HIDDEN,),
        },
    ),
    "mistral3": TinyArchitecture(
        "Mistral3ForConditionalGeneration",
        vision_language("mistral3", "pixtral", PIXTRAL, LLAMA | {"model_type": "mistral"})
        | {
            "vision_feature_layer": -1,
            "spatial_merge_size": 2,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
        },
        layer="language_model.model.layers.{}",
        embedding="language_model.model.embed_tokens",
        final="language_model.model.norm",
        head="language_model.lm_head",
        outer=PIXTRAL_TOWER
        | {
            "multi_modal_projector.norm.weight": (32,),
            "multi_modal_projector.patch_merger.merging_layer.weight": (32, 128),
            "multi_modal_projector.linear_1.weight": (HIDDEN, 32),
            "multi_modal_projector.linear_2.weight": (HIDDEN, HIDDEN),
        },
    ),
    "qwen2_vl": TinyArchitecture(
        "Qwen2VLForConditionalGeneration",
        LLAMA
        | {
            "model_type": "qwen2_vl",
            "head_dim": ...,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "image_token_id": 297,
            "video_token_id": 298,
            "vision_start_token_id": 295,
            "vision_end_token_id": 296,
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": HIDDEN,
                "num_heads": 2,
                "mlp_ratio": 2,
                "in_chans": 3,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        linears=NARROW | GATED,
        biased=ATTENTION[:3],
        outer=QWEN_TOWER
        | {
            "visual.blocks.0.mlp.fc1.weight": (64, 32),
            "visual.blocks.0.mlp.fc1.bias": (64,),
            "visual.blocks.0.mlp.fc2.weight": (32, 64),
            "visual.blocks.0.mlp.fc2.bias": (32,),
            "visual.blocks.0.norm1.bias": (32,),
            "visual.blocks.0.norm2.bias": (32,),
            "visual.merger.ln_q.bias": (32,),
        },
    ),
    "qwen2_5_vl": TinyArchitecture(
        "Qwen2_5_VLForConditionalGeneration",
        LLAMA
        | {
            "model_type": "qwen2_5_vl",
            "head_dim": ...,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "image_token_id": 297,
            "video_token_id": 298,
            "vision_start_token_id": 295,
            "vision_end_token_id": 296,
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "in_chans": 3,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "fullatt_block_indexes": [0],
                "window_size": 28,
            },
        },
        linears=NARROW | GATED,
        biased=ATTENTION[:3],
        outer=QWEN_TOWER
        | {
            f"visual.blocks.0.mlp.{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}.items()
            for part in ("weight", "bias")
        },
    ),
}
"""By the name of the reference file."""
