"""The modules of a model in the order a pass walks them, with the linears each holds.

A module is one residual sublayer: attention (with its norm) or MLP. Its linears come in two stages: the first reads
the normed hidden state (q, k, v or gate, up), the second reads what the first produced (o or down). Linears of one
stage share their input, and so their Hessian.
"""

from dataclasses import dataclass

from exl2jax.models.config import ModelConfig

ATTENTION_KIND = "self_attn"
MLP_KIND = "mlp"
HEAD_KEY = "lm_head"
EMBED_KEY = "model.embed_tokens"
NORM_KEY = "model.norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """A linear: `name` within its module, full tensor `key`, `[rows, columns]`, and whether it has a bias."""

    name: str
    key: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, which bits per weight is counted over."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """A residual sublayer: its measurement `key`, its kind, the key of its norm, and its two stages of linears."""

    key: str
    kind: str
    layer: int
    norm_key: str
    first: tuple[LinearSpec, ...]
    second: LinearSpec

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear, in the order of a candidate row."""
        return (*self.first, self.second)

    @property
    def weights(self) -> int:
        """Number of weights of all linears."""
        return sum(linear.weights for linear in self.linears)


def module_specs(config: ModelConfig) -> tuple[ModuleSpec, ...]:
    """Every module of the decoder in order: attention and MLP of each layer."""
    return tuple(spec for i in range(config.num_layers) for spec in (_attention(config, i), _mlp(config, i)))


def head_spec(config: ModelConfig) -> LinearSpec:
    """The language-model head."""
    return LinearSpec(name=HEAD_KEY, key=HEAD_KEY, rows=config.hidden_size, columns=config.vocab_size)


def last_module_index(config: ModelConfig) -> int:
    """Index of the head as stock counts modules: embedding, two per layer, norm, head."""
    return 2 * config.num_layers + 2


def _attention(config: ModelConfig, i: int) -> ModuleSpec:
    key = f"model.layers.{i}.self_attn"
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(name: str, rows: int, columns: int, bias: bool) -> LinearSpec:
        return LinearSpec(name=name, key=f"{key}.{name}", rows=rows, columns=columns, bias=bias)

    return ModuleSpec(
        key=key,
        kind=ATTENTION_KIND,
        layer=i,
        norm_key=f"model.layers.{i}.input_layernorm",
        first=(
            linear("q_proj", config.hidden_size, wide, config.qkv_bias),
            linear("k_proj", config.hidden_size, narrow, config.qkv_bias),
            linear("v_proj", config.hidden_size, narrow, config.qkv_bias),
        ),
        second=linear("o_proj", wide, config.hidden_size, config.o_bias),
    )


def _mlp(config: ModelConfig, i: int) -> ModuleSpec:
    key = f"model.layers.{i}.mlp"

    def linear(name: str, rows: int, columns: int) -> LinearSpec:
        return LinearSpec(name=name, key=f"{key}.{name}", rows=rows, columns=columns, bias=config.mlp_bias)

    return ModuleSpec(
        key=key,
        kind=MLP_KIND,
        layer=i,
        norm_key=f"model.layers.{i}.post_attention_layernorm",
        first=tuple(linear(n, config.hidden_size, config.intermediate_size) for n in ("gate_proj", "up_proj")),
        second=linear("down_proj", config.intermediate_size, config.hidden_size),
    )
