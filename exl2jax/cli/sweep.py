"""`exl2jax sweep`: run a plan of conversions."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from exl2jax.cli.options import Json, Plugins
from exl2jax.cli.settings import takes_settings
from exl2jax.cli.shared import deliver, invocation, load_variants, say, set_up
from exl2jax.errors import SettingsError
from exl2jax.hub import source_directory
from exl2jax.lab import read_plan, run_sweep
from exl2jax.lab.cluster import ray_runner
from exl2jax.lab.estimate import estimate
from exl2jax.lab.page import sweep_page
from exl2jax.lab.plan import plan_settings, without_variants
from exl2jax.lab.tables import estimate_table, sweep_table
from exl2jax.report import make_progress
from exl2jax.report.page import write_page
from exl2jax.report.plots import write_plots
from exl2jax.stream.progress import RunControl


@takes_settings(plan_settings())
def sweep_command(
    context: typer.Context,
    settings: dict[str, Any],
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep; finished cells in it are not run again.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells with estimates, run nothing.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this variant (repeatable).")] = None,
    plugin: Plugins = None,
    ray: Annotated[str | None, typer.Option("--ray", help="Run on the Ray cluster at this address.")] = None,
    as_json: Json = False,
) -> int:
    """Run models x targets x variants x seeds into one table and one page; flags stand over the plan's settings."""
    called = invocation(context)
    console = Console(stderr=True)
    set_up(console, called.spelling)
    if ray and plugin:
        raise SettingsError("--plugin with --ray: nodes lack the file; install it as a package with an entry point")
    load_variants(plugin)
    sweep = read_plan(plan, settings)
    sweep = replace(sweep, models=tuple(_found(model) for model in sweep.models))
    sweep = without_variants(sweep, tuple(only)) if only else sweep
    if dry_run:
        cells = estimate(sweep, out)
        deliver(as_json, {"cells": [asdict(cell) for cell in cells]}, lambda: estimate_table(cells))
        return 0
    for room in ("conversion", "stream"):
        logging.getLogger(f"exl2jax.{room}").setLevel(logging.WARNING)  # only warnings of each conversion
    control = RunControl(progress=make_progress(console, status=False), stop=called.stop)
    result = run_sweep(sweep, out, control, ray_runner(ray) if ray else None)
    page = sweep_page(out)
    write_page(page, out / "report.html")
    write_plots(page.plots, out / "plots")
    deliver(as_json, {"table": str(result.table), "cells": list(result.rows)}, lambda: sweep_table(result.rows))
    say(f"report: {out / 'report.html'}")
    return 1 if result.failed else 0


def _found(model: str) -> str:
    """A model of a plan: its directory as it is written there, or where the Hub's cache has the repository."""
    return model if Path(model).exists() else str(source_directory(Path(model)))
