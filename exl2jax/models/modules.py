"""The modules of a model in the order a pass walks them, with the linears and norms each holds.

A module is one residual sublayer: attention (with its norm) or MLP. Its linears come in two stages: the first reads
the normed hidden state (q, k, v or gate, up), the second reads what the first produced (o or down). Linears of one
stage share their input, and so their Hessian.
"""

from dataclasses import dataclass

from exl2jax.models.config import ModelConfig

ATTENTION_KIND = "self_attn"
SLIDING_KIND = "sliding_attn"
MLP_KIND = "mlp"
ATTENTION_KINDS = (ATTENTION_KIND, SLIDING_KIND)
HEAD_KEY = "lm_head"

type Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


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
class NormSpec:
    """A norm: `name` among the parameters of its module, tensor `key`, shape of its weight, whether it has a bias."""

    name: str
    key: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def tensors(self) -> Shapes:
        """Its tensors, which are copied as they are."""
        return {f"{self.key}.{part}": self.shape for part in (("weight", "bias") if self.bias else ("weight",))}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """A residual sublayer: its measurement `key`, its kind, its norms (that of its input first), its linears."""

    key: str
    kind: str
    layer: int
    norms: tuple[NormSpec, ...]
    first: tuple[LinearSpec, ...]
    second: LinearSpec

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear, in the order of a candidate row."""
        return (*self.first, self.second)

    @property
    def plain(self) -> Shapes:
        """Tensors that stay unquantized."""
        return {name: shape for norm in self.norms for name, shape in norm.tensors.items()}

    @property
    def weights(self) -> int:
        """Number of weights of all linears."""
        return sum(linear.weights for linear in self.linears)


def module_specs(config: ModelConfig) -> tuple[ModuleSpec, ...]:
    """Every module of the decoder in order: attention and MLP of each layer."""
    return tuple(spec for i in range(config.num_layers) for spec in (_attention(config, i), _mlp(config, i)))


def head_spec(config: ModelConfig) -> LinearSpec:
    """The language-model head."""
    key = f"{config.arch.prefix}{HEAD_KEY}"
    return LinearSpec(name=HEAD_KEY, key=key, rows=config.hidden_size, columns=config.vocab_size)


def head_norm_spec(config: ModelConfig) -> NormSpec:
    """The norm before the head."""
    return _norm(config, "norm", f"{config.arch.prefix}model.norm")


def embedding_name(config: ModelConfig) -> str:
    """The table that tokens are looked up in."""
    return f"{config.arch.prefix}model.embed_tokens.weight"


def embedding_shapes(config: ModelConfig) -> Shapes:
    """Tensors that tokens and positions are looked up in."""
    shapes: Shapes = {embedding_name(config): (config.vocab_size, config.hidden_size)}
    if config.arch.positions:
        shapes[f"{config.arch.positions}.weight"] = (config.max_position, config.hidden_size)
    return shapes


def last_module_index(config: ModelConfig) -> int:
    """Index of the head as stock counts modules: embedding, positions if learned, two per layer, norm, head."""
    return 2 * config.num_layers + 2 + bool(config.arch.positions)


def _layer(config: ModelConfig, i: int) -> str:
    return f"{config.arch.prefix}model.layers.{i}"


def _norm(config: ModelConfig, name: str, key: str) -> NormSpec:
    return NormSpec(name=name, key=key, shape=(config.hidden_size,), bias=config.arch.norm_bias)


def _norms(config: ModelConfig, i: int, before: str, after: str | None) -> tuple[NormSpec, ...]:
    names = {"norm": before} | ({"post_norm": after} if after else {})
    return tuple(_norm(config, name, f"{_layer(config, i)}.{key}") for name, key in names.items())


def _attention(config: ModelConfig, i: int) -> ModuleSpec:
    key, hidden = f"{_layer(config, i)}.self_attn", config.hidden_size
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = _norms(config, i, config.arch.norms.attention, config.arch.norms.attention_post)
    if config.head_norm:
        heads = {"q_norm": config.num_heads, "k_norm": config.num_kv_heads}
        norms += tuple(
            NormSpec(name=n, key=f"{key}.{n}", shape=config.head_norm_shape(count)) for n, count in heads.items()
        )

    def linear(name: str, rows: int, columns: int, bias: bool) -> LinearSpec:
        return LinearSpec(name=name, key=f"{key}.{name}", rows=rows, columns=columns, bias=bias)

    return ModuleSpec(
        key=key,
        kind=SLIDING_KIND if config.is_sliding(i) else ATTENTION_KIND,
        layer=i,
        norms=norms,
        first=(
            linear("q_proj", hidden, wide, config.qkv_bias),
            linear("k_proj", hidden, narrow, config.qkv_bias),
            linear("v_proj", hidden, narrow, config.qkv_bias),
        ),
        second=linear("o_proj", wide, hidden, config.o_bias),
    )


def _mlp(config: ModelConfig, i: int) -> ModuleSpec:
    layer, hidden, inner = _layer(config, i), config.hidden_size, config.intermediate_size
    gate, up, down = config.arch.mlp

    def linear(name: str, key: str, rows: int, columns: int) -> LinearSpec:
        return LinearSpec(name=name, key=f"{layer}.{key}", rows=rows, columns=columns, bias=config.mlp_bias)

    first = (linear("up_proj", up, hidden, inner),)
    return ModuleSpec(
        key=f"{layer}.mlp",
        kind=MLP_KIND,
        layer=i,
        norms=_norms(config, i, config.arch.norms.mlp, config.arch.norms.mlp_post),
        first=(linear("gate_proj", gate, hidden, inner), *first) if gate else first,
        second=linear("down_proj", down, inner, hidden),
    )
