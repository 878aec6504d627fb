#!/usr/bin/env python3
"""Measure what each choice of the algorithm is worth: convert the demo model by variants, compare on held-out rows.

    python -m scripts.studies.quality                    the whole study; trials that are done already are not run again
    python -m scripts.studies.quality --only stock best  some variants
    python -m scripts.studies.quality --only rotation    one of the variants that the whole study leaves out
    python -m scripts.studies.quality --rows 24 --development --only ...    judged on calibration rows that no trial saw

The whole study has the presets at every target with the calibration rows of a real conversion, and what each part of
`best` is worth, with fewer rows and without the tuning that each would get alike.

Every trial is a conversion with a recipe, a target and calibration rows, judged by the KL divergence of the full
precision model's next-token distributions from the quantized model's, per domain of the held-out rows. Prints the
tables of docs/quality.md and draws its plot. "KL used" is the divergence on rows that the conversion quantized on: the
less it is than that on held-out rows, the more was fitted to these rows alone. CPU seconds and peak memory are of the
measurement, which conversions of a kind share, and of the conversion.
"""

import argparse
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from exl2jax import CalibrationConfig, ConversionConfig, ConversionResult, convert
from exl2jax.calibration import load_rows, load_tokenizer
from exl2jax.lab.meter import metered
from exl2jax.models import open_model
from exl2jax.variants import choose
from exl2jax.variants.recipe import PRESETS, Recipe
from scripts.studies.judge import Judge, halves

BEST, STOCK = PRESETS["best"], PRESETS["stock"]
UNTUNED = replace(BEST, name="untuned best", tuned_steps=0)
PLAIN = replace(UNTUNED, name="fisher", propagation=0.0, residual=0.0, weigh_hessians=1.0)
TRANSFORMS, DIVERGENCES = ("rotation", "equalize"), ("scaled by divergence", "no gradients")
METHODS = {
    "coordinate descent": choose("rounding", "descent"),
    "refit of maxima": choose("rounding", "refit"),
    "weighted scales": choose("scales", "weighted"),
    "squared scales": choose("scales", "grid:power=2"),
    "little damping": choose("damping", "growing"),
    "no act-order": choose("order", "none"),
    "tuned": choose("tuning", "adam"),
}
"""Other roundings and orders at the prices of `best`, since measuring with plain walks is slow."""

VARIANTS: dict[str, Recipe] = {
    "stock": STOCK,
    "stock + propagation": replace(STOCK, propagation=BEST.propagation),
    "fast": PRESETS["fast"],
    "best": BEST,
    "max": PRESETS["max"],
    "untuned best": UNTUNED,
    "untuned max": replace(PRESETS["max"], tuned_steps=0),
    "fisher": PLAIN,
    "without residual": replace(UNTUNED, residual=0.0),
    "all tokens alike": replace(UNTUNED, weigh_tokens=False, weigh_hessians=0.0),
    "one multiplier": UNTUNED.over([choose("scales", "stock")]),
    "plain Hessians": replace(UNTUNED, weigh_hessians=0.0),
    "Hessians in full": replace(UNTUNED, weigh_hessians=1.0),
    "fisher, plain Hessians": replace(PLAIN, weigh_hessians=0.0),
    "strength 1": replace(UNTUNED, propagation=1.0, residual=1.0),
    "scaled by divergence": replace(UNTUNED, divergence_rows=2),
    "no gradients": replace(UNTUNED, pricing="divergence", divergence_rows=2),
    "16 fisher rows": replace(UNTUNED, fisher_rows=16),
    "24 output rows": replace(PRESETS["max"], output_rows=24, tuned_steps=0),
    **{name: replace(UNTUNED.over([choose("transform", name)]), name=name) for name in TRANSFORMS},
    **{name: replace(UNTUNED.over([choice]), name=name) for name, choice in METHODS.items()},
}
"""Those that are not in the whole study run when they are named."""
EVERY_TARGET = ("stock", "best", "max")
TARGETS, ROWS = (2.5, 3.0, 4.0), 115
PARTS = (
    "best",
    "untuned best",
    "untuned max",
    "without residual",
    "fisher",
    "all tokens alike",
    "one multiplier",
    "fast",
    "stock",
    "stock + propagation",
)
PART_BITS, PART_ROWS, SUBSETS = 3.0, 24, 3
"""Target and calibration rows of the parts, and on how many calibration subsets `untuned best` shows the noise."""
MORE = 40
"""Rows of other text beyond those of a conversion, of which a tuning of the whole model takes what it needs."""
USED = 8
"""Calibration rows on which a trial is judged beside the held-out ones."""
DEVELOPMENT = {"web": (range(10), 5), "code": (range(58, 73), 5), "encyclopedia": (range(10, 58), 2)}
"""By domain of the calibration set: its rows, and how many of the rows no trial sees are used to judge choices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One conversion to judge; `rows` and `subset` name the calibration rows."""

    variant: str
    bits: float
    rows: int = ROWS
    subset: int = 0

    @property
    def key(self) -> str:
        """Name of its result file."""
        return f"{self.variant}-{self.bits:g}-{self.rows}-{self.subset}".replace(" ", "_")


