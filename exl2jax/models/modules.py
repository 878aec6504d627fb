"""The modules of a model in the order a pass walks them, with the linears and norms each holds.

A module adds to the hidden state: attention (with its norm), MLP, a mixture of experts, or attention and MLP side by
side. Its linears come in stages: the first reads the normed hidden state (q, k, v or gate, up), the next what the first
produced (o or down). Linears of one group read the same input, and so share a Hessian.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from exl2jax.models.config import ModelConfig

ATTENTION_KIND = "self_attn"
SLIDING_KIND = "sliding_attn"
MLP_KIND = "mlp"
MOE_KIND = "block_sparse_moe"
PARALLEL_KINDS = ("parallel_decoder", "sliding_parallel_decoder")
BRANCH_ATTENTION_KINDS = ("branch_attn", "sliding_branch_attn")
BRANCH_MLP_KIND = "branch_mlp"
SLIDING_KINDS = (SLIDING_KIND, PARALLEL_KINDS[1], BRANCH_ATTENTION_KINDS[1])
ATTENTION_KINDS = (ATTENTION_KIND, SLIDING_KIND, *PARALLEL_KINDS)
"""Modules with attention in them."""

HEAD_KEY = "lm_head"

_QKV, _O, _DOWN = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("down_proj",)

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

    @property
    def role(self) -> str:
        """Its name in a candidate; linears of different experts share one, such as `w1`."""
        return self.name.partition(".")[0]


type LinearGroup = tuple[LinearSpec, ...]
"""Linears that read one input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """A norm or a router, which stays unquantized.

    `name` is its name among its module's parameters, `key` its tensor, `shape` that of its weight, `offset` is added to
    its weight.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    bias: bool = False
    offset: float = 0.0

    @property
    def tensors(self) -> Shapes:
        """Its tensors, which are copied as they are."""
        return {f"{self.key}.{part}": self.shape for part in (("weight", "bias") if self.bias else ("weight",))}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleSpec:
    """A module: its measurement `key`, its kind, its unquantized norms, and its linears by stage and group.

    `index` is its place as stock counts modules, from the embedding at 0.
    `slots` are the parts whose candidates are measured separately: the branches of a parallel block, else the module.
    `experts` are those that a piece of a mixture holds, None for a whole module.
    """

    key: str
    kind: str
    layer: int
    index: int = 0
    norms: tuple[NormSpec, ...]
    stages: tuple[tuple[LinearGroup, ...], ...]
    branches: tuple["ModuleSpec", ...] = ()
    experts: range | None = None

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        """All groups, stage after stage."""
        return tuple(group for stage in self.stages for group in stage)

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear, in the order of a candidate row."""
        return tuple(linear for group in self.groups for linear in group)

    @property
    def slots(self) -> tuple["ModuleSpec", ...]:
        """The parts that are measured separately."""
        return self.branches or (self,)

    @property
    def plain(self) -> Shapes:
        """Tensors that stay unquantized."""
        return {name: shape for norm in self.norms for name, shape in norm.tensors.items()}

    @property
    def weights(self) -> int:
        """Number of weights of all linears."""
        return sum(linear.weights for linear in self.linears)


