#!/usr/bin/env python3
"""Convert the demo model to EXL2, verify it, and show its results on text that the calibration did not see."""

import argparse
import logging
import resource
import shutil
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exl2jax import ConversionConfig, ConversionResult, Evaluation, Exl2JaxError, convert, evaluate
from exl2jax.calibration import load_tokenizer
from exl2jax.exl2.verify.directory import verify
from exl2jax.generation import Sampling, encode_prompt, generate, load_resident
from exl2jax.ops import Products
from exl2jax.report import make_progress
from exl2jax.stream.progress import RunControl

ROW_LENGTH = 512
PROMPTS = ("The three primary colours are", "Once upon a time, a fox", "def fibonacci(n):")
NEW_TOKENS = 24
"""Tokens written after each prompt, before and after the conversion."""


def heldout_rows(model: Path) -> np.ndarray:
    """The package's held-out text as rows of 512 tokens."""
    text = resources.files("exl2jax.calibration").joinpath("data/heldout.utf8").read_text(encoding="utf-8")
    ids = np.asarray(load_tokenizer(model).encode(text), np.int32)
    rows = len(ids) // ROW_LENGTH
    return ids[: rows * ROW_LENGTH].reshape(rows, ROW_LENGTH)


def table(result: ConversionResult, before: Evaluation, after: Evaluation, seconds: dict[str, float]) -> Table:
    """The closing table."""
    out = Table(title="exl2jax demo", show_header=False)
    out.add_column(style="bold")
    out.add_column(overflow="fold")
    assert result.bpw is not None and result.size is not None and result.source_size is not None
    out.add_row("bits per weight asked", f"{result.bits:g}")
    out.add_row("bits per weight reached", f"{result.bpw:.4f} (decoder), {result.head_bits} (head)")
    out.add_row("size", f"{result.size / 1e6:.1f} MB, source {result.source_size / 1e6:.1f} MB")
    out.add_row("held-out perplexity before", f"{before.perplexity:.3f} ({before.tokens} tokens)")
    out.add_row("held-out perplexity after", f"{after.perplexity:.3f}")
    out.add_row("KL divergence, top-1 agreement", f"{after.kl_divergence:.4f}, {after.top1_agreement:.3f}")
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    out.add_row("peak memory", f"{peak / 1e9:.2f} GB (conversion and evaluation)")
    for stage, spent in seconds.items():
        out.add_row(f"seconds, {stage}", f"{spent:.1f}")
    out.add_row("result", result.output)
    return out


def lines(directory: Path) -> list[str]:
    """The first lines that a model writes after each prompt, greedily."""
    resident, sampling = load_resident(directory), Sampling(new_tokens=NEW_TOKENS)
    found = (generate(resident, encode_prompt(resident, prompt), sampling).text for prompt in PROMPTS)
    return [" ".join(text.split()) for text in found]


def generated(source: Path, converted: Path) -> Table:
    """Each prompt with its continuation before and after."""
    out = Table("prompt", "before", "after", title="generated, always the likeliest token", show_lines=True)
    for row in zip(PROMPTS, lines(source), lines(converted), strict=True):
        out.add_row(*map(Text, row))
    return out


def run(config: ConversionConfig, console: Console) -> int:
    """Convert, verify, evaluate, show."""
    assert config.compile_full is not None
    result = convert(config, RunControl(progress=make_progress(console, status=False)))
    begun = time.monotonic()
    report = verify(config.compile_full)
    for fault in report.faults:
        console.print(f"{fault.tensor}: {fault.message}", markup=False)
    verified = time.monotonic()
    rows = heldout_rows(config.in_dir)
    before, after = evaluate(config.in_dir, rows), evaluate(config.compile_full, rows, config.in_dir)
    seconds = {
        **(result.seconds or {}),
        "verify": verified - begun,
        "evaluate": time.monotonic() - verified,
    }
    Console().print(table(result, before, after, seconds))
    Console().print(generated(config.in_dir, config.compile_full))
    return 0 if report.ok else 1


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="source model directory")
    parser.add_argument("--out", type=Path, default=Path("demo/exl2"), help="EXL2 directory to make")
    parser.add_argument("--work", type=Path, default=Path("demo/work"), help="work directory")
    parser.add_argument("-b", "--bits", type=float, default=4.0, help="target bits per weight")
    parser.add_argument("-r", "--rows", type=int, default=24, help="calibration rows of 512 tokens")
    parser.add_argument("-mr", "--measurement-rows", type=int, default=6, help="measurement rows of 512 tokens")
    parser.add_argument("--products", choices=tuple(Products), help="products of the passes over all rows")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    shutil.rmtree(arguments.out, ignore_errors=True)
    config = ConversionConfig(
        in_dir=arguments.model,
        out_dir=arguments.work,
        compile_full=arguments.out,
        bits=arguments.bits,
        dataset_rows=arguments.rows,
        measurement_rows=arguments.measurement_rows,
        length=ROW_LENGTH,
        measurement_length=ROW_LENGTH,
        products=arguments.products,
        no_resume=True,
    )
    try:
        return run(config, console)
    except Exl2JaxError as e:
        console.print(f"error: {e}", markup=False)
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
