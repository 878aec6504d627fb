"""Dense language models: one skeleton with switches, the Gemma family, and those with biases everywhere."""

from exl2jax.models.registry import Architecture, Fused, Norms

_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
_FUSED_QKV = ("q_proj", "k_proj", "v_proj")
POST_NORMS = Norms(
    attention="input_layernorm",
    attention_post="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)
_CAUSAL_MASKS = ("*.attn.bias", "*.attn.masked_bias")
_GPT2_NORMS = Norms(attention="ln_1", mlp="ln_2")
_GPT2_RENAMES = (
    ("^transformer.", "model."),
    ("^model.ln_f.", "model.norm."),
    ("^model.h.", "model.layers."),
    ("^model.wte.", "model.embed_tokens."),
    (".attn.", ".self_attn."),
    (".self_attn.c_proj.", ".self_attn.o_proj."),
)

LLAMA_LIKE = (
    Architecture(
        name="LlamaForCausalLM",
        proof="LlamaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Architecture(name="MistralForCausalLM", proof="MistralForCausalLM", window="all"),
    Architecture(name="Qwen2ForCausalLM", proof="Qwen2ForCausalLM", qkv_bias=True, window="upper"),
    Architecture(
        name="Qwen3ForCausalLM",
        proof="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        head_norm="rms",
        window="upper",
    ),
    Architecture(
        name="YiForCausalLM", proof="LlamaForCausalLM, its norms renamed", norms=Norms(attention="ln1", mlp="ln2")
    ),
    Architecture(
        name="GraniteForCausalLM",
        proof="GraniteForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        scales=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
        defaults=(("attention_multiplier", 1.0),),
    ),
    Architecture(
        name="MiniCPMForCausalLM",
        proof="GraniteForCausalLM with the same multipliers",
        scales=("scale_emb", "scale_depth", "dim_model_base"),
        tied=True,
        defaults=(("scale_emb", 1), ("scale_depth", 1), ("dim_model_base", 1)),
    ),
    Architecture(
        name="IndexForCausalLM",
        proof="LlamaForCausalLM with the rows of its head normalised",
        scales=("norm_head",),
    ),
    Architecture(
        name="Phi3ForCausalLM",
        proof="Phi3ForCausalLM",
        fused=(
            Fused(source="self_attn.qkv_proj", parts=_FUSED_QKV),
            Fused(source="mlp.gate_up_proj", parts=("gate_proj", "up_proj")),
        ),
        window="all",
        scales=("partial_rotary_factor",),
    ),
    Architecture(
        name="InternLM2ForCausalLM",
        proof="LlamaForCausalLM, its tensors renamed and wqkv taken apart",
        mlp=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        fused=(Fused(source="self_attn.wqkv", parts=_FUSED_QKV, interleaved=True),),
        renames=(
            ("^output.", "lm_head."),
            ("^model.tok_embeddings.", "model.embed_tokens."),
            (".attention.", ".self_attn."),
            (".wo.", ".o_proj."),
        ),
        norms=Norms(attention="attention_norm", mlp="ffn_norm"),
        taken_for_granted=(("bias", False),),
    ),
    Architecture(
        name="Glm4ForCausalLM",
        proof="Glm4ForCausalLM",
        qkv_bias="attention_bias",
        fused=(Fused(source="mlp.gate_up_proj", parts=("gate_proj", "up_proj")),),
        norms=Norms(
            attention="input_layernorm",
            attention_post="post_self_attn_layernorm",
            mlp="post_attention_layernorm",
            mlp_post="post_mlp_layernorm",
        ),
        rotary="pairs",
        scales=("partial_rotary_factor",),
        defaults=(("partial_rotary_factor", 0.5),),
    ),
    Architecture(
        name="OrionForCausalLM",
        proof="LlamaForCausalLM with LayerNorm in place of its norms",
        norm="layer",
        norm_bias=True,
    ),
)

GEMMA = (
    Architecture(
        name="GemmaForCausalLM",
        proof="GemmaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_offset=1.0,
        activation_keys=("hidden_activation", "hidden_act"),
        activations=("gelu_pytorch_tanh", "gelu"),
        scaled_embeddings=True,
        tied=True,
        defaults=(("head_dim", 256),),
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        proof="Gemma2ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_offset=1.0,
        norms=POST_NORMS,
        window="pattern",
        pattern=2,
        stock_pattern=2,
        activation_keys=("hidden_activation", "hidden_act"),
        activations=("gelu_pytorch_tanh",),
        scales=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        scaled_embeddings=True,
        wide_residual=True,
        tied=True,
        defaults=(
            ("head_dim", 256),
            ("query_pre_attn_scalar", 256),
            ("attn_logit_softcapping", 50.0),
            ("final_logit_softcapping", 30.0),
            ("sliding_window", 4096),
        ),
    ),
)

BIASED = (
    Architecture(
        name="GPT2LMHeadModel",
        proof="GPT2LMHeadModel",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        mlp=(None, "mlp.c_fc", "mlp.c_proj"),
        fused=(Fused(source="self_attn.c_attn", parts=_FUSED_QKV),),
        aliases=tuple((f"^{name}.", f"transformer.{name}.") for name in ("h", "ln_f", "wte", "wpe")),
        renames=_GPT2_RENAMES,
        transposed=True,
        norm="layer",
        norm_bias=True,
        norms=_GPT2_NORMS,
        eps_keys=("layer_norm_epsilon",),
        rotary=None,
        positions="model.wpe",
        unused=_CAUSAL_MASKS,
        inner_multiple=4,
        activation_keys=("activation_function",),
        activations=_GELU_TANH,
        tied=True,
        taken_for_granted=(
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("add_cross_attention", False),
        ),
    ),
    Architecture(
        name="GPTBigCodeForCausalLM",
        proof="GPTBigCodeForCausalLM",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        mlp=(None, "mlp.c_fc", "mlp.c_proj"),
        fused=(Fused(source="self_attn.c_attn", parts=_FUSED_QKV),),
        renames=_GPT2_RENAMES,
        norm="layer",
        norm_bias=True,
        norms=_GPT2_NORMS,
        eps_keys=("layer_norm_epsilon",),
        rotary=None,
        positions="model.wpe",
        unused=_CAUSAL_MASKS,
        inner_multiple=4,
        multi_query=True,
        activation_keys=("activation_function",),
        activations=_GELU_TANH,
        tied=True,
        taken_for_granted=(("multi_query", True), ("scale_attn_weights", True), ("add_cross_attention", False)),
    ),
    Architecture(
        name="Starcoder2ForCausalLM",
        proof="Starcoder2ForCausalLM",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        mlp=(None, "mlp.c_fc", "mlp.c_proj"),
        norm="layer",
        norm_bias=True,
        eps_keys=("layer_norm_epsilon", "norm_epsilon"),
        window="all",
        activations=_GELU_TANH,
        tied=True,
        taken_for_granted=(("use_bias", True),),
    ),
)

DENSE = (*LLAMA_LIKE, *GEMMA, *BIASED)
