#!/usr/bin/env python3
"""The frontier: every format on the same rows at equal file size.

    python -m scripts.peers.frontier                               all formats; what is done is not done again
    python -m scripts.peers.frontier --only Q3_K_M hqq-3-64        some formats
    python -m scripts.peers.frontier --ours 'best 3.0=build/exl2'  beside these EXL2 directories, ours or stock's

EXL2 is what `make quality` kept of the presets, unless directories are named. The demo model is quantized by other
formats, each result is dequantized to a plain directory in float16, and all are judged alike: KL divergence from the
source, perplexity and agreement on the held-out rows. A format that does not run here stands in the table with the
reason. The scripts beside this one run in `.venv-peers`; this one in `.venv`.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from scripts.peers.activations import importance_file
from scripts.peers.formats import FORMATS, Format
from scripts.peers.layout import bits_per_weight, decoder_bytes, decoder_weights, heads_of, weight_bytes
from scripts.peers.table import plot, table
from scripts.studies.judge import Judge, halves
from scripts.studies.quality import ROWS, TARGETS, study

PYTHON = Path(".venv-peers/bin/python")


class Frontier:
    """Inputs of all formats, and where their results lie."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Read the held-out rows and what the source holds."""
        self.model: Path = arguments.model
        self.out: Path = arguments.out
        self.tokens: Path = arguments.calibration
        self.rows: int = arguments.rows
        self.weights = decoder_weights(heads_of(self.model))
        self.judge = Judge(self.model, *halves(arguments.heldout))
        self.out.mkdir(parents=True, exist_ok=True)

    def record(self, wanted: Format) -> dict[str, Any]:
        """What is known of a format: from its file, or by making it; a failure is tried again."""
        known = self.kept(wanted)
        if known is not None and "failure" not in known:
            return known
        record: dict[str, Any] = {"key": wanted.key, "label": wanted.label, "family": wanted.family}
        work = self.out / "work" / wanted.key
        shutil.rmtree(work, ignore_errors=True)
        failure, shared = self._make(wanted, work)
        if failure:
            record["failure"] = failure
        else:
            facts = json.loads((work / "peer.json").read_text())
            facts["cpu_seconds"] = [*shared, facts["cpu_seconds"]]
            facts["bpw"] = bits_per_weight(facts["decoder_bytes"], self.weights)
            record |= facts | {"domains": self.judge.domains_of(work / "plain")}
        shutil.rmtree(work, ignore_errors=True)
        self._file(wanted.key).write_text(json.dumps(record, indent=1))
        return record

    def kept(self, wanted: Format) -> dict[str, Any] | None:
        """The record of a format that ran before."""
        path = self._file(wanted.key)
        return json.loads(path.read_text()) if path.exists() else None

    def ours(self, named: str) -> dict[str, Any]:
        """The record of a finished EXL2 directory: `DIR` or `LABEL=DIR`."""
        label, _, place = named.rpartition("=")
        directory = Path(place)
        heads = heads_of(directory)
        label = label or directory.name
        return {
            "label": f"EXL2 {label}",
            "family": f"EXL2 {label.split()[0]}",
            "file_bytes": weight_bytes(directory),
            "decoder_bytes": decoder_bytes(heads),
            "bpw": bits_per_weight(decoder_bytes(heads), self.weights),
            "cpu_seconds": [],
            "domains": self.judge.domains_of(directory),
        }

    def _file(self, key: str) -> Path:
        return self.out / f"{key}.json"

    def _make(self, wanted: Format, work: Path) -> tuple[str, list[float]]:
        """Run the script of a format; returns why it failed, or nothing, and the seconds that formats share."""
        if not PYTHON.exists():
            return f"{PYTHON} is not there: run scripts/setup.sh peers", []
        command = [str(PYTHON), "-m", f"scripts.peers.{wanted.script}", *wanted.arguments]
        command += [
            "--model",
            str(self.model),
            "--out",
            str(work),
            "--tokens",
            str(self.tokens),
            "--rows",
            str(self.rows),
        ]
        shared = []
        if wanted.script == "k_quants":
            squares = self.out / f"squares-{self.rows}.safetensors"
            shared = [importance_file(self.model, self.tokens, self.rows, squares)]
            command += ["--squares", str(squares)]
        work.mkdir(parents=True)
        log = self.out / f"{wanted.key}.log"
        with log.open("w") as file:
            environment = {**os.environ, "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
            run = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
        if run.returncode == 0:
            return "", shared
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {run.returncode}", shared


def of_study(folder: Path) -> list[str]:
    """The EXL2 directories that the quality study kept of the presets, each with its label."""
    kept = (folder / f"exl2-{t.key}" for t in study([], TARGETS, ROWS, subsets=1) if t.rows == ROWS)
    return [f"{' '.join(path.name.split('-')[1:3])}={path}" for path in kept if path.exists()]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    golden = Path("../shared/data/golden")
    keys = [wanted.key for wanted in FORMATS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="source model, a Llama in float16")
    parser.add_argument("--out", type=Path, default=Path("build/peers"), help="results, kept between runs")
    parser.add_argument("--calibration", type=Path, default=golden / "cal_quant_512.safetensors", help="token rows")
    parser.add_argument("--heldout", type=Path, default=golden / "heldout_public_512.safetensors", help="rows to judge")
    parser.add_argument("--rows", type=int, default=115, help="calibration rows")
    parser.add_argument("--only", nargs="*", default=[], choices=keys, help="formats to run")
    parser.add_argument("--known", action="store_true", help="run nothing: the table of what ran before")
    parser.add_argument(
        "--ours", nargs="*", default=of_study(Path("build/quality")), metavar="[LABEL=]DIR", help="EXL2 directories"
    )
    parser.add_argument("--plot", type=Path, help="where to draw the plot; build/peers/frontier.png unless named")
    return parser.parse_args(arguments)


def runs(wanted: Format, options: argparse.Namespace) -> bool:
    """Whether a format is to run now."""
    if options.known:
        return False
    return wanted.key in options.only if options.only else not wanted.dear


def left_out(wanted: Format) -> str:
    """Why a format that never ran stands in the table without figures."""
    why = "200 steps for each block are many for a processor; " if wanted.dear else ""
    return f"{why}`--only {wanted.key}` runs it"


def main(arguments: list[str] | None = None) -> int:
    """Run the formats, print the table, draw the plot."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not options.known:
        jax.config.update("jax_compilation_cache_dir", str(options.out / "xla"))
    frontier = Frontier(options)
    records = [frontier.ours(named) for named in options.ours]
    for wanted in FORMATS:
        if runs(wanted, options):
            records.append(frontier.record(wanted))
            print(table(records[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        elif (known := frontier.kept(wanted)) is not None:
            records.append(known)
        elif not options.only:
            records.append({"label": wanted.label, "family": wanted.family, "failure": left_out(wanted)})
    print(table(records))
    plot(records, options.plot or options.out / "frontier.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
