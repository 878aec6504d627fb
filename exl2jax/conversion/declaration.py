"""The declaration of a setting: the job file, the resume check, sweeps and the command all derive from it."""

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from exl2jax.errors import SettingsError

KEY = "setting"
"""Key of the declaration in a field's metadata."""


class Decides(StrEnum):
    """The first thing that depends on a setting; everything after it depends on it too."""

    MEASUREMENT = "measurement"
    QUANTIZATION = "quantization"
    OUTPUT = "output"
    RUN = "run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """The part of a setting that its field cannot say; `declare` documents the entries."""

    help: str
    decides: Decides
    short: str
    long: str
    unset: str
    low: float | None
    above: float | None
    high: float | None
    choices: tuple[Any, ...]
    by_content: bool
    recorded: bool


def declare(
    help: str,
    decides: Decides,
    *,
    short: str = "",
    long: str = "",
    unset: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] = (),
    by_content: bool = False,
    recorded: bool = True,
) -> Mapping[str, Declaration]:
    """Metadata of a dataclass field that makes it a setting; the field itself gives name, type and default.

    `short` and `long` are the words of its flag, without dashes; the name serves where `long` is empty. `unset` says
    what the default None stands for. `low` and `high` are the least and the greatest value, `above` is a bound that
    the value must exceed. `by_content` marks a setting that a resume compares by the files it names. A job does not
    keep a setting with `recorded=False`: a resumed run takes it from its own command.
    """
    return {
        KEY: Declaration(
            help=help,
            decides=decides,
            short=short,
            long=long,
            unset=unset,
            low=low,
            above=above,
            high=high,
            choices=choices,
            by_content=by_content,
            recorded=recorded,
        )
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting of a record: name, type and default of the field, and its declaration."""

    name: str
    annotation: Any
    default: Any
    declared: Declaration

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is MISSING

    @property
    def many(self) -> bool:
        """Whether the setting is a tuple of values."""
        return get_origin(self.annotation) is tuple

    @property
    def kind(self) -> type:
        """The type of a value in a file or on a command line: `str` where text stands for other objects."""
        parts = get_args(self.annotation) if self.many or _is_union(self.annotation) else (self.annotation,)
        parts = tuple(part for part in parts if part not in (type(None), ...))
        return str if str in parts else parts[0]

    @property
    def long(self) -> str:
        """The long word of the flag."""
        return self.declared.long or self.name

    def check(self, value: Any) -> None:
        """Raise `SettingsError` for a value of the wrong type or out of range; None is always allowed."""
        for item in value if self.many else [] if value is None else [value]:
            self._check_type(item)
            self._check_range(item)

    def encode(self, value: Any) -> Any:
        """The value in JSON, paths in full; None for data that has no text form."""
        if self.many:
            return [self._encoded(item) for item in value]
        return self._encoded(value)

    def decode(self, value: Any) -> Any:
        """The value from JSON or TOML. The reader of a record decodes what `encode` does not write as text."""
        if value is None or isinstance(value, Mapping):
            return value
        if self.many:
            return tuple(Path(item) if self.kind is Path else item for item in value)
        return Path(value) if self.kind is Path else value

    def _encoded(self, value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.resolve() if self.kind is Path else value)
        return value if value is None or isinstance(value, str | bool | int | float) else None

    def _check_type(self, value: Any) -> None:
        accepted, words = {
            bool: (bool, "true or false"),
            int: (Integral, "a whole number"),
            float: (Real, "a number"),
            Path: (Path, "a path"),
        }.get(self.kind, (object, ""))
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind in (int, float)):
            raise SettingsError(f"`{self.name}` is {value!r:.40}; it must be {words}")

    def _check_range(self, value: Any) -> None:
        declared, text = self.declared, f"`{self.name}` is {value!r:.40}; it must"
        if declared.choices and value not in declared.choices:
            raise SettingsError(f"{text} be one of {', '.join(map(str, declared.choices))}")
        low, high, above = declared.low, declared.high, declared.above
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            bounds = f"be at least {low:g}" if high is None else f"lie between {low:g} and {high:g}"
            raise SettingsError(f"{text} {bounds}")
        if above is not None and not above < value < float("inf"):
            raise SettingsError(f"{text} be finite and greater than {above:g}")


def settings_of(record: type) -> Iterator[Setting]:
    """The settings that a dataclass declares, in the order of its fields."""
    for f in fields(record):
        if (declared := f.metadata.get(KEY)) is not None:
            yield Setting(name=f.name, annotation=f.type, default=f.default, declared=declared)


def check_all(record: Any) -> None:
    """Check every setting of an instance by its declaration; `SettingsError` names the first that is wrong."""
    for setting in settings_of(type(record)):
        setting.check(getattr(record, setting.name))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
