"""Vision-language models: the language model is quantized, vision tower and projector are copied as they are.

Newer `transformers` save these under other prefixes than the published files and the stock runtime have.
"""

from exl2jax.models.architectures_dense import POST_NORMS
from exl2jax.models.registry import Architecture

_NESTED = (
    ("^model.language_model.", "language_model.model."),
    ("^model.vision_tower.", "vision_tower."),
    ("^model.multi_modal_projector.", "multi_modal_projector."),
    ("^lm_head.", "language_model.lm_head."),
)
_FLAT = (("^model.language_model.", "model."), ("^model.visual.", "visual."))
_TOWER = ("vision_tower.", "multi_modal_projector.")
_PIXTRAL = (("vision_config.model_type", "pixtral"), ("text_config.model_type", "mistral"))

VISION = (
    Architecture(
        name="LlavaForConditionalGeneration",
        proof="LlavaForConditionalGeneration, text only",
        prefix="language_model.",
        copied=_TOWER,
        aliases=_NESTED,
        window="all",
        demanded=_PIXTRAL,
    ),
    Architecture(
        name="Mistral3ForConditionalGeneration",
        proof="Mistral3ForConditionalGeneration, text only",
        prefix="language_model.",
        copied=_TOWER,
        aliases=_NESTED,
        window="all",
        demanded=_PIXTRAL,
    ),
    Architecture(
        name="Qwen2VLForConditionalGeneration",
        proof="Qwen2VLForConditionalGeneration, text only",
        copied=("visual.",),
        aliases=_FLAT,
        qkv_bias=True,
        window="upper",
    ),
    Architecture(
        name="Qwen2_5_VLForConditionalGeneration",
        proof="Qwen2_5_VLForConditionalGeneration, text only",
        copied=("visual.",),
        aliases=_FLAT,
        qkv_bias=True,
        window="upper",
    ),
    Architecture(
        name="Gemma3ForConditionalGeneration",
        proof="Gemma3ForConditionalGeneration, text only",
        prefix="language_model.",
        copied=_TOWER,
        aliases=_NESTED,
        renames=(("mm_input_projection_weight", "mm_input_projection.weight"),),
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_offset=1.0,
        norms=POST_NORMS,
        head_norm="rms",
        window="pattern",
        pattern=6,
        stock_pattern=6,
        local_theta="rope_local_base_freq",
        activation_keys=("hidden_activation", "hidden_act"),
        activations=("gelu_pytorch_tanh",),
        scales=("query_pre_attn_scalar",),
        scaled_embeddings=True,
        wide_residual=True,
        tied=True,
        defaults=(("query_pre_attn_scalar", 256), ("sliding_window", 4096)),
        stock_defaults=(
            ("vocab_size", 262208),
            ("rms_norm_eps", 1e-6),
            ("head_dim", 256),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("rope_theta", 1e6),
        ),
        taken_for_granted=(("rope_local_base_freq", 10000.0), ("use_bidirectional_attention", False)),
    ),
)