def study(only: Sequence[str], targets: Sequence[float], rows: int, subsets: int) -> Iterator[Trial]:
    """The trials: the presets, or the variants that are named, at every target; in the whole study the parts too."""
    for bits in targets:
        yield from (Trial(variant=variant, bits=bits, rows=rows) for variant in only or EVERY_TARGET)
    if not only:
        yield from (Trial(variant=variant, bits=PART_BITS, rows=PART_ROWS) for variant in PARTS)
        others = range(1, subsets)
        yield from (Trial(variant="untuned best", bits=PART_BITS, rows=PART_ROWS, subset=s) for s in others)


class Study:
    """Inputs of all trials, and where their results lie."""

    def __init__(
        self, arguments: argparse.Namespace, converted: Callable[[ConversionConfig], ConversionResult] = convert
    ) -> None:
        """Read the held-out rows; `converted` runs a conversion."""
        self.converted = converted
        self.model: Path = arguments.model
        self.out: Path = arguments.out
        self.rows: int = arguments.rows
        self.keep: bool = arguments.keep
        self.calibration: str = arguments.calibration
        self.measuring: str = arguments.measuring
        self.more: str = arguments.more
        self.out.mkdir(parents=True, exist_ok=True)
        ids, domains = self._development() if arguments.development else halves(arguments.heldout)
        self.judge = Judge(self.model, ids, domains)
        self._judges: dict[str, Judge] = {}

    def run(self, trial: Trial) -> dict[str, Any]:
        """The result of a trial, from its file where it was run before."""
        path = self.out / f"{trial.key}.json"
        if path.exists():
            return json.loads(path.read_text())
        work = self.out / "work" / trial.key
        shutil.rmtree(work, ignore_errors=True)
        config = self._config(trial, work)
        with metered() as cost:
            result = self.converted(config)
        record = {
            **asdict(trial),
            "bpw": result.bpw,
            "predicted": (result.allocation or {})["objective"],
            "costs": [*self._measuring_cost(config.measurement), asdict(cost)],
            "domains": self.judge.domains_of(work / "exl2"),
            "used": self._used(trial).domains_of(work / "exl2")["used"],
        }
        if self.keep:
            (work / "exl2").rename(self.out / f"exl2-{trial.key}")
        shutil.rmtree(work)
        path.write_text(json.dumps(record, indent=1))
        return record

    def _development(self) -> tuple[np.ndarray, dict[str, slice]]:
        """Calibration rows that neither a measurement nor a conversion sees, and the slice of each domain."""
        ids = load_file(self.calibration)["input_ids"]
        seen = [load_file(path)["input_ids"] for path in (self.measuring, self._calibration_rows(self.rows, 0))]
        known = {row.tobytes() for rows in seen for row in rows.astype(ids.dtype)}
        picked, domains = list[int](), dict[str, slice]()
        for name, (rows, most) in DEVELOPMENT.items():
            fresh = [row for row in rows if row < len(ids) and ids[row].tobytes() not in known][:most]
            if not fresh:
                raise SystemExit(f"--development: {self.rows} calibration rows leave none of {name} to judge on")
            domains[name] = slice(len(picked), len(picked) + len(fresh))
            picked += fresh
        return ids[np.asarray(picked)].astype(np.int32), domains

    def _used(self, trial: Trial) -> Judge:
        """The judge on some of the rows that a trial quantizes on."""
        path = self._calibration_rows(trial.rows, trial.subset)
        if path not in self._judges:
            ids = _rows_of(path)
            picked = np.unique(np.linspace(0, len(ids) - 1, USED).round().astype(int))
            self._judges[path] = Judge(self.model, ids[picked], {"used": slice(None)})
        return self._judges[path]

    def _config(self, trial: Trial, work: Path) -> ConversionConfig:
        recipe = VARIANTS[trial.variant]
        return ConversionConfig(
            in_dir=self.model,
            out_dir=work / "work",
            compile_full=work / "exl2",
            bits=trial.bits,
            preset=recipe,
            measurement=self.measurement(recipe),
            **self._text(recipe, trial.rows, trial.subset),
        )

    def measurement(self, recipe: Recipe) -> Path:
        """The measurement that a recipe allocates by, shared by all trials that measure alike."""
        if recipe.name in METHODS:
            recipe = BEST
        by = re.sub(r"\W+", "-", f"-{recipe.measured_by}") if recipe.measured_by else ""
        alike = "-alike" if recipe.pricing == "fisher" and not recipe.weigh_tokens else ""
        name = f"{recipe.pricing}-{recipe.fisher_rows}-{recipe.divergence_rows}{alike}{by}"
        path = self.out / f"measurement-{name}.json"
        if not path.exists():
            work = self.out / "work" / name
            shutil.rmtree(work, ignore_errors=True)
            config = ConversionConfig(
                in_dir=self.model,
                out_dir=work,
                output_measurement=path,
                preset=recipe,
                cal_dataset=self.measuring,
            )
            with metered() as cost:
                self.converted(config)
            shutil.rmtree(work)
            _cost_file(path).write_text(json.dumps(asdict(cost)))
        return path

    def _measuring_cost(self, measurement: Path | None) -> list[dict[str, Any]]:
        """CPU seconds and peak memory of a measurement; empty where it came from elsewhere."""
        path = None if measurement is None else _cost_file(measurement)
        return [json.loads(path.read_text())] if path is not None and path.exists() else []

    def _calibration_rows(self, rows: int, subset: int) -> str:
        """A file of every `SUBSETS`-th row of the calibration set, or of as many rows from its front as asked."""
        path = self.out / f"rows-{rows}-{subset}.safetensors"
        if not path.exists():
            ids = load_file(self.calibration)["input_ids"]
            # Rows lie by domain: a stride keeps the composition.
            picked = np.unique(np.linspace(subset, len(ids) - SUBSETS + subset, rows).round().astype(int))
            save_file({"input_ids": ids[picked] if rows < len(ids) else ids}, path)
        return str(path)

    def _text(self, recipe: Recipe, rows: int, subset: int) -> dict[str, Any]:
        """The rows of a trial; where the recipe tunes the whole model, rows of other text come after them."""
        path = Path(self._calibration_rows(rows, subset))
        if not self.more or not recipe.tuned_steps:
            return {"cal_dataset": str(path)}
        ids, longer = _rows_of(path), path.with_stem(f"{path.stem}-more")
        if not longer.exists():
            every = _rows_of(self.calibration)
            known = {row.tobytes() for row in (*every, *_rows_of(self.measuring))}
            wanted = CalibrationConfig(source=self.more, rows=len(every) + MORE, length=ids.shape[1])
            vocabulary = open_model(self.model).config.vocab_size
            found = load_rows(wanted, load_tokenizer(self.model), vocab_size=vocabulary).input_ids
            fresh = [row for row in found if row.min() >= 0 and row.tobytes() not in known]
            save_file({"input_ids": np.concatenate([ids, fresh[:MORE]])}, longer)
        return {"cal_dataset": str(longer), "dataset_rows": len(ids)}


