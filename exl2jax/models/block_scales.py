"""Multipliers and soft caps of a model: one record, read from the keys that each architecture has for them."""

import math
from dataclasses import dataclass

from exl2jax.errors import UnsupportedModelError
from exl2jax.models.fields import Fields

NEUTRAL = {
    "embedding_multiplier": (1,),
    "scale_emb": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_depth": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "partial_rotary_factor": (1,),
    "norm_head": (0,),
    "use_qk_norm": (0,),
    "mlp_bias": (0,),
    "attention_bias": (0,),
}
"""Keys that the stock runtime applies to every model, with the values that change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """`embedding` multiplies the embeddings, `residual` what a sublayer adds, `logits` the logits; `attention` is the
    scale of the scores (None: root of the head size), the caps bound scores and logits by `cap * tanh(x / cap)`.
    `norm_head`: the rows of the head are scaled to length one. `clip` bounds queries, keys and values.
    """  # noqa: D205

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    attention: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    norm_head: bool = False
    clip: float | None = None


NEUTRAL_SCALES = Scales()


def read_scales(fields: Fields, layers: int, hidden: int, head_dim: int) -> Scales:
    """The scales of a model; keys that its architecture does not know are refused, as the runtime would apply them."""
    _refuse_foreign(fields)
    embedding = fields.number("embedding_multiplier") or fields.number("scale_emb") or 1.0
    if fields.arch.scaled_embeddings:
        embedding = math.sqrt(hidden)
    depth, residual = fields.number("scale_depth"), fields.number("residual_multiplier", 1.0) or 1.0
    attention, query = fields.number("attention_multiplier"), fields.number("query_pre_attn_scalar")
    return Scales(
        embedding=embedding,
        residual=residual if depth is None else depth / math.sqrt(layers),
        logits=_logits(fields, hidden),
        attention=attention or (query**-0.5 if query else head_dim**-0.5),
        attention_cap=fields.number("attn_logit_softcapping"),
        logits_cap=fields.number("final_logit_softcapping"),
        norm_head=fields.flag("norm_head"),
        clip=fields.number(fields.arch.clip_key) if fields.arch.clip_key else None,
    )


def _logits(fields: Fields, hidden: int) -> float:
    scaling = fields.number("logits_scaling")
    if scaling is not None:
        return 1.0 / scaling
    base = fields.number("dim_model_base", hidden) if "dim_model_base" in fields.arch.scales else hidden
    return (fields.number("logit_scale") or 1.0) * (base or hidden) / hidden


def _refuse_foreign(fields: Fields) -> None:
    arch = fields.arch
    known = {*arch.scales, arch.qkv_bias, arch.o_bias, arch.mlp_bias, arch.head_norm_switch}
    granted = dict(arch.taken_for_granted)
    for key, neutral in NEUTRAL.items():
        value = fields.get(key)
        if value is None or key in known or key in granted or value in neutral:
            continue
        if key == "attention_bias" and arch.qkv_bias is True:
            continue  # the biases are there anyway
        if key == "use_qk_norm" and arch.head_norm and value:
            continue
        raise UnsupportedModelError(
            f"{fields.where}: {key} {value!r:.40} means nothing to {arch.name}, but the runtime would apply it"
        )
