"""Recipes: which of the algorithm's choices a conversion makes, as one frozen value, and the presets that name them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from exl2jax.errors import SettingsError

type Pricing = Literal["fisher", "divergence", "accuracy"]

STRONGEST = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The choices of a conversion.

    `pricing` is what bits are spent against. `fisher`: the expected KL divergence of the model's output by Fisher
    information, every linear a slot of its own and every mixture of widths an option. `divergence`: the same, with
    relative errors in place of gradients. `accuracy`: stock's relative error of a module's output, a module a slot and
    stock's table its options. `fisher_rows` are the rows of the forward and backward passes, `divergence_rows` how many
    of them measure what perturbing each module alone does, to scale its costs by (0: not at all; `divergence` rests on
    it). `accuracies` measures stock's accuracies as well, for tools that read stock's files. `propagation` (0 to 1) is
    how far a linear's target is corrected for the inputs that the quantized model gives it, `residual` how far the
    linears that write to the residual stream correct the stream's own error; 0 for both quantizes towards the source's
    weights, as stock does.
    """

    name: str
    pricing: Pricing
    fisher_rows: int = 8
    divergence_rows: int = 0
    accuracies: bool = False
    propagation: float = 0.0
    residual: float = 0.0

    def __post_init__(self) -> None:
        """Refuse strengths out of range."""
        for name, value in (("propagation", self.propagation), ("residual", self.residual)):
            if not 0 <= value <= STRONGEST:
                raise SettingsError(f"recipe {self.name}: {name} is {value}; it must lie between 0 and {STRONGEST:g}")
        if self.fisher_rows < 1:
            raise SettingsError(f"recipe {self.name}: fisher_rows is {self.fisher_rows}; it must be at least 1")
        least = 1 if self.pricing == "divergence" else 0
        if not least <= self.divergence_rows <= self.fisher_rows:
            raise SettingsError(
                f"recipe {self.name}: divergence_rows is {self.divergence_rows}; it must lie between {least} and "
                f"fisher_rows, {self.fisher_rows}"
            )

    @property
    def passes(self) -> tuple[str, ...]:
        """The measuring passes that its pricing needs, in order."""
        if self.pricing == "accuracy":
            return ("measure",)
        gradients = ("backward",) if self.pricing == "fisher" else ()
        measured = ("perturb",) if self.divergence_rows else ()
        exact = ("measure",) if self.accuracies else ()
        return ("forward", *gradients, *measured, "price", *exact)

    @property
    def propagates(self) -> bool:
        """Whether the quantization pass carries a full-precision stream beside the quantized one."""
        return self.propagation > 0 or self.residual > 0

    @property
    def measuring(self) -> "Recipe":
        """The recipe's choices that decide the measurement, the others at their defaults: equal where it is shared."""
        rows = {"fisher_rows": self.fisher_rows} if self.pricing == "fisher" else {}
        return Recipe(name="measuring", pricing=self.pricing, **rows)


PRESETS = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="best", pricing="fisher", propagation=0.5, residual=0.5),
        Recipe(name="fast", pricing="fisher", fisher_rows=4),
        Recipe(name="stock", pricing="accuracy"),
    )
}
"""Recipes by the name that `--preset` takes."""

DEFAULT_PRESET = "best"


def find_recipe(preset: str) -> Recipe:
    """The recipe of a preset; `SettingsError` names the choices for any other name."""
    if preset not in PRESETS:
        raise SettingsError(f"--preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def recipe_from(choices: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of one's own: fields of `Recipe` laid over the preset `choices["preset"]`, the default one if none."""
    preset = find_recipe(choices.get("preset", DEFAULT_PRESET))
    known = [field.name for field in fields(Recipe) if field.name != "name"]
    changes = {key: value for key, value in choices.items() if key != "preset"}
    for key, value in changes.items():
        if key not in known:
            raise SettingsError(f"recipe {name}: there is no choice {key!r}; there are preset, {', '.join(known)}")
        if isinstance(getattr(preset, key), float | int) and type(value) not in (int, float):
            raise SettingsError(f"recipe {name}: {key} must be a number, got {value!r:.40}")
    return replace(preset, name=name, **changes)
