"""Options of the commands, made from the declarations of the settings: every command takes the same."""

import inspect
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.declaration import Setting, settings_of
from exl2jax.conversion.settings import resumed_config
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import SettingsError
from exl2jax.hub import source_directory

type Command = Callable[..., int]

ALL = tuple(settings_of(ConversionConfig))


def flags(setting: Setting) -> tuple[str, ...]:
    """The spellings of a setting's flag, short ones first."""
    short = (f"-{setting.declared.short}",) if setting.declared.short else ()
    return (*short, f"--{setting.long}")


def takes_settings(
    settings: Sequence[Setting] = ALL, *, required: tuple[str, ...] = ()
) -> Callable[[Command], Command]:
    """Give a command an option for each of `settings`; it receives those that were given as the dict `settings`."""

    def decorate(command: Command) -> Command:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        @wraps(command)
        def taking(*, context: typer.Context, **values: Any) -> int:
            typed = {s.name: values.pop(s.name) for s in settings}
            given = {s.name: _value(s, typed[s.name]) for s in settings if _was_given(context, s.name)}
            return command(context=context, settings=given, **values)

        options = [_parameter(s, required=s.name in required) for s in settings]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        taking.__signature__ = inspect.Signature([*options, *keyword])  # type: ignore[attr-defined]
        return taking

    return decorate


def conversion_config(settings: dict[str, Any], out_dir: Path | None = None) -> ConversionConfig:
    """The conversion that flags ask for: a new one with `in_dir`, else that of the job in the work directory.

    `out_dir` serves where no work directory was named.
    """
    folder = settings.get("out_dir", out_dir)
    if "in_dir" not in settings and "out_dir" in settings:
        return resumed_config(folder, WorkDirectory(folder).settings(), settings)
    if "in_dir" not in settings:
        raise SettingsError("`in_dir`: name the source model")
    config = ConversionConfig(**{**settings, "out_dir": folder})  # wrong usage is told before anything is fetched
    return replace(config, in_dir=source_directory(config.in_dir))


def settings_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take values from a TOML file for flags not given: keys are names of settings or long flags, `-` or `_` alike."""
    if path is None:
        return None
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise SettingsError(f"--settings {path}: cannot be read ({e})") from e
    names = {str(p.name): p.name for p in context.command.params}
    for parameter in context.command.params:
        names |= {flag.lstrip("-").replace("-", "_"): parameter.name for flag in parameter.opts}
    values = {key.replace("-", "_"): value for key, value in record.items()}
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise SettingsError(f"--settings {path}: there is no setting {unknown[0]}; see --help")
    context.default_map = {names[key]: value for key, value in values.items()}
    return path


SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", callback=settings_file, is_eager=True, help="TOML file with settings by name."),
]


def _parameter(setting: Setting, *, required: bool) -> inspect.Parameter:
    kind = list[setting.kind] if setting.many else setting.kind
    default = setting.default
    if setting.required or setting.many:
        default = inspect.Parameter.empty if required else None
    annotation = kind if required or isinstance(default, bool | int | float | str) else kind | None
    text = setting.declared.help.rstrip(".") + " (repeatable)." if setting.many else setting.declared.help
    words = flags(setting)
    if setting.kind is bool and setting.default is None:  # neither is the default, so both have a flag
        words = (*words[:-1], f"{words[-1]}/--no-{setting.long}")
    option = typer.Option(*words, help=text, show_default=setting.declared.unset or True)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _value(setting: Setting, value: Any) -> Any:
    return tuple(value or ()) if setting.many else value
