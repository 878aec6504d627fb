"""Recipes: which of the algorithm's choices a conversion makes, as one frozen value, and the presets that name them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from exl2jax.errors import SettingsError
from exl2jax.variants import KINDS, Choice, Method, choose

type Pricing = Literal["fisher", "divergence", "accuracy"]

STRONGEST = 1.0

IDLE_IN_MEASUREMENT = ("objective", "tuning")
"""Kinds of variants that come after the measurement."""


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
    weights, as stock does. `variants` are choices among the registered variants of other steps (`exl2jax.variants`),
    stock's where they say nothing.
    """

    name: str
    pricing: Pricing
    fisher_rows: int = 8
    divergence_rows: int = 0
    accuracies: bool = False
    propagation: float = 0.0
    residual: float = 0.0
    variants: tuple[Choice, ...] = ()

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
        kinds = [choice.kind for choice in self.variants]
        if len(kinds) > len(set(kinds)):
            raise SettingsError(
                f"recipe {self.name}: two variants of one kind, {max(kinds, key=kinds.count)}; give one"
            )
        if "objective" in kinds and self.pricing != "accuracy":
            raise SettingsError(
                f"recipe {self.name}: an objective needs pricing accuracy (preset stock); by {self.pricing} the "
                "expected KL divergence is what is summed"
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
    def method(self) -> Method:
        """How its variants quantize a linear."""
        return Method.of(self.variants)

    @property
    def objective(self) -> Choice | None:
        """What allocation sums, None for stock's sum of errors."""
        return next((choice for choice in self.variants if choice.kind == "objective"), None)

    @property
    def tuning(self) -> Choice | None:
        """How modules are tuned once they are quantized, None for not at all."""
        return next((choice for choice in self.variants if choice.kind == "tuning" and choice.name != "none"), None)

    @property
    def carries_reference(self) -> bool:
        """Whether the quantization pass needs the full-precision states of all rows."""
        return self.propagates or self.tuning is not None

    @property
    def measuring(self) -> "Recipe":
        """The recipe's choices that decide the measurement, the others at their defaults: equal where it is shared."""
        idle = {"fisher_rows": 8, "divergence_rows": 0, "accuracies": False} if self.pricing == "accuracy" else {}
        kept = tuple(choice for choice in self.variants if choice.kind not in IDLE_IN_MEASUREMENT)
        return replace(self, name="measuring", propagation=0.0, residual=0.0, variants=kept, **idle)


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
    """A recipe of one's own: fields of `Recipe` and variants by kind, laid over the preset `choices["preset"]`.

    The default preset serves where none is named. A variant is `NAME`, `NAME:SETTING=VALUE,...` or a table with `name`.
    """
    preset = find_recipe(choices.get("preset", DEFAULT_PRESET))
    known = [field.name for field in fields(Recipe) if field.name not in ("name", "variants")]
    variants = tuple(choose(kind, choices[kind]) for kind in KINDS if kind in choices)
    changes = {key: value for key, value in choices.items() if key != "preset" and key not in KINDS}
    for key, value in changes.items():
        if key not in known:
            there = ", ".join(("preset", *known, *KINDS))
            raise SettingsError(f"recipe {name}: there is no choice {key!r}; there are {there}")
        kinds = {bool: (bool,), str: (str,)}.get(type(getattr(preset, key)), (int, float))
        if type(value) not in kinds:
            raise SettingsError(f"recipe {name}: {key} must be like {getattr(preset, key)!r}, got {value!r:.40}")
    return replace(preset, name=name, variants=variants, **changes)


def recipe_of_record(record: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made a record of, in a job file for one."""
    variants = (choose(c["kind"], {"name": c["name"], **c["settings"]}) for c in record.get("variants", ()))
    return Recipe(**{**record, "variants": tuple(variants)})
