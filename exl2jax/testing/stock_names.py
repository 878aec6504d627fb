"""The tensors that stock ExLlamaV2 0.3.2 looks up in an EXL2 directory, by architecture, as its source spells them.

`quantized` are linears of a layer (five tensors each), `biased` those that it asserts to have a bias, `plain` the other
tensors of a layer, `outer` those beside the layers; the head is quantized always. `copied` are prefixes that it loads a
vision tower and its projector from.
"""

from dataclasses import dataclass

PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")

ATTENTION = tuple(f"self_attn.{n}_proj" for n in "qkvo")
QKV = ATTENTION[:3]
MLP = tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
C_MLP = ("mlp.c_fc", "mlp.c_proj")
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def weights(*norms: str) -> tuple[str, ...]:
    """Norms without a bias."""
    return tuple(f"{norm}.weight" for norm in norms)


def both(*norms: str) -> tuple[str, ...]:
    """Norms with weight and bias."""
    return tuple(f"{norm}.{part}" for norm in norms for part in ("weight", "bias"))


def experts(place: str, *names: str) -> tuple[str, ...]:
    """Linears of the four experts of the tiny models."""
    return tuple(f"{place}.{e}.{name}" for e in range(4) for name in names)


LLAMA_NORMS = weights("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*LLAMA_NORMS, *weights("pre_feedforward_layernorm", "post_feedforward_layernorm"))


@dataclass(frozen=True)
class StockNames:
    """The names of one architecture."""

    quantized: tuple[str, ...] = (*ATTENTION, *MLP)
    biased: tuple[str, ...] = ()
    plain: tuple[str, ...] = LLAMA_NORMS
    outer: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight")
    prefix: str = ""
    copied: tuple[str, ...] = ()

    def of(self, layers: int) -> set[str]:
        """Every tensor of a model of so many layers, but for what is copied."""
        names = {f"{self.prefix}{name}" for name in self.outer}
        names |= {f"{self.prefix}lm_head.{part}" for part in PARTS}
        for i in range(layers):
            layer = f"{self.prefix}model.layers.{i}"
            names |= {f"{layer}.{linear}.{part}" for linear in self.quantized for part in PARTS}
            names |= {f"{layer}.{linear}.bias" for linear in self.biased}
            names |= {f"{layer}.{name}" for name in self.plain}
        return names


LAYER_NORM_OUTER = ("model.embed_tokens.weight", "model.norm.weight", "model.norm.bias")

STOCK: dict[str, StockNames] = {
    "MistralForCausalLM": StockNames(),
    "Qwen2ForCausalLM": StockNames(biased=QKV),
    "Qwen3ForCausalLM": StockNames(biased=ATTENTION, plain=(*LLAMA_NORMS, *HEAD_NORMS)),
    "YiForCausalLM": StockNames(plain=weights("ln1", "ln2")),
    "GraniteForCausalLM": StockNames(biased=(*ATTENTION, *MLP)),
    "MiniCPMForCausalLM": StockNames(),
    "IndexForCausalLM": StockNames(),
    "Phi3ForCausalLM": StockNames(),
    "InternLM2ForCausalLM": StockNames(
        quantized=(*ATTENTION, "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        plain=weights("attention_norm", "ffn_norm"),
    ),
    "Glm4ForCausalLM": StockNames(
        biased=QKV, plain=(*LLAMA_NORMS, *weights("post_self_attn_layernorm", "post_mlp_layernorm"))
    ),
    "OrionForCausalLM": StockNames(plain=both("input_layernorm", "post_attention_layernorm"), outer=LAYER_NORM_OUTER),
    "GemmaForCausalLM": StockNames(),
    "Gemma2ForCausalLM": StockNames(plain=GEMMA_NORMS),
    "Gemma3ForConditionalGeneration": StockNames(
        plain=(*GEMMA_NORMS, *HEAD_NORMS),
        prefix="language_model.",
        copied=("vision_tower.vision_model.", "multi_modal_projector."),
    ),
    "GPT2LMHeadModel": StockNames(
        quantized=(*ATTENTION, *C_MLP),
        biased=(*ATTENTION, *C_MLP),
        plain=both("ln_1", "ln_2"),
        outer=(*LAYER_NORM_OUTER, "model.wpe.weight"),
    ),
    "GPTBigCodeForCausalLM": StockNames(
        quantized=(*ATTENTION, *C_MLP),
        biased=(*ATTENTION, *C_MLP),
        plain=both("ln_1", "ln_2"),
        outer=(*LAYER_NORM_OUTER, "model.wpe.weight"),
    ),
    "MixtralForCausalLM": StockNames(
        quantized=(*ATTENTION, *experts("block_sparse_moe.experts", "w1", "w3", "w2")),
        plain=(*LLAMA_NORMS, "block_sparse_moe.gate.weight"),
    ),
    "Qwen3MoeForCausalLM": StockNames(
        quantized=(*ATTENTION, *experts("mlp.experts", "gate_proj", "up_proj", "down_proj")),
        plain=(*LLAMA_NORMS, *HEAD_NORMS, "mlp.gate.weight"),
    ),
    "DbrxForCausalLM": StockNames(
        quantized=(*ATTENTION, *experts("block_sparse_moe.experts", "w1", "v1", "w2")),
        plain=(*LLAMA_NORMS, "block_sparse_moe.gate.weight"),
    ),
    "GemmoeForCausalLM": StockNames(
        quantized=(*ATTENTION, *experts("block_sparse_moe.experts", "w1", "w3", "w2")),
        plain=(*LLAMA_NORMS, "block_sparse_moe.gate.weight"),
    ),
    "CohereForCausalLM": StockNames(biased=ATTENTION, plain=(*weights("input_layernorm"), *HEAD_NORMS)),
    "Cohere2ForCausalLM": StockNames(plain=weights("input_layernorm")),
    "LlavaForConditionalGeneration": StockNames(
        prefix="language_model.", copied=("vision_tower.", "multi_modal_projector.")
    ),
    "Mistral3ForConditionalGeneration": StockNames(
        prefix="language_model.", copied=("vision_tower.", "multi_modal_projector.")
    ),
    "Qwen2VLForConditionalGeneration": StockNames(biased=QKV, copied=("visual.",)),
    "Qwen2_5_VLForConditionalGeneration": StockNames(biased=QKV, copied=("visual.",)),
    "Starcoder2ForCausalLM": StockNames(
        quantized=(*ATTENTION, *C_MLP),
        biased=(*ATTENTION, *C_MLP),
        plain=both("input_layernorm", "post_attention_layernorm"),
        outer=LAYER_NORM_OUTER,
    ),
}
