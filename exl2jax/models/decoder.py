"""Flax modules of the decoder. One module is resident at a time; parameters are arguments, never closures.

A module computes in stages, so that its linears can be swapped, stacked or measured between them: `inputs(stage, ...)`
gives the inputs of the groups of linears of a stage, `linears(stage, ...)` their outputs, `output(...)` the new hidden
state. `Module` binds a kind to a configuration and is the object that callers hold. Parameters are
`{"norm": {"weight", "bias"?}, NAME: {"kernel" [K, N], "bias" [N]?}}` and further norms, float32 or float16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from exl2jax.models.attention import attend
from exl2jax.models.config import ModelConfig
from exl2jax.models.layers import ACTIVATIONS, Linear, Norm, apply_linear, soft_cap
from exl2jax.models.modules import (
    ATTENTION_KIND,
    BRANCH_ATTENTION_KINDS,
    BRANCH_MLP_KIND,
    MLP_KIND,
    MOE_KIND,
    PARALLEL_KINDS,
    SLIDING_KINDS,
    ModuleSpec,
    stage_names,
)
from exl2jax.ops import Products

Outputs = Mapping[str, jax.Array]
Params = Mapping[str, Any]
type Inputs = tuple[jax.Array, ...]
"""Input of each group of linears of a stage, `[B, T, K]`."""


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.arch.norm, (config.hidden_size,), config.norm_eps, config.arch.norm_bias)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


def _gated(config: ModelConfig, outputs: Outputs) -> jax.Array:
    """Input of down: the activated gate times up, or up activated where there is no gate."""
    act, up = ACTIVATIONS[config.activation], outputs["up_proj"]
    return act(outputs["gate_proj"]) * up if config.arch.mlp[0] else act(up)


class Attention(nn.Module):
    """Causal grouped-query self-attention with its positions and norms; q, k, v first, then o.

    With `branch` the residual is left out, as for the attention of a parallel block by itself.
    """

    config: ModelConfig
    sliding: bool = False
    branch: bool = False

    def setup(self) -> None:
        """Declare the norms."""
        c = self.config
        self.norm = _norm(c)
        if c.arch.norms.attention_post:
            self.post_norm = _norm(c)
        if c.head_norm:
            self.q_norm = Norm(c.head_norm, c.head_norm_shape(c.num_heads), c.norm_eps)
            self.k_norm = Norm(c.head_norm, c.head_norm_shape(c.num_kv_heads), c.norm_eps)

    def heads(self, outputs: Outputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values by head, `[B, T, heads, head_dim]`, normalised where the architecture does it."""
        c = self.config
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        q, k, v = (outputs[name].reshape(*outputs[name].shape[:2], count, -1) for name, count in heads.items())
        if c.scales.clip:
            q, k, v = (jnp.clip(x, -c.scales.clip, c.scales.clip) for x in (q, k, v))
        if c.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def inputs(self, stage: int, h: jax.Array, outputs: Outputs) -> Inputs:
        """Input of q, k and v, then that of o."""
        if stage == 0:
            return (self.norm(h),)
        return (attend(self.config, *self.heads(outputs), sliding=self.sliding),)

    def last_inputs(self, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """Input of o for several outputs of v: the weights of the values are computed once."""
        batch, length, _ = last[0].shape
        heads = [v.reshape(batch, length, self.config.num_kv_heads, 1, -1) for v in last]
        wide = jnp.concatenate(heads, axis=3).reshape(batch, length, -1)
        (out,) = self.inputs(1, wide, {**outputs, "v_proj": wide})
        out = out.reshape(batch, length, self.config.num_heads, len(last), -1)
        return [out[:, :, :, i].reshape(batch, length, -1) for i in range(len(last))]

    def output(self, h: jax.Array, outputs: Outputs) -> jax.Array:
        """The new hidden state."""
        y = outputs["o_proj"]
        y = _scaled(self.post_norm(y) if self.config.arch.norms.attention_post else y, self.config.scales.residual)
        return y if self.branch else h + y


class MLP(nn.Module):
    """MLP with its norms; gate (where there is one) and up first, then down. `branch` as in `Attention`."""

    config: ModelConfig
    branch: bool = False

    def setup(self) -> None:
        """Declare the norms."""
        self.norm = _norm(self.config)
        if self.config.arch.norms.mlp_post:
            self.post_norm = _norm(self.config)

    def inputs(self, stage: int, h: jax.Array, outputs: Outputs) -> Inputs:
        """Input of gate and up, then that of down."""
        return (self.norm(h) if stage == 0 else _gated(self.config, outputs),)

    def last_inputs(self, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """Input of down for several outputs of up."""
        return [_gated(self.config, {**outputs, "up_proj": up}) for up in last]

    def output(self, h: jax.Array, outputs: Outputs) -> jax.Array:
        """The new hidden state."""
        y = outputs["down_proj"]
        y = _scaled(self.post_norm(y) if self.config.arch.norms.mlp_post else y, self.config.scales.residual)
        return y if self.branch else h + y


class Parallel(Attention):
    """Attention and MLP side by side on one norm: q, k, v, gate, up first, then o and down, each with its input."""

    def inputs(self, stage: int, h: jax.Array, outputs: Outputs) -> Inputs:
        """Input of the whole first stage, then those of o and down."""
        first = super().inputs(stage, h, outputs)
        return first if stage == 0 else (*first, _gated(self.config, outputs))

    def output(self, h: jax.Array, outputs: Outputs) -> jax.Array:
        """The new hidden state."""
        return h + _scaled(outputs["o_proj"] + outputs["down_proj"], self.config.scales.residual)


class Router(nn.Module):
    """Weights of the experts for each token: the largest few probabilities, scaled to a sum of one."""

    experts: int
    chosen: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Weights `[B, T, experts]` of normed states, zero for experts that a token does not go to."""
        weight = self.param("weight", nn.initializers.lecun_normal(), (self.experts, x.shape[-1]))
        chances = jax.nn.softmax(x @ weight.T, axis=-1)
        best, index = jax.lax.top_k(chances, self.chosen)
        best = best / jnp.sum(best, axis=-1, keepdims=True)
        return jnp.sum(jax.nn.one_hot(index, self.experts) * best[..., None], axis=-2)


class SparseMoe(nn.Module):
    """Experts that a router picks for each token: w1 and w3 of every expert first, then w2 of every expert.

    `experts` are those in memory, None for all. The outputs of pieces add up: the residual is part of the first.
    """

    config: ModelConfig
    experts: range | None = None

    @property
    def held(self) -> range:
        """The experts in memory."""
        return range(self.config.num_experts) if self.experts is None else self.experts

    def setup(self) -> None:
        """Declare the norm and the router, which both stay unquantized."""
        self.norm = _norm(self.config)
        self.router = Router(self.config.num_experts, self.config.experts_per_token)

    def inputs(self, stage: int, h: jax.Array, outputs: Outputs) -> Inputs:
        """Input of each expert's w1 and w3, then that of its w2."""
        if stage == 0:
            return (self.norm(h),) * len(self.held)
        act = ACTIVATIONS[self.config.activation]
        return tuple(act(outputs[f"w1.{e}"]) * outputs[f"w3.{e}"] for e in self.held)

    def routing(self, h: jax.Array) -> jax.Array:
        """Weights of the experts in memory, `[B, T, experts]`; the router chooses among all experts."""
        return self.router(self.norm(h))[..., self.held.start : self.held.stop]

    def output(self, h: jax.Array, outputs: Outputs) -> jax.Array:
        """The new hidden state, or the part of it that these experts add."""
        weights = self.routing(h)
        y = sum(weights[..., i, None] * outputs[f"w2.{e}"] for i, e in enumerate(self.held))
        y = _scaled(jnp.asarray(y), self.config.scales.residual)
        return y if self.held.start else h + y


class Head(nn.Module):
    """Final norm and language-model head."""

    config: ModelConfig

    def setup(self) -> None:
        """Declare the parameters."""
        self.norm = _norm(self.config)
        self.lm_head = Linear(self.config.vocab_size)

    def first_input(self, h: jax.Array) -> jax.Array:
        """Input of the head's linear, `[B, T, D]`."""
        return self.norm(h)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Logits `[B, T, vocab]`."""
        scales = self.config.scales
        return soft_cap(_scaled(self.lm_head(self.norm(h)), scales.logits), scales.logits_cap)


class Trace(NamedTuple):
    """A module's forward pass: the new hidden state, the input of each group of linears stage by stage, and the
    output of each linear by name.
    """  # noqa: D205

    hidden: jax.Array
    inputs: tuple[Inputs, ...]
    outputs: dict[str, jax.Array]


@dataclass(frozen=True)
class Module:
    """One module of a decoder as pure functions of its parameters. Hashable, so it can be static under `jit`.

    `experts` are those of a mixture that it computes with, None for all; `products` are those of its linears.
    """

    config: ModelConfig
    kind: str
    experts: range | None = None
    products: Products = Products.FLOAT32

    @property
    def exact(self) -> "Module":
        """The same module with products in float32."""
        return replace(self, products=Products.FLOAT32)

    @property
    def stages(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Names of the linears by stage and group."""
        return stage_names(self.config, self.kind, self.experts)

    @property
    def last(self) -> int:
        """The last stage, whose linears write to the residual stream."""
        return len(self.stages) - 1

    def inputs(self, stage: int, params: Params, states: jax.Array, outputs: Outputs) -> Inputs:
        """Inputs of the groups of linears of a stage, given the outputs of the stages before by linear name."""
        return self._apply(params, "inputs", stage, states, outputs)

    def inputs_through(self, stage: int, params: Params, states: jax.Array) -> tuple[Inputs, dict[str, jax.Array]]:
        """Inputs of the groups of linears of a stage, and the outputs of the stages before it."""
        outputs: dict[str, jax.Array] = {}
        for before in range(stage):
            outputs |= self.linears(before, params, self.inputs(before, params, states, outputs))
        return self.inputs(stage, params, states, outputs), outputs

    def last_inputs(self, params: Params, outputs: Outputs, last: Sequence[jax.Array]) -> list[jax.Array]:
        """Input of the last stage of attention or MLP for several outputs of the first stage's last linear."""
        return self._apply(params, "last_inputs", outputs, last)

    def heads(self, params: Params, outputs: Outputs) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of an attention module by head."""
        return self._apply(params, "heads", outputs)

    def linears(self, stage: int, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
        """Outputs of a stage's linears; linears of experts have one shape and are computed in one batched product."""
        groups, apply = self.stages[stage], partial(apply_linear, products=self.products)
        if self.kind != MOE_KIND:
            return {n: apply(params[n], x) for names, x in zip(groups, inputs, strict=True) for n in names}
        out: dict[str, jax.Array] = {}
        for names in zip(*groups, strict=True):
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
            ys = jax.vmap(apply)(stacked, jnp.stack(inputs))
            out |= {name: ys[e] for e, name in enumerate(names)}
        return out

    def output(self, params: Params, states: jax.Array, outputs: Outputs) -> jax.Array:
        """The new hidden state, from the outputs of the last stage's linears."""
        return self._apply(params, "output", states, outputs)

    def routed(self, params: Params, states: jax.Array) -> jax.Array | None:
        """Which tokens go to each expert, `[B, T, experts]` of 0 and 1; None where there are no experts."""
        if self.kind != MOE_KIND:
            return None
        return (self._apply(params, "routing", states) > 0).astype(jnp.float32)

    def forward(self, params: Params, states: jax.Array, probes: Outputs | None = None) -> Trace:
        """Run the module on `states [B, T, D]`; `probes` are added to the outputs of the linears that they name."""
        outputs: dict[str, jax.Array] = {}
        inputs = []
        for stage in range(len(self.stages)):
            inputs.append(self.inputs(stage, params, states, outputs))
            for name, y in self.linears(stage, params, inputs[-1]).items():
                outputs[name] = y if probes is None else y + probes[name]
        return Trace(self.output(params, states, outputs), tuple(inputs), outputs)

    @property
    def residual_share(self) -> float:
        """The change of a last-stage linear's output that moves the residual stream by one.

        Zero where a norm stands between, half where two linears write side by side.
        """
        norms, attention = self.config.arch.norms, self.kind not in (MLP_KIND, BRANCH_MLP_KIND, MOE_KIND)
        if norms.attention_post if attention else norms.mlp_post:
            return 0.0
        return (0.5 if self.kind in PARALLEL_KINDS else 1.0) / self.config.scales.residual

    def _apply(self, params: Params, method: str, *args: Any) -> Any:
        return self._layer.apply({"params": params}, *args, method=method)

    @property
    def _layer(self) -> Attention | MLP | SparseMoe:
        """The Flax module of this kind."""
        sliding = self.kind in SLIDING_KINDS
        if self.kind in PARALLEL_KINDS:
            return Parallel(self.config, sliding)
        if self.kind in (MLP_KIND, BRANCH_MLP_KIND):
            return MLP(self.config, branch=self.kind == BRANCH_MLP_KIND)
        if self.kind == MOE_KIND:
            return SparseMoe(self.config, self.experts)
        if self.kind == ATTENTION_KIND or sliding or self.kind in BRANCH_ATTENTION_KINDS:
            return Attention(self.config, sliding, branch=self.kind in BRANCH_ATTENTION_KINDS)
        raise ValueError(f"no module of kind {self.kind}")


class Decoder(NamedTuple):
    """The modules of a model and its head, as pure functions. Hashable, so it can be static under `jit`.

    `products` are those of the linears in its modules; the head's are in float32.
    """

    config: ModelConfig
    products: Products = Products.FLOAT32

    def module(self, spec: ModuleSpec) -> Module:
        """A module, or the piece of one that `spec` holds."""
        return Module(self.config, spec.kind, spec.experts, self.products)

    def head_input(self, params: Params, h: jax.Array) -> jax.Array:
        """Input of the head's linear."""
        return Head(self.config).apply({"params": params}, h, method="first_input")  # type: ignore[return-value]

    def logits(self, params: Params, h: jax.Array) -> jax.Array:
        """Logits of the final hidden state."""
        return Head(self.config).apply({"params": params}, h)  # type: ignore[return-value]


def build_decoder(config: ModelConfig, products: Products = Products.FLOAT32) -> Decoder:
    """The decoder of a configuration."""
    return Decoder(config, products)