def stage_names(
    config: ModelConfig, kind: str, experts: range | None = None
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Names of the linears of a module by stage and group; `experts` of a mixture only, None for all."""
    up = ("gate_proj", "up_proj") if config.arch.mlp[0] else ("up_proj",)
    if kind in (MLP_KIND, BRANCH_MLP_KIND):
        return (up,), (_DOWN,)
    if kind in PARALLEL_KINDS:
        return ((*_QKV, *up),), (_O, _DOWN)
    if kind == MOE_KIND:
        experts = range(config.num_experts) if experts is None else experts
        return tuple((f"w1.{e}", f"w3.{e}") for e in experts), tuple((f"w2.{e}",) for e in experts)
    return (_QKV,), (_O,)


def module_specs(config: ModelConfig) -> tuple[ModuleSpec, ...]:
    """Every module of the decoder in order."""
    first = 2 if config.arch.positions else 1
    specs = (spec for i in range(config.num_layers) for spec in _layer_specs(config, i))
    return tuple(replace(spec, index=index) for index, spec in enumerate(specs, first))


def slots_of(specs: Iterable[ModuleSpec]) -> tuple[ModuleSpec, ...]:
    """The parts of modules that are measured separately."""
    return tuple(slot for spec in specs for slot in spec.slots)


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


def _layer_specs(config: ModelConfig, i: int) -> Iterator[ModuleSpec]:
    layer, sliding = f"{config.arch.prefix}model.layers.{i}", config.is_sliding(i)
    names = config.arch.norms
    norms = _norms(config, layer, names.attention, names.attention_post) + _head_norms(config, layer)
    if config.arch.parallel:
        kind = PARALLEL_KINDS[sliding]
        whole = _module(config, i, f"{layer}.parallel_decoder", kind, norms)
        kinds = {"attn": BRANCH_ATTENTION_KINDS[sliding], "mlp": BRANCH_MLP_KIND}
        branches = tuple(_module(config, i, f"{whole.key}.{part}", kind, norms) for part, kind in kinds.items())
        yield replace(whole, branches=branches)
        return
    yield _module(config, i, f"{layer}.self_attn", SLIDING_KIND if sliding else ATTENTION_KIND, norms)
    norms = _norms(config, layer, names.mlp, names.mlp_post)
    if config.num_experts:
        shape = (config.num_experts, config.hidden_size)
        norms += (NormSpec(name="router", key=f"{layer}.{config.arch.router}", shape=shape),)
        yield _module(config, i, f"{layer}.{MOE_KIND}", MOE_KIND, norms)
    else:
        yield _module(config, i, f"{layer}.mlp", MLP_KIND, norms)


def _module(config: ModelConfig, i: int, key: str, kind: str, norms: tuple[NormSpec, ...]) -> ModuleSpec:
    stages = tuple(
        tuple(tuple(_linear(config, i, name) for name in names) for names in groups)
        for groups in stage_names(config, kind)
    )
    return ModuleSpec(key=key, kind=kind, layer=i, norms=norms, stages=stages)


def _linear(config: ModelConfig, i: int, name: str) -> LinearSpec:
    hidden, inner = config.hidden_size, config.intermediate_size
    wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    role, _, expert = name.partition(".")
    gate, up, down = (key or "" for key in config.arch.mlp)
    key, rows, columns, bias = {
        "q_proj": ("self_attn.q_proj", hidden, wide, config.qkv_bias),
        "k_proj": ("self_attn.k_proj", hidden, narrow, config.qkv_bias),
        "v_proj": ("self_attn.v_proj", hidden, narrow, config.qkv_bias),
        "o_proj": ("self_attn.o_proj", wide, hidden, config.o_bias),
        "gate_proj": (gate, hidden, inner, config.mlp_bias),
        "up_proj": (up, hidden, inner, config.mlp_bias),
        "down_proj": (down, inner, hidden, config.mlp_bias),
        "w1": (gate, hidden, inner, False),
        "w3": (up, hidden, inner, False),
        "w2": (down, inner, hidden, False),
    }[role]
    layer = f"{config.arch.prefix}model.layers.{i}"
    return LinearSpec(name=name, key=f"{layer}.{key.replace('*', expert)}", rows=rows, columns=columns, bias=bias)


def _norm(config: ModelConfig, name: str, key: str) -> NormSpec:
    arch = config.arch
    return NormSpec(name=name, key=key, shape=(config.hidden_size,), bias=arch.norm_bias, offset=arch.norm_offset)


def _norms(config: ModelConfig, layer: str, before: str, after: str | None) -> tuple[NormSpec, ...]:
    names = {"norm": before} | ({"post_norm": after} if after else {})
    return tuple(_norm(config, name, f"{layer}.{key}") for name, key in names.items())


def _head_norms(config: ModelConfig, layer: str) -> tuple[NormSpec, ...]:
    if not config.head_norm:
        return ()
    heads = {"q_norm": config.num_heads, "k_norm": config.num_kv_heads}
    return tuple(
        NormSpec(
            name=name,
            key=f"{layer}.self_attn.{name}",
            shape=config.head_norm_shape(count),
            offset=config.arch.norm_offset,
        )
        for name, count in heads.items()
    )
