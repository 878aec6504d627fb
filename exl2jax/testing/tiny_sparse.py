"""Tiny models of the architectures with experts, all their options on."""

from exl2jax.testing.tiny_layout import (
    EXPERTS,
    GEMMA,
    HEAD_NORMS,
    HIDDEN,
    INNER,
    LAYERS,
    LLAMA,
    POSITIONS,
    QKVO,
    TWO_NORMS,
    VOCABULARY,
    WINDOW,
    Shapes,
    TinyArchitecture,
)


def experts(place: str, names: tuple[str, str, str]) -> Shapes:
    """Linears of all experts: gate, up, down under their names."""
    shapes = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
    return {f"{place.format(e)}.{n}": s for e in range(EXPERTS) for n, s in zip(names, shapes, strict=True)}


SPARSE: dict[str, TinyArchitecture] = {
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
}