def _rows_of(path: Path | str) -> np.ndarray:
    return load_file(path)["input_ids"].astype(np.int32)


def table(records: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    domains = list(records[0]["domains"])
    heads = [f"{figure} {name}" for figure in ("KL", "ppl", "top-1") for name in domains]
    lines = [f"| variant | bpw | {' | '.join(heads)} | KL used | CPU s | peak GB |", "|---" * (len(heads) + 5) + "|"]
    for r in records:
        found = [r["domains"][name] for name in domains]
        name = r["variant"] + (f", calibration subset {r['subset']}" if r["subset"] else "")
        figures = [f"{d['kl']:.3f} ± {d['kl_error']:.3f}" for d in found]
        figures += [f"{d['perplexity']:.2f}" for d in found] + [f"{d['top1']:.3f}" for d in found]
        spent = " + ".join(f"{cost['cpu_seconds']:.0f}" for cost in r["costs"])
        peaks = ", ".join(f"{cost['peak_memory'] / 1e9:.2f}" for cost in r["costs"])
        figures.append(f"{r['used']['kl']:.3f}")
        lines.append(f"| {name} | {r['bpw']:.3f} | {' | '.join(figures)} | {spent} | {peaks} |")
    return "\n".join(lines)


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """KL divergence against bits per weight, a line per variant and domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, domain in zip(axes, ("web", "code"), strict=True):
        for variant in EVERY_TARGET:
            points = sorted(
                (r["bpw"], r["domains"][domain]["kl"], r["domains"][domain]["kl_error"])
                for r in records
                if r["variant"] == variant and r["rows"] == records[0]["rows"]
            )
            if points:
                bpw, kl, error = zip(*points, strict=True)
                axis.errorbar(bpw, kl, error, marker="o", capsize=3, label=variant)
        axis.set(title=f"{domain} rows", xlabel="bits per weight", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL to full precision, nats per token")
    axes[0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _cost_file(measurement: Path) -> Path:
    """The file of what a measurement cost."""
    return measurement.with_name(f"{measurement.stem}-cost.json")


def inputs(description: str | None, out: Path) -> argparse.ArgumentParser:
    """The inputs that every study of this kind takes."""
    golden = Path("../shared/data/golden")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="source model")
    parser.add_argument("--out", type=Path, default=out, help="results, kept between runs")
    parser.add_argument(
        "--calibration", default=str(golden / "cal_quant_512.safetensors"), help="token rows to quantize on"
    )
    parser.add_argument(
        "--measuring", default=str(golden / "cal_measure_512.safetensors"), help="token rows to measure on"
    )
    parser.add_argument(
        "--heldout", default=str(golden / "heldout_public_512.safetensors"), help="web rows, then as many of code"
    )
    parser.add_argument(
        "--more",
        default=f"standard:{golden.parent / 'standard_cal'}",
        help="text to tune the whole model on; '' for none",
    )
    parser.add_argument("--development", action="store_true", help="judge on calibration rows no trial sees instead")
    parser.add_argument("--keep", action="store_true", help="keep the converted directories beside the results")
    parser.add_argument("--rows", type=int, default=ROWS, help="calibration rows, but for those of the parts")
    return parser


def main() -> int:
    """Run the study and print its table."""
    parser = inputs(__doc__, Path("build/quality"))
    parser.add_argument("--only", nargs="*", default=[], choices=list(VARIANTS), help="variants to run")
    parser.add_argument(
        "--bits", nargs="*", type=float, default=list(TARGETS), help="targets of the presets, or of the variants named"
    )
    parser.add_argument("--subsets", type=int, default=SUBSETS, help="calibration subsets of the noise floor")
    parser.add_argument("--plot", type=Path, default=None, help="also draw KL against bits per weight here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    jax.config.update("jax_compilation_cache_dir", str(arguments.out / "xla"))
    found = Study(arguments)
    records = []
    for trial in study(arguments.only, arguments.bits, arguments.rows, arguments.subsets):
        records.append(found.run(trial))
        print(table(records[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    for rows in dict.fromkeys(record["rows"] for record in records):
        print(f"\n{rows} calibration rows\n\n{table([record for record in records if record['rows'] == rows])}")
    if arguments.plot:
        plot(records, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
