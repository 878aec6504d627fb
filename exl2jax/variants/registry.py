"""The one door that every variant comes in by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Any

from exl2jax.errors import SettingsError

KINDS = {
    "scales": "search(w [rows, N], bits, importance [rows], settings) -> ScaleChoice of one group",
    "rounding": "round(walk: Ordered, search, settings) -> Rounded, all rows of a matrix",
    "order": "order(diagonal [K], settings) -> perm [K], the rows' place in the file",
    "damping": "damp(ordered hessian [K, K], settings) -> (first damping, factor at failure)",
    "objective": "losses(errors [options], settings) -> what allocation sums over modules",
    "solver": "solve(problem, seed, settings) -> Solved, an option per slot within the budget",
    "candidates": "table(settings) -> Table of rows of settings, None where every projection is free",
    "error": "measure(settings) -> error(out [R, T, D], ref [R, T, D]) -> [R], a module's error of every row",
    "tuning": "tune(block: Tunable, settings) -> Tuned, a module once its linears are quantized",
    "transform": "rewrite(model: Layout, read, settings) -> what computes each tensor that changes, by name",
}
"""Kinds of variants and what their functions take and give."""

STOCK_NAME = "stock"
STOCK_NAMES = {"tuning": "none", "solver": "exact", "transform": "none"}
"""Names of what is done where nothing is chosen: that of most kinds, and of those that have another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoSettings:
    """The configuration of a variant that has nothing to set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A registered function; `source` tells versions of a user's file apart, empty for the package's own."""

    kind: str
    name: str
    function: Callable[..., Any]
    settings: type
    source: str = ""

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A variant with its settings, as a recipe holds it: hashable, and JSON by `dataclasses.asdict`."""

    kind: str
    name: str
    settings: Any
    source: str = ""

    @property
    def function(self) -> Callable[..., Any]:
        """The registered function, which takes `settings` last."""
        return find(self.kind, self.name).function

    @property
    def is_stock(self) -> bool:
        """Whether this is the choice that stock makes, which is the default."""
        return self.name == STOCK_NAMES.get(self.kind, STOCK_NAME)

    @property
    def text(self) -> str:
        """`KIND=NAME:SETTING=VALUE,...`, the text that `choose` reads."""
        values = ",".join(f"{f.name}={getattr(self.settings, f.name)}" for f in fields(self.settings))
        return f"{self.kind}={self.name}" + (f":{values}" if values else "")


_registry: dict[tuple[str, str], Variant] = {}
_source = ""


def variant[F: Callable[..., Any]](kind: str, name: str, settings: type = NoSettings) -> Callable[[F], F]:
    """Register a function as the variant `name` of `kind`; `settings` is its frozen dataclass.

    Raises `SettingsError` for unknown kinds, names that are taken, missing docstrings, settings that are not frozen.
    """

    def register(function: F) -> F:
        where = f"variant {kind} {name}"
        if kind not in KINDS:
            raise SettingsError(f"{where}: there is no such kind; there are {', '.join(KINDS)}")
        if (kind, name) in _registry and _registry[kind, name].source != _source:
            raise SettingsError(f"{where}: the name is taken; choose another")
        if not (function.__doc__ or "").strip():
            raise SettingsError(f"{where}: needs a docstring that says what it does and where it is from")
        if not is_dataclass(settings) or not _frozen(settings):
            raise SettingsError(f"{where}: its settings must be a frozen dataclass")
        _registry[kind, name] = Variant(kind=kind, name=name, function=function, settings=settings, source=_source)
        return function

    return register


def _frozen(settings: type) -> bool:
    """Whether a dataclass is frozen: a frozen dataclass can only be derived from a frozen one."""
    try:
        make_dataclass("Derived", [], bases=(settings,), frozen=True)
    except TypeError:
        return False
    return True


def find(kind: str, name: str) -> Variant:
    """A variant by name; `SettingsError` lists those there are."""
    if kind not in KINDS:
        raise SettingsError(f"there is no kind of variant {kind!r}; there are {', '.join(KINDS)}")
    if (kind, name) not in _registry:
        raise SettingsError(f"{kind} is {name!r}; it must be one of {', '.join(names(kind))}")
    return _registry[kind, name]


def names(kind: str) -> list[str]:
    """Names of a kind's variants, stock's first."""
    return sorted(
        (n for k, n in _registry if k == kind), key=lambda name: (name != STOCK_NAMES.get(kind, STOCK_NAME), name)
    )


def choose(kind: str, asked: str | Mapping[str, Any]) -> Choice:
    """A choice from `NAME`, `NAME:SETTING=VALUE,...` or a table `{name = NAME, SETTING = VALUE}`, checked at once."""
    name, given = _parse(asked) if isinstance(asked, str) else (str(asked.get("name")), dict(asked))
    given.pop("name", None)
    found = find(kind, name)
    known = {field.name: field.default for field in fields(found.settings)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            there = ", ".join(known) or "none"
            raise SettingsError(f"{kind} {name}: there is no setting {key!r}; there are: {there}")
        values[key] = _converted(value, known[key], f"{kind} {name}: {key}")
    try:
        settings = found.settings(**values)
    except (TypeError, ValueError) as e:
        raise SettingsError(f"{kind} {name}: {e}") from e
    return Choice(kind=kind, name=name, settings=settings, source=found.source)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in rest.split(",")] if rest else []
    return name.strip(), {key.strip(): value.strip() for key, _, value in pairs}


def _converted(value: Any, default: Any, where: str) -> Any:
    """The value in the type of the setting's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[str(value).lower()]
        return type(default)(value) if isinstance(default, int | float | str) else value
    except (KeyError, ValueError, TypeError) as e:
        raise SettingsError(f"{where} is {value!r:.40}; it must be like {default!r}") from e


class of_source:  # noqa: N801  (a context, read as a phrase)
    """While it lasts, what is registered belongs to the source with this digest."""

    def __init__(self, digest: str) -> None:
        """Remember the digest."""
        self._digest = digest

    def __enter__(self) -> None:
        """Take over."""
        global _source
        self._before, _source = _source, self._digest

    def __exit__(self, *_: object) -> None:
        """Give back."""
        global _source
        _source = self._before
