"""Tiny models of the architectures with a vision tower, all their options on."""

from collections.abc import Mapping
from typing import Any

from exl2jax.testing.tiny_layout import (
    ATTENTION,
    GATED,
    HIDDEN,
    LLAMA,
    NARROW,
    WINDOW,
    Shapes,
    TinyArchitecture,
)


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

VISION: dict[str, TinyArchitecture] = {
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
