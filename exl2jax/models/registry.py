"""The form of an entry of the architecture registry, and the search for a model's entry (entries: `architectures`).

Everything a Hugging Face architecture does differently inside the common decoder skeleton is a field here, with the
Llama way as its default. Tensor names are those that the stock runtime looks up; `aliases`, `renames`, `fused` and
`transposed` lead from a source's names to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exl2jax.errors import UnsupportedModelError

UNUSED = ("*.rotary_emb.*", "mtp.*", "*.mtp.*", "*.mtp_layers.*")
"""Tensors that any source may hold and nothing reads: rotary tables, and layers that predict several tokens."""

type Switch = bool | str
"""True, False, or the `config.json` key that decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """A source tensor that holds several linears: output rows stacked in order of `parts`, or, when `interleaved`,
    grouped by key/value head (the queries of a group, its key, its value). `experts`: one linear of every expert, one
    below the other, each `[in, out]` where `transposed`.
    """  # noqa: D205

    source: str
    parts: tuple[str, ...]
    interleaved: bool = False
    experts: bool = False
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Norms:
    """Names, within a layer, of the norms before and after attention and MLP; None where there is none."""

    attention: str = "input_layernorm"
    mlp: str = "post_attention_layernorm"
    attention_post: str | None = None
    mlp_post: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The differences of one Hugging Face architecture from Llama.

    `prefix` stands before the tensor names of a language model inside a larger one, `copied` are the prefixes of the
    rest, which is copied as it is.

    Linears: `qkv_bias`, `o_bias`, `mlp_bias` say which carry a bias. `mlp` names gate, up and down within a layer (gate
    None: no gate). `fused`, `renames` (old, new; `^` anchors at the start) and `transposed` (weights `[in, out]`)
    describe the source's tensors; all three are undone on the way back, so each replacement must have an inverse.
    `aliases` come first: they lead from other names that sources are published under to the one that `renames` expect.

    Norms: `norm` is `rms` or `layer`, `norm_bias` whether it has a bias, `norm_offset` what is added to its weight,
    `eps_keys` where `config.json` holds its epsilon (stock's key first; none: 1e-5). `head_norm` normalises queries and
    keys per head where `head_norm_switch` is on; `clip_key` bounds queries, keys and values.

    Attention: `rotary` turns `half` (pairs half a head apart) or `pairs` (neighbours), None learns `positions` instead.
    `window` says which layers slide: `none`, `all`, `switched` (all, if
    `use_sliding_window`), `upper` (from `max_window_layers` on, likewise) or
    `pattern` (all but each `pattern`-th; `stock_pattern` is what the stock runtime assumes where no key says it).
    `local_theta`: the rotary base of sliding layers, where it is another.
    `nope`: full layers have no rotary positions. `multi_query`: one key/value head, always.
    `parallel` puts attention and MLP side by side on one norm. `router` names the router of a mixture of experts, whose
    `mlp` names have a star for the expert, and `inner_key` the key of an MLP's or expert's width;
    `inner_multiple` times the hidden size is the default width of an MLP.

    Scales: `scales` are the `config.json` keys with multipliers and caps that the architecture knows; the stock
    runtime applies them to every model, so others are refused. `scaled_embeddings`: by the root of the hidden size.
    `wide_residual`: the stock runtime keeps the hidden states in float32, those of others in half precision.

    `defaults` stand in for keys that `config.json` leaves out, `stock_defaults` too, and the stock runtime knows these
    by itself. `taken_for_granted` are values that the stock runtime takes without looking, so that any other is
    refused; `demanded` ones must be there as well. `tied` is the default of `tie_word_embeddings`. `unused` are
    patterns over the source's names of tensors that the runtime is known not to read: they cause no warning. `proof`
    names the model of `transformers` that the logits are compared with.
    """

    name: str
    proof: str = ""
    prefix: str = ""
    copied: tuple[str, ...] = ()
    qkv_bias: Switch = False
    o_bias: Switch = False
    mlp_bias: Switch = False
    mlp: tuple[str | None, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    fused: tuple[Fused, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    norm: str = "rms"
    norm_bias: bool = False
    norm_offset: float = 0.0
    norms: Norms = Norms()
    eps_keys: tuple[str, ...] = ("rms_norm_eps",)
    head_norm: str | None = None
    head_norm_switch: Switch = True
    clip_key: str | None = None
    rotary: str | None = "half"
    positions: str | None = None
    window: str = "none"
    pattern: int = 0
    stock_pattern: int = 0
    local_theta: str | None = None
    nope: bool = False
    multi_query: bool = False
    parallel: bool = False
    router: str | None = None
    inner_key: str = "intermediate_size"
    inner_multiple: int = 0
    activation_keys: tuple[str, ...] = ("hidden_act",)
    activations: tuple[str, ...] = ("silu",)
    scales: tuple[str, ...] = ()
    scaled_embeddings: bool = False
    wide_residual: bool = False
    tied: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    stock_defaults: tuple[tuple[str, Any], ...] = ()
    demanded: tuple[tuple[str, Any], ...] = ()
    taken_for_granted: tuple[tuple[str, Any], ...] = ()
    unused: tuple[str, ...] = ()
    noise_rows: bool = False


def find_architecture(known: Mapping[str, Architecture], names: object, where: str) -> Architecture:
    """The entry for a config's `architectures` list; unknown ones are refused by name, never treated as Llama."""
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedModelError(f"{where}: architectures must name exactly one architecture, got {names!r:.100}")
    if names[0] not in known:
        supported = ", ".join(sorted(known))
        raise UnsupportedModelError(f"{where}: architecture {names[0]:.80} is not supported (supported: {supported})")
    return known[names[0]]
