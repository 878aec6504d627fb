"""Recipes: which of the algorithm's choices a conversion makes, as one frozen value, and the presets that name them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax

from exl2jax.errors import SettingsError
from exl2jax.ops import relative_frobenius
from exl2jax.variants import KINDS, Choice, Method, choose
from exl2jax.variants.candidates import STOCK_TABLE, Table, asked_candidates

type Pricing = Literal["fisher", "divergence", "accuracy"]

STRONGEST = 1.0

FIELD_KINDS = ("error", "hessian")
"""Kinds of variants that are fields of a recipe under the names of the papers."""

IDLE_IN_MEASUREMENT = ("objective", "tuning", "solver")
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
    weights, as stock does. `weigh_tokens` prices errors with the weight of each token's class
    (`exl2jax.stream.token_classes`), where there are gradients; `weigh_hessians` quantizes with these weights too,
    raised to this power (0: all tokens alike, 1: as in the prices).
    `variants` are choices among the registered variants of other steps (`exl2jax.variants`), stock's where they say
    nothing.
    """

    name: str
    pricing: Pricing
    fisher_rows: int = 8
    divergence_rows: int = 0
    accuracies: bool = False
    propagation: float = 0.0
    residual: float = 0.0
    weigh_tokens: bool = False
    weigh_hessians: float = 0.0
    variants: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        """Refuse strengths out of range."""
        for name in ("propagation", "residual", "weigh_hessians"):
            value = getattr(self, name)
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
        self._check_rows(kinds)
        if "objective" in kinds and self.pricing != "accuracy":
            raise SettingsError(
                f"recipe {self.name}: an objective needs pricing accuracy (preset stock); by {self.pricing} the "
                "expected KL divergence is what is summed"
            )

    def _check_rows(self, kinds: Sequence[str]) -> None:
        """Refuse choices about rows of candidates where there are none."""
        table = self.chosen("candidates")
        if table is not None and table.name == "free" and self.pricing == "accuracy":
            raise SettingsError(
                f"recipe {self.name}: free candidates need pricing fisher or divergence (presets best and fast); "
                "accuracies are measured for rows of a table"
            )
        solver = self.chosen("solver")
        if solver is not None and solver.name != "exact" and self.pricing != "accuracy" and self.table is None:
            raise SettingsError(
                f"recipe {self.name}: the solver {solver.name} chooses among rows of candidates; by {self.pricing} "
                "every linear is free: take exact, or candidates of a table"
            )
        if "error" in kinds and not self.measures_rows:
            raise SettingsError(f"recipe {self.name}: an error of rows needs pricing accuracy, not {self.pricing}")

    def chosen(self, kind: str) -> Choice | None:
        """The variant of a kind, None where nothing is said."""
        return next((choice for choice in self.variants if choice.kind == kind), None)

    def over(self, variants: Sequence[Choice]) -> "Recipe":
        """The recipe with other choices of variants in the place of its own of these kinds."""
        kinds = {choice.kind for choice in variants}
        kept = (choice for choice in self.variants if choice.kind not in kinds)
        return replace(self, variants=(*kept, *variants))

    @property
    def measures_rows(self) -> bool:
        """Whether candidates of modules are measured one by one."""
        return self.pricing == "accuracy" or self.accuracies

    @property
    def table(self) -> Table | None:
        """The table of candidates that was chosen, None where it was not, or where projections are free."""
        choice = self.chosen("candidates")
        return None if choice is None else choice.function(choice.settings)

    @property
    def measured_table(self) -> Table:
        """The candidates whose accuracies are measured."""
        return self.table or STOCK_TABLE

    @property
    def error_of_rows(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """The error of a module's output, row by row."""
        choice = self.chosen("error")
        return relative_frobenius if choice is None else choice.function(choice.settings).of_rows

    @property
    def measured_by(self) -> str:
        """The variants that a measurement depends on, in words; empty for stock's."""
        kinds = ("scales", "rounding", "order", "damping", "error", "transform")
        chosen = [choice for choice in self.variants if choice.kind in kinds and not choice.is_stock]
        return ", ".join(sorted(choice.text for choice in chosen))

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
        return self.chosen("objective")

    @property
    def tuning(self) -> Choice | None:
        """How modules are tuned once they are quantized, None for not at all."""
        choice = self.chosen("tuning")
        return None if choice is None or choice.is_stock else choice

    @property
    def transform(self) -> Choice | None:
        """How the source is rewritten before anything is measured, None for not at all."""
        choice = self.chosen("transform")
        return None if choice is None or choice.is_stock else choice

    @property
    def carries_reference(self) -> bool:
        """Whether the quantization pass needs the full-precision states of all rows."""
        return self.propagates or self.tuning is not None

    @property
    def measuring(self) -> "Recipe":
        """The recipe's choices that decide the measurement, the others at their defaults: equal where it is shared."""
        idle = {"fisher_rows": 8, "divergence_rows": 0, "accuracies": False} if self.pricing == "accuracy" else {}
        out = IDLE_IN_MEASUREMENT if self.measures_rows else (*IDLE_IN_MEASUREMENT, "candidates")
        kept = tuple(choice for choice in self.variants if choice.kind not in out)
        return replace(self, name="measuring", propagation=0.0, residual=0.0, weigh_hessians=0.0, variants=kept, **idle)


_FISHER = Recipe(name="fisher", pricing="fisher", weigh_tokens=True, variants=(choose("scales", "columns"),))

PRESETS = {
    recipe.name: recipe
    for recipe in (
        replace(_FISHER, name="best", propagation=0.5, residual=0.5, weigh_hessians=0.5),
        replace(_FISHER, name="fast", fisher_rows=4, weigh_hessians=1.0),
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
    choices = {
        key: asked_candidates(v) if key == "candidates" and isinstance(v, str) else v for key, v in choices.items()
    }
    variants = tuple(choose(kind, choices[kind]) for kind in KINDS if kind in choices)
    changes = {key: value for key, value in choices.items() if key != "preset" and key not in KINDS}
    variants, more = _as_fields(variants, changes, name)
    changes |= more
    for key, value in changes.items():
        if key not in known:
            there = ", ".join(("preset", *known, *KINDS))
            raise SettingsError(f"recipe {name}: there is no choice {key!r}; there are {there}")
        kinds = {bool: (bool,), str: (str,)}.get(type(getattr(preset, key)), (int, float))
        if type(value) not in kinds:
            raise SettingsError(f"recipe {name}: {key} must be like {getattr(preset, key)!r}, got {value!r:.40}")
    return replace(preset.over(variants), name=name, **changes)


def _as_fields(
    variants: Sequence[Choice], changes: Mapping[str, Any], name: str
) -> tuple[tuple[Choice, ...], dict[str, Any]]:
    """The variants that stay, and the fields of the recipe that the others are: both are one choice, said once."""
    kept, out = list[Choice](), dict[str, Any]()
    for choice in variants:
        if choice.kind not in FIELD_KINDS:
            kept.append(choice)
            continue
        made = choice.function(choice.settings)
        found = made.fields if choice.kind == "error" else made
        twice = [field for field in found if field in changes]
        if twice:
            raise SettingsError(f"recipe {name}: {choice.kind} {choice.name} decides {twice[0]}; give one of the two")
        out |= found
        if choice.kind == "error" and made.of_rows is not relative_frobenius:
            kept.append(choice)
    return tuple(kept), out


def recipe_of_record(record: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made a record of, in a job file for one."""
    variants = (choose(c["kind"], {"name": c["name"], **c["settings"]}) for c in record.get("variants", ()))
    return Recipe(**{**record, "variants": tuple(variants)})
