"""`exl2jax convert`: the stock converter's flags, and ours."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import ALL, SettingsFile, conversion_config, takes_settings
from exl2jax.cli.shared import Invocation, deliver, invocation, load_variants, set_up
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.convert import convert
from exl2jax.conversion.operations import pass_operations
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.set_file import SizeSet, read_set, write_set
from exl2jax.conversion.settings import resumed_config
from exl2jax.conversion.sizes import (
    Size,
    SizeOutcome,
    check_sizes,
    convert_sizes,
    parse_bytes,
    set_operations,
    with_target,
)
from exl2jax.errors import SettingsError
from exl2jax.evaluation import Evaluation
from exl2jax.hub.finish import CardWishes, finish_set, finish_size
from exl2jax.hub.tables import sizes_table
from exl2jax.models import read_config
from exl2jax.report import conversion_table, make_progress
from exl2jax.report.clock import JobClock
from exl2jax.stream.devices import join_processes
from exl2jax.stream.progress import RunControl

LISTED = ("bits", "head_bits")
"""Settings of which this command takes several values."""

Bits = Annotated[
    str | None, typer.Option("-b", "--bits", help="Target bits per weight [4.125]; several sizes as 2.5,3.0,4.25.")
]
HeadBits = Annotated[
    str | None,
    typer.Option("-hb", "--head_bits", help="Bits of the head: 2, 3, 4, 5, 6 or 8 [6]; one for each size as 6,6,8."),
]
FileSize = Annotated[
    str | None,
    typer.Option("--size", help="Largest size of the weight files in place of bits: 5.5GB; several as 4GB,5.5GB."),
]


@takes_settings([s for s in ALL if s.name not in LISTED], required=("out_dir",))
def convert_command(
    context: typer.Context,
    settings: dict[str, Any],
    bits: Bits = None,
    head_bits: HeadBits = None,
    size: FileSize = None,
    status_output: Annotated[
        bool, typer.Option("-so", "--status_output", help="Add machine-readable status lines.")
    ] = False,
    hidden_state_offload_layers: Annotated[
        int,
        typer.Option(
            "-hsol", "--hidden_state_offload_layers", help="Accepted for stock scripts; states stay in host memory."
        ),
    ] = 0,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Judge the result on held-out text, for the summary and the card [several sizes: yes, one: no].",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write a model card into the directory of -cf.")
    ] = True,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="ORG/NAME of the source, for the card.")
    ] = None,
    quantized_by: Annotated[str | None, typer.Option("--quantized-by", help="Your name, for the card.")] = None,
    plugin: Plugins = None,
    settings_file: SettingsFile = None,
    as_json: Json = False,
) -> int:
    """Convert a model to EXL2; the flags are those of stock ExLlamaV2's convert.py."""
    del hidden_state_offload_layers, settings_file
    called = invocation(context)
    load_variants(plugin)
    console = Console(stderr=True)
    set_up(console, called.spelling)
    join_processes()
    wishes = CardWishes(card=card, evaluate=evaluate, base_model=base_model, quantized_by=quantized_by)
    kept = None if "in_dir" in settings else read_set(settings["out_dir"])
    if kept is None:
        sizes = _sizes(bits, head_bits, size)
        config = conversion_config(settings | _given(bits, head_bits, sizes[0]))
    else:
        sizes = _kept_sizes(kept, bits, head_bits, size)
        config, wishes = resumed_config(settings["out_dir"], kept.settings, settings), wishes.over(kept.wishes)
    single = kept is None and len(sizes) == 1 and sizes[0].bits is not None
    progress = make_progress(console, status=status_output)

    def work() -> dict[str, float]:
        return pass_operations(config, read_config(config.in_dir)[0]) if single else set_operations(config, sizes)

    control = RunControl(progress=JobClock(progress, work), stop=called.stop)
    if not single:
        return _several(config, sizes, wishes, control, called, as_json)
    target = with_target(config)
    result = convert(target, control)
    found = finish_size(target, result, wishes)
    result = called.spelled(result, "warnings")
    deliver(as_json, _as_json(result, found), lambda: conversion_table(result, found))
    return 0


def _several(
    config: ConversionConfig,
    sizes: list[Size],
    wishes: CardWishes,
    control: RunControl,
    called: Invocation,
    as_json: bool,
) -> int:
    """Make a set; exit code 1 where a size was refused."""
    if config.output_measurement is not None:
        raise SettingsError("`output_measurement` makes no size; leave it out, or give one size")

    def finished(config: ConversionConfig, result: ConversionResult) -> None:
        finish_size(config, result, replace(wishes, evaluate=False))  # figures come together, at the end

    check_sizes(config, sizes)
    write_set(config, sizes, asdict(wishes))
    outcomes = convert_sizes(config, sizes, control, finished)
    figures = finish_set(config, outcomes, wishes)
    records = [_record(each, called, figures) for each in outcomes]
    deliver(as_json, {"sizes": records}, lambda: sizes_table(outcomes, figures))
    return 1 if any(each.refused for each in outcomes) else 0


def _record(outcome: SizeOutcome, called: Invocation, figures: Mapping[Path, Evaluation]) -> dict[str, Any]:
    if outcome.result is None or outcome.config is None:
        return {"asked": outcome.size.asked, "refused": called.spelling(outcome.refused)}
    found = figures.get(outcome.config.compile_full or Path())
    return {"asked": outcome.size.asked, **_as_json(called.spelled(outcome.result, "warnings"), found)}


def _as_json(result: ConversionResult, found: Evaluation | None) -> dict[str, Any]:
    """The summary, with the figures on held-out text where they were measured."""
    return result.to_json() | ({} if found is None else {"evaluation": asdict(found)})


def _sizes(bits: str | None, head_bits: str | None, size: str | None) -> list[Size]:
    """The sizes that flags ask for; one at the default bits where they say nothing."""
    if bits is not None and size is not None:
        raise SettingsError("`bits` and --size are one choice; give one of them")
    texts = (size or bits or "4.125").split(",")
    heads = [_number(int, "head_bits", text) for text in (head_bits or "6").split(",")]
    if len(heads) not in (1, len(texts)):
        raise SettingsError(f"`head_bits` has {len(heads)} values for {len(texts)} sizes; give one, or one for each")
    heads = heads * len(texts) if len(heads) == 1 else heads
    if size is not None:
        return [Size(head_bits=h, most_bytes=parse_bytes(text)) for text, h in zip(texts, heads, strict=True)]
    return [Size(head_bits=h, bits=_number(float, "bits", text)) for text, h in zip(texts, heads, strict=True)]


def _kept_sizes(kept: SizeSet, bits: str | None, head_bits: str | None, size: str | None) -> list[Size]:
    """The sizes to make in the work directory of a set: those of its last command unless flags name others."""
    if bits is None and size is None and head_bits is not None:
        raise SettingsError("`head_bits` belongs to sizes; name them too, by `bits` or --size")
    return list(kept.sizes) if bits is None and size is None else _sizes(bits, head_bits, size)


def _given(bits: str | None, head_bits: str | None, size: Size) -> dict[str, Any]:
    """The settings that were given, as one conversion takes them."""
    given: dict[str, Any] = {}
    if bits is not None:
        given["bits"] = size.bits
    if head_bits is not None:
        given["head_bits"] = size.head_bits
    return given


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError as e:
        raise SettingsError(f"`{name}` is {text!r}; it must be a number, or several with commas between") from e
