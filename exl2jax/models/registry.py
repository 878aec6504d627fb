"""The architectures that can be converted, as data: one entry each, readable as documentation."""

from dataclasses import dataclass

from exl2jax.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What sets one Hugging Face architecture apart inside the common decoder skeleton.

    `qkv_bias`, `o_bias`, `mlp_bias` say whether those linears carry a bias: True, False, or the `config.json` key that
    decides. `activations` are the values of `hidden_act` it is published with.
    """

    name: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    activations: tuple[str, ...] = ("silu",)


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture(name="LlamaForCausalLM", qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    )
}


def find_architecture(names: object, where: str) -> Architecture:
    """The entry for a config's `architectures` list; unknown ones are refused by name, never treated as Llama."""
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedModelError(f"{where}: architectures must name exactly one architecture, got {names!r:.100}")
    if names[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"{where}: architecture {names[0]:.80} is not supported (supported: {known})")
    return ARCHITECTURES[names[0]]
