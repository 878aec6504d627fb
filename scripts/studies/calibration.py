#!/usr/bin/env python3
"""Compare calibration sources: one conversion for each, judged on text that none of them holds.

Each line of the result file is one source; sources that stand there already are not converted again. Differences to the
first source are paired by held-out row: a mean and its standard error, in percent of perplexity and of divergence.
"""

import argparse
import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from exl2jax import ConversionConfig, Exl2JaxError, convert, open_model
from exl2jax.evaluation import read_token_rows
from exl2jax.evaluation.logits import final_states
from exl2jax.models import Model, build_decoder
from exl2jax.report import make_progress
from exl2jax.stream.progress import RunControl
from exl2jax.stream.scoring import score

SOURCES = ("standard", "exllamav2", "self", "random")


class Judge:
    """The full-precision model's view of the held-out rows, computed once."""

    def __init__(self, model: Path, ids: np.ndarray) -> None:
        """Run the model over `ids [R, T]`."""
        self._ids = ids
        self._source = open_model(model)
        self._reference = (self._source.head_params(), final_states(self._source, ids))

    def rows(self, model: Model | None = None) -> dict[str, list[float]]:
        """Mean negative log likelihood and KL divergence of each row, in nats per token; None: the source's own."""
        model = model or self._source
        states = final_states(model, self._ids)
        found = score(build_decoder(model.config), model.head_params(), states, self._ids, self._reference)
        assert found.kl is not None  # a reference was given
        return {"nll": found.nll.mean(axis=1).tolist(), "kl": found.kl.mean(axis=1).tolist()}


def study(source: str, arguments: argparse.Namespace, judge: Judge, console: Console) -> dict[str, Any]:
    """Convert with a source and judge the result."""
    work = arguments.work / "".join(c if c.isalnum() else "-" for c in source)
    shutil.rmtree(work, ignore_errors=True)
    config = ConversionConfig(
        in_dir=arguments.model,
        out_dir=work / "job",
        compile_full=work / "exl2",
        cal_dataset=source,
        measurement=arguments.measurement,
        bits=arguments.bits,
        dataset_rows=arguments.rows,
        measurement_rows=arguments.measurement_rows,
        length=arguments.length,
        measurement_length=arguments.length,
        preset=arguments.preset,
        seed=arguments.seed,
    )
    begun = time.monotonic()
    result = convert(config, RunControl(progress=make_progress(console, status=False)))
    assert config.compile_full is not None and result.calibration is not None
    return {
        "source": source,
        "preset": arguments.preset,
        "bpw": result.bpw,
        "composition": result.calibration["quantize"]["composition"],
        "seconds": round(time.monotonic() - begun),
        **judge.rows(open_model(config.compile_full)),
    }


def perplexity(record: dict[str, Any]) -> float:
    """Of the rows of a record, which are equally long."""
    return float(np.exp(np.mean(record["nll"])))


def paired(ratios: np.ndarray) -> str:
    """The mean of differences by row and its standard error, in percent, from ratios by row."""
    percent = 100 * (ratios - 1)
    return f"{percent.mean():+.2f} % ± {percent.std(ddof=1) / np.sqrt(len(percent)):.2f}"


def markdown(records: list[dict[str, Any]]) -> str:
    """The table of the documentation; the first record is the source model's own."""
    lines = [
        "| calibrated on | perplexity | against full precision | against the first source | KL (nats per token) | "
        "against the first source |",
        "|---|---|---|---|---|---|",
    ]
    full, first, *others = records
    lines.append(f"| (full precision) | {perplexity(full):.3f} | | | | |")
    for record in (first, *others):
        above = 100 * (perplexity(record) / perplexity(full) - 1)
        by_perplexity = by_kl = ""
        if record is not first:
            by_perplexity = paired(np.exp(np.subtract(record["nll"], first["nll"])))
            by_kl = paired(np.divide(record["kl"], first["kl"]))
        lines.append(
            f"| `{record['source']}` | {perplexity(record):.3f} | {above:+.2f} % | {by_perplexity} | "
            f"{np.mean(record['kl']):.4f} | {by_kl} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="source model directory")
    parser.add_argument(
        "--tokens",
        type=Path,
        default=Path("../shared/data/golden/heldout_public_512.safetensors"),
        help="held-out token rows (input_ids)",
    )
    parser.add_argument("--work", type=Path, default=Path("demo/calibration"), help="work directory")
    parser.add_argument("--results", type=Path, default=Path("demo/calibration.jsonl"), help="result file")
    parser.add_argument("-c", "--source", action="append", help=f"calibration source, repeatable; else {SOURCES}")
    parser.add_argument("-b", "--bits", type=float, default=3.0, help="target bits per weight")
    parser.add_argument("-r", "--rows", type=int, default=115, help="calibration rows")
    parser.add_argument("-mr", "--measurement-rows", type=int, default=19, help="measurement rows")
    parser.add_argument("-l", "--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "-m", "--measurement", type=Path, help="measurement for every conversion: then only the quantization differs"
    )
    parser.add_argument("--preset", default="best", help="recipe of the conversions")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    text = arguments.results.read_text(encoding="utf-8") if arguments.results.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    try:
        judge = Judge(arguments.model, read_token_rows(arguments.tokens))
        for source in (None, *(arguments.source or SOURCES)):
            if source in [record["source"] for record in records]:
                continue
            made = {"source": None, **judge.rows()} if source is None else study(source, arguments, judge, console)
            records.append(made)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(made) + "\n")
    except Exl2JaxError as e:
        console.print(f"error: {e}", markup=False)
        return e.exit_code
    sys.stdout.write(markdown(records) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
