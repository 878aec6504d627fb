"""Recipes: the choices that a conversion makes among algorithms, as one frozen value, and the presets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax

from exl2jax.errors import SettingsError
from exl2jax.ops import relative_frobenius
from exl2jax.variants import KINDS, Choice, Quantizer, choose
from exl2jax.variants.candidates import STOCK_TABLE, Table, parse_candidates

type Pricing = Literal["fisher", "divergence", "accuracy"]

STRONGEST = 1.0

PRICINGS = ("fisher", "divergence", "accuracy")

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
    raised to this power (0: all tokens alike, 1: as in the prices). `output_rows` are the rows of the quantization
    whose gradients tell how the error of one column is made up for in others (`exl2jax.ops.columns`; 0: not at all).
    `tuned_steps` are the steps in which maxima of scales, norms and biases of the quantized model are tuned together,
    each on a piece of text that no other pass saw (`exl2jax.quantize.end_to_end`; 0: not at all). `variants` are
    choices among the registered variants of other steps (`exl2jax.variants`), stock's where they say
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
    output_rows: int = 0
    tuned_steps: int = 0
    variants: tuple[Choice, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range and choices that exclude each other."""
        if self.pricing not in PRICINGS:
            raise SettingsError(
                f"recipe {self.name}: pricing is {self.pricing!r}; it must be one of {', '.join(PRICINGS)}"
            )
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
        self._check_outputs()
        if "objective" in kinds and self.pricing != "accuracy":
            raise SettingsError(
                f"recipe {self.name}: an objective needs pricing accuracy (preset stock); by {self.pricing} the "
                "expected KL divergence is what is summed"
            )

    def _check_rows(self, kinds: Sequence[str]) -> None:
        """Refuse choices about rows of candidates where the recipe has no such rows."""
        table = self.chosen("candidates")
        if table is not None and table.name == "free" and self.pricing == "accuracy":
            raise SettingsError(
                f"recipe {self.name}: free candidates need pricing fisher or divergence (presets best and fast); "
                "accuracies are measured for rows of a table"
            )
        if "error" in kinds and not self.measures_rows:
            raise SettingsError(f"recipe {self.name}: an error of rows needs pricing accuracy, not {self.pricing}")

    def _check_outputs(self) -> None:
        """Refuse numbers below nothing, and Hessians of outputs that no walk would use."""
        for name in ("output_rows", "tuned_steps"):
            if getattr(self, name) < 0:
                raise SettingsError(f"recipe {self.name}: {name} is {getattr(self, name)}; it must be at least 0")
        if self.output_rows and not self.quantizer.walks:
            raise SettingsError(
                f"recipe {self.name}: output_rows needs rounding stock, whose walk feeds errors along, not "
                f"{self.quantizer.rounding.name}; add output_rows=0"
            )

    def chosen(self, kind: str) -> Choice | None:
        """The variant of a kind, None where none is chosen."""
        return next((choice for choice in self.variants if choice.kind == kind), None)

    def over(self, variants: Sequence[Choice], **fields: Any) -> "Recipe":
        """The recipe with other fields, and with other variants in place of its own of the same kinds.

        Another rounding takes no Hessians of outputs, unless `fields` ask for them.
        """
        kinds = {choice.kind for choice in variants}
        kept = (choice for choice in self.variants if choice.kind not in kinds)
        if any(choice.kind == "rounding" and not choice.is_stock for choice in variants):
            fields = {"output_rows": 0, **fields}
        return replace(self, variants=(*kept, *variants), **fields)

    def with_choices(self, choices: Mapping[str, Any]) -> "Recipe":
        """The recipe with choices by name laid over it: its own fields, and variants by kind.

        A variant is `NAME`, `NAME:SETTING=VALUE,...` or a table with `name`. `SettingsError` for an unknown choice.
        """
        known = [field.name for field in fields(Recipe) if field.name not in ("name", "variants")]
        unknown = [key for key in choices if key not in known and key not in KINDS]
        if unknown:
            there = ", ".join(("preset", *known, *KINDS))
            raise SettingsError(f"recipe {self.name}: there is no choice {unknown[0]!r}; there are {there}")
        variants = tuple(_chosen_variant(kind, choices[kind]) for kind in KINDS if kind in choices)
        return self.over(variants, **{key: self._typed(key, choices[key]) for key in choices if key in known})

    def words(self) -> dict[str, Any]:
        """Every choice by the word that sets it, with the digest of the file that a variant comes from, if any."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "variants")}
        chosen = {choice.kind: choice.text.partition("=")[2] for choice in self.variants}
        sources = {c.kind: f"{chosen[c.kind]} of a file with SHA-256 {c.source}" for c in self.variants if c.source}
        return own | chosen | sources

    def _typed(self, key: str, value: Any) -> Any:
        """The value of a field in its type; text stands for numbers and truth values."""
        now = getattr(self, key)
        try:
            if isinstance(now, bool) and isinstance(value, str):
                return {"true": True, "false": False}[value.lower()]
            if isinstance(value, str):
                return type(now)(value)
        except (KeyError, ValueError) as e:
            raise SettingsError(f"recipe {self.name}: {key} must be like {now!r}, got {value!r:.40}") from e
        if type(value) not in ((type(now),) if isinstance(now, bool | str) else (int, float)):
            raise SettingsError(f"recipe {self.name}: {key} must be like {now!r}, got {value!r:.40}")
        return value

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
        return relative_frobenius if choice is None else choice.function(choice.settings)

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
    def quantizing_passes(self) -> tuple[str, ...]:
        """The passes of a conversion that come after the allocation, in order."""
        gradients = ("trace", "outputs") if self.output_rows else ()
        return (*gradients, "quantize", *(("tune",) if self.tuned_steps else ()))

    @property
    def propagates(self) -> bool:
        """Whether the quantization pass carries a full-precision stream beside the quantized one."""
        return self.propagation > 0 or self.residual > 0

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer of its variants."""
        return Quantizer.of(self.variants)

    @property
    def objective(self) -> Choice | None:
        """The sum that the allocation minimises, None for stock's sum of errors."""
        return self.chosen("objective")

    @property
    def tuning(self) -> Choice | None:
        """The tuning of modules after quantization, None for none."""
        choice = self.chosen("tuning")
        return None if choice is None or choice.is_stock else choice

    @property
    def transform(self) -> Choice | None:
        """The rewriting of the source before anything is measured, None for none."""
        choice = self.chosen("transform")
        return None if choice is None or choice.is_stock else choice

    @property
    def carries_reference(self) -> bool:
        """Whether the quantization pass needs the full-precision states of all rows."""
        return self.propagates or self.tuning is not None

    @property
    def measuring(self) -> "Recipe":
        """The choices that decide the measurement, the others at their defaults: recipes that share one are equal."""
        idle = {"fisher_rows": 8, "divergence_rows": 0, "accuracies": False} if self.pricing == "accuracy" else {}
        out = IDLE_IN_MEASUREMENT if self.measures_rows else (*IDLE_IN_MEASUREMENT, "candidates")
        kept = tuple(choice for choice in self.variants if choice.kind not in out)
        return replace(
            self,
            name="measuring",
            propagation=0.0,
            residual=0.0,
            weigh_hessians=0.0,
            output_rows=0,
            tuned_steps=0,
            variants=kept,
            **idle,
        )


