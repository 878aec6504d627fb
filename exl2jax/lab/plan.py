"""Plans: the models, targets, variants and seeds of a sweep, read from a TOML file.

models = ["demo/model"]
targets = [3.0, 4.0, 5.0]
seeds = [0, 1]

[settings]               # settings of a conversion, by their names
dataset_rows = 12
length = 512

[evaluation]
rows = 16
length = 256             # tokens of a row; source = "FILE" in place of the built-in text

[variants.stock]
preset = "stock"
[variants.gentle]        # a preset with other choices: fields of Recipe, or settings of this variant alone
preset = "best"
propagation = 0.25
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.declaration import Decides, Setting, settings_of
from exl2jax.errors import SettingsError
from exl2jax.evaluation.rows import HELDOUT
from exl2jax.storage.digests import fingerprint
from exl2jax.storage.hub_cache import cached_source
from exl2jax.variants.recipe import Recipe, recipe_from

OWN = (
    *("in_dir", "bits", "seed", "preset", "variants"),
    *("out_dir", "compile_full", "measurement", "output_measurement", "no_resume"),
)
"""Settings that the sweep itself decides: by the plan's other entries, and by its folder."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """The evaluation of every result: `heldout` or a file, at most `rows` rows of `length` tokens."""

    source: str = HELDOUT
    rows: int | None = None
    length: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """The part of a cluster's node that a cell takes."""

    cpus: float = 1
    gpus: float = 0
    memory_gb: float = 0
    retries: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantPlan:
    """A variant: its recipe, and settings that differ from the plan's."""

    name: str
    recipe: Recipe
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One conversion of a sweep with its evaluation."""

    model: str
    variant: str
    bits: float
    seed: int
    recipe: Recipe
    settings: Mapping[str, Any]
    evaluation: EvaluationPlan

    @property
    def source(self) -> str:
        """The model as the table names it: its directory, or repository and commit wherever the cache has them."""
        return cached_source(Path(self.model)) or self.model

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the cell's figures, as JSON."""
        deciding = {s.name for s in plan_settings() if s.declared.decides != Decides.RUN}
        settings = {name: self.settings[name] for name in self.settings if name in deciding}
        return {**asdict(self), "model": self.source, "settings": settings}

    @property
    def name(self) -> str:
        """Folder of the cell: readable, and unique by a piece of its fingerprint."""
        return f"{self.variant}-{self.bits:g}-s{self.seed}-{fingerprint(self.identity)[:8]}"

    @property
    def measurement(self) -> str:
        """Name of the measurement the cell uses: that of all cells that measure the same."""
        deciding = [s.name for s in plan_settings() if s.declared.decides == Decides.MEASUREMENT]
        chosen = {name: self.settings[name] for name in deciding if name in self.settings}
        record = {"model": self.source, "seed": self.seed, "recipe": asdict(self.recipe.measuring), **chosen}
        return f"{self.recipe.pricing}-s{self.seed}-{fingerprint(record)[:8]}"

    def config(self, out_dir: Path, **more: Any) -> ConversionConfig:
        """The conversion that the cell stands for."""
        given: dict[str, Any] = {
            "in_dir": Path(self.model),
            "out_dir": out_dir,
            "bits": self.bits,
            "seed": self.seed,
            "preset": self.recipe,
        }
        settings = {s.name: s.decode(self.settings[s.name]) for s in plan_settings() if s.name in self.settings}
        return ConversionConfig(**(given | settings | more))


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """A sweep; `keep` says whether the converted models stay after their evaluation."""

    models: tuple[str, ...]
    targets: tuple[float, ...]
    variants: tuple[VariantPlan, ...]
    seeds: tuple[int, ...] = (0,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvaluationPlan = EvaluationPlan()
    resources: Resources = Resources()
    keep: bool = True

    def cells(self) -> tuple[Cell, ...]:
        """Every cell: models outermost, then variants, targets and seeds."""
        return tuple(
            Cell(
                model=model,
                variant=variant.name,
                bits=float(bits),
                seed=seed,
                recipe=variant.recipe,
                settings={**self.settings, **variant.settings},
                evaluation=self.evaluation,
            )
            for model in self.models
            for variant in self.variants
            for bits in self.targets
            for seed in self.seeds
        )


def plan_settings(record: type = ConversionConfig) -> tuple[Setting, ...]:
    """The settings of a conversion that a plan can give."""
    return tuple(setting for setting in settings_of(record) if setting.name not in OWN)


def read_plan(path: Path, settings: Mapping[str, Any] | None = None) -> SweepPlan:
    """Read a plan, with `settings` in place of its own; `SettingsError` names the file and the wrong entry."""
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SettingsError(f"{path}: the plan cannot be read ({e})") from e
    try:
        plan = _with_settings(_plan(record), settings or {})
        for cell in plan.cells():
            cell.config(Path("unused-work-directory"))
    except (SettingsError, TypeError, ValueError) as e:
        raise SettingsError(f"{path}: {e}") from e
    return plan


def _plan(record: dict[str, Any]) -> SweepPlan:
    _require_known(record, [f.name for f in fields(SweepPlan)], "the plan")
    settings = _table(record, "settings")
    _require_known(settings, [s.name for s in plan_settings()], "[settings]")
    variants = _table(record, "variants") or {"best": {}}
    return SweepPlan(
        models=tuple(_strings(record, "models")),
        targets=tuple(float(x) for x in _numbers(record, "targets")),
        seeds=tuple(int(x) for x in _numbers(record, "seeds", [0])),
        variants=tuple(_variant(name, entry) for name, entry in variants.items()),
        settings=settings,
        evaluation=EvaluationPlan(**_table(record, "evaluation")),
        resources=Resources(**_table(record, "resources")),
        keep=bool(record.get("keep", True)),
    )


def _variant(name: str, entry: Any) -> VariantPlan:
    if not _NAME.fullmatch(name) or not isinstance(entry, dict):
        raise SettingsError(f"[variants.{name}] must be a table under a name of letters, digits and _.+-")
    known = {s.name for s in plan_settings()}
    settings = {key: value for key, value in entry.items() if key in known}
    choices = {key: value for key, value in entry.items() if key not in settings}
    return VariantPlan(name=name, recipe=recipe_from(choices, name), settings=settings)


def _with_settings(plan: SweepPlan, given: Mapping[str, Any]) -> SweepPlan:
    """The plan with settings that stand over its own and over those of its variants."""
    settings = {s.name: s.encode(given[s.name]) for s in plan_settings() if s.name in given}
    variants = tuple(replace(v, settings={**v.settings, **settings}) for v in plan.variants)
    return replace(plan, settings={**plan.settings, **settings}, variants=variants)


def _table(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = record.get(key, {})
    if not isinstance(table, dict):
        raise SettingsError(f"[{key}] must be a table, got {table!r:.60}")
    return table


def _require_known(record: Mapping[str, Any], known: Any, where: str) -> None:
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise SettingsError(f"{where} has no entry {unknown[0]!r}; there are {', '.join(known)}")


def _strings(record: Mapping[str, Any], key: str) -> Iterator[str]:
    texts = record.get(key)
    if not isinstance(texts, list) or not texts or not all(isinstance(x, str) for x in texts):
        raise SettingsError(f"{key} must be a list of strings, got {texts!r:.60}")
    yield from dict.fromkeys(texts)


def _numbers(record: Mapping[str, Any], key: str, default: list[Any] | None = None) -> Iterator[float]:
    numbers = record.get(key, default)
    if not isinstance(numbers, list) or not numbers or not all(type(x) in (int, float) for x in numbers):
        raise SettingsError(f"{key} must be a list of numbers, got {numbers!r:.60}")
    yield from dict.fromkeys(numbers)


def settings_json(cell: Cell) -> str:
    """The cell's settings as one line of JSON."""
    return json.dumps({**cell.settings, "evaluation": asdict(cell.evaluation)}, sort_keys=True)


def without_variants(plan: SweepPlan, kept: tuple[str, ...]) -> SweepPlan:
    """The plan with only the variants named in `kept`."""
    names = [v.name for v in plan.variants]
    unknown = [name for name in kept if name not in names]
    if unknown:
        raise SettingsError(f"`only`: the plan has no variant {unknown[0]!r}; there are {', '.join(names)}")
    return replace(plan, variants=tuple(v for v in plan.variants if v.name in kept))