_FISHER = Recipe(name="fisher", pricing="fisher", weigh_tokens=True, variants=(choose("scales", "columns"),))

_BEST = replace(_FISHER, name="best", propagation=0.5, residual=0.5, weigh_hessians=0.5, tuned_steps=20)

PRESETS = {
    recipe.name: recipe
    for recipe in (
        _BEST,
        replace(_BEST, name="max", output_rows=8, tuned_steps=60),
        replace(_FISHER, name="fast", fisher_rows=4, weigh_hessians=1.0),
        Recipe(name="stock", pricing="accuracy"),
    )
}
"""The recipes that have a name."""

DEFAULT_PRESET = "best"


def find_recipe(preset: str) -> Recipe:
    """The recipe of a preset; `SettingsError` names the choices for any other name."""
    if preset not in PRESETS:
        raise SettingsError(f"`preset` is {preset!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def recipe_from(choices: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of one's own: choices as `Recipe.with_choices` takes them, laid over the preset `choices["preset"]`.

    The default preset serves where none is named.
    """
    preset = replace(find_recipe(choices.get("preset", DEFAULT_PRESET)), name=name)
    return preset.with_choices({key: value for key, value in choices.items() if key != "preset"})


def parse_choices(texts: Sequence[str]) -> dict[str, str]:
    """Choices by name from texts `KEY=VALUE`; `SettingsError` where one is no such text or a key comes twice."""
    choices: dict[str, str] = {}
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        if not key or not value:
            raise SettingsError(f"`variants` {text}: must be FIELD=VALUE or KIND=NAME")
        if key in choices:
            raise SettingsError(f"`variants`: two choices of {key}; give one")
        choices[key] = value
    return choices


def recipe_of_record(record: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made a record of, in a job file for one."""
    variants = (choose(c["kind"], {"name": c["name"], **c["settings"]}) for c in record.get("variants", ()))
    return Recipe(**{**record, "variants": tuple(variants)})


def _chosen_variant(kind: str, value: Any) -> Choice:
    """The variant of a kind; for candidates, the name of a JSON file stands for the variant that reads it."""
    return choose(kind, parse_candidates(value) if kind == "candidates" and isinstance(value, str) else value)
