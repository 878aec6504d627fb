"""The command: stock's flags and defaults, exit codes, and what goes to which stream."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

import exl2jax.cli.convert as command
from exl2jax import ConversionConfig, ConversionResult, cli
from exl2jax.calibration import load_tokenizer
from exl2jax.cli.shared import SAME_BYTES, deliver, set_up
from exl2jax.conversion.settings import settings_record
from exl2jax.conversion.work_directory import JobState, WorkDirectory
from exl2jax.errors import Interrupted, ModelError
from exl2jax.stream.progress import RunControl
from exl2jax.variants.recipe import Recipe

ROOT = Path(__file__).parents[1]
LENGTH = 32


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(5).integers(0, 300, (4, LENGTH))}, path)
    return path


@pytest.fixture(autouse=True)
def _a_model_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands name a source that must be there: `model` in the working directory."""
    here = tmp_path_factory.mktemp("here")
    (here / "model").mkdir()
    monkeypatch.chdir(here)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ConversionConfig]:
    """The settings that the command would convert with."""
    found: list[ConversionConfig] = []

    def convert(config: ConversionConfig, control: RunControl) -> ConversionResult:
        found.append(config)
        return ConversionResult(output="nowhere", bits=config.bits, preset=config.recipe.name)

    monkeypatch.setattr(command, "convert", convert)
    monkeypatch.setattr(command, "finish_size", lambda config, result, wishes: None)
    return found


STOCK = {
    "-nr --no_resume": ("no_resume", None),
    "-cf --compile_full": ("compile_full", "full"),
    "-c --cal_dataset": ("cal_dataset", "cal.parquet"),
    "-b --bits": ("bits", "3.5"),
    "-ss --shard_size": ("shard_size", "4096"),
    "-rs --rope_scale": ("rope_scale", "2.0"),
    "-ra --rope_alpha": ("rope_alpha", "1.5"),
    "-hb --head_bits": ("head_bits", "8"),
    "-om --output_measurement": ("output_measurement", "m.json"),
    "-m --measurement": ("measurement", "old.json"),
    "-r --dataset_rows": ("dataset_rows", "50"),
    "-mr --measurement_rows": ("measurement_rows", "9"),
    "-l --length": ("length", "1024"),
    "-ml --measurement_length": ("measurement_length", "512"),
    "-so --status_output": (None, None),
    "-hsol --hidden_state_offload_layers": (None, "3"),
    "--seed": ("seed", "7"),
}
"""Stock's flags, the setting each sets, and a value for it."""


@pytest.mark.parametrize("flag", [(name, *entry) for names, entry in STOCK.items() for name in names.split()])
def test_every_stock_flag_in_both_spellings(
    flag: tuple[str, str | None, str | None], asked: list[ConversionConfig]
) -> None:
    name, setting, value = flag
    plain = ["convert", "-i", "model", "-o", "work"]
    assert cli.main([*plain, name] if value is None else [*plain, name, value]) == 0
    assert cli.main(plain) == 0
    config, default = asked
    changed = {f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)}
    assert changed == ({setting} if setting else set())
    if setting and value is not None:
        assert str(getattr(config, setting)) in (value, str(float(value)) if value.isdigit() else value)


def test_long_names_of_the_directories(asked: list[ConversionConfig]) -> None:
    assert cli.main(["convert", "--in_dir", "model", "--out_dir", "work"]) == 0
    assert (asked[0].in_dir, asked[0].out_dir) == (Path("model"), Path("work"))


def test_defaults_are_those_of_stock(asked: list[ConversionConfig]) -> None:
    """Rows and lengths of None are what the source calls for: 115, 19 and 2048, or 100 and 16, as in stock."""
    cli.main(["convert", "-i", "model", "-o", "work"])
    config = asked[0]
    assert (config.bits, config.head_bits, config.shard_size, config.seed) == (4.125, 6, 8192, 0)
    assert (config.rope_scale, config.rope_alpha, config.no_resume) == (None, None, False)
    assert (config.dataset_rows, config.measurement_rows, config.length, config.measurement_length) == (None,) * 4
    assert config.checkpoint_interval == 180


def test_numbers_may_stand_right_after_a_short_flag(asked: list[ConversionConfig]) -> None:
    """argparse, which stock uses, takes `-b4.5` and `--bits=4.5`."""
    plain = ["convert", "-i", "model", "-o", "work"]
    assert cli.main([*plain, "-b4.5"]) == 0
    assert cli.main([*plain, "--bits=4.5"]) == 0
    assert [config.bits for config in asked] == [4.5, 4.5]


SOURCE = {"cal_dataset": "rows.parquet", "cal_columns": ("text", "title"), "cal_noise_rows": 2}


@pytest.mark.parametrize(
    "source", [{}, {"cal_dataset": "rows.safetensors"}, SOURCE], ids=["built-in", "named", "described"]
)
@pytest.mark.parametrize("preset", ["stock", Recipe(name="mine", pricing="fisher", propagation=0.25)], ids=["a", "b"])
def test_a_job_is_resumed_by_its_directory_alone(
    tmp_path: Path, asked: list[ConversionConfig], source: dict[str, Any], preset: str | Recipe
) -> None:
    """The job file keeps the settings of the first run; flags given now are laid over them."""
    begun = ConversionConfig(
        in_dir=tmp_path / "model",
        out_dir=tmp_path / "work",
        compile_full=tmp_path / "full",
        bits=3.5,
        head_bits=8,
        cal_dir=tmp_path / "sets",
        measurement_rows=4,
        shard_size=512,
        preset=preset,
        variants=("scales=stock", "propagation=0.25"),
        checkpoint_interval=0,
        **source,
    )
    begun.out_dir.mkdir()
    WorkDirectory(begun.out_dir).save(JobState(inputs={}, settings=settings_record(begun), stage="quantize"))
    alone = ["convert", "-o", str(begun.out_dir)]
    assert cli.main(alone) == 0
    assert cli.main([*alone, "-b", "4.125", "-nr", "-cf", "elsewhere"]) == 0
    assert cli.main([*alone, "-c", "wiki.txt", "--cal-split", "validation"]) == 0
    same, changed, other = asked
    assert same == begun
    assert changed == replace(begun, bits=4.125, no_resume=True, compile_full=Path("elsewhere"))
    assert other == replace(begun, cal_dataset="wiki.txt", cal_split="validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "--out_dir"),
        (["convert", "-i", "model"], "--out_dir"),
        (["convert", "-i", "model", "-o", "work", "-b", "many"], "-b is 'many'"),
        (["convert", "-i", "model", "-o", "work", "--frobnicate"], "--frobnicate"),
        (["frobnicate"], "frobnicate"),
        (["convert", "-i", "model", "-o", "work", "-b", "9"], "-b is 9.0"),
        (["convert", "-i", "model", "-o", "work", "--bits", "1.5"], "--bits is 1.5"),
        (["convert", "-i", "model", "-o", "work", "-hb", "7"], "-hb is 7"),
        (["convert", "-i", "model", "-o", "work", "-om", "m.json", "-cf", "full"], "-om stops"),
        (
            ["convert", "-i", "model", "-o", "work", "-om", "m.json", "-m", "old.json"],
            "-om makes a measurement; -m already is one",
        ),
        (["convert", "-i", "model", "-o", "model"], "-o is"),
        (["convert", "-i", "model", "-o", "work", "-cf", "work"], "-cf and -o must"),
        (["eval", "model", "--text", "a", "--tokens", "b"], "--text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2_and_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(capsys: Any) -> None:
    for arguments in (["--help"], ["-h"], ["convert", "--help"], ["convert", "-h"], ["--version"]):
        assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "--head_bits" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("raised", "code"),
    [(ModelError("model: gone"), 1), (Interrupted("stopped"), 130), (KeyboardInterrupt(), 130)],
    ids=["failed", "interrupted", "second signal"],
)
def test_exit_codes_of_failures(raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def convert(config: ConversionConfig, control: RunControl) -> ConversionResult:
        raise raised

    monkeypatch.setattr(command, "convert", convert)
    assert cli.main(["convert", "-i", "model", "-o", "work", "--json"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1


def test_a_signal_asks_to_stop_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    before = signal.getsignal(signal.SIGINT)

    def convert(config: ConversionConfig, control: RunControl) -> ConversionResult:
        os.kill(os.getpid(), signal.SIGINT)
        while not control.stop.asked:
            time.sleep(0.001)
        raise Interrupted("stopped in measure after 1 of 4 modules; run the same command to resume")

    monkeypatch.setattr(command, "convert", convert)
    assert threading.current_thread() is threading.main_thread()
    assert cli.main(["convert", "-i", "model", "-o", "work"]) == 130
    assert "run the same command to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversion_by_command(tiny_llama: Path, tokens: Path, tmp_path: Path, capfd: Any) -> None:
    """Everything through the command: JSON alone on stdout, progress on stderr; then verify and eval the result."""
    full = tmp_path / "exl2"
    job = ["convert", "-i", str(tiny_llama), "-o", str(tmp_path / "work"), "-cf", str(full), "-c", str(tokens)]
    assert cli.main([*job, "-b", "5", "-mr", "2", "--json", "-so"]) == 0
    shown = capfd.readouterr()
    summary = json.loads(shown.out)
    assert summary["output"] == str(full)
    assert summary["bits"] == 5
    assert 4.5 < summary["bpw"] <= 5
    assert summary["size"] == sum(p.stat().st_size for p in full.glob("*.safetensors"))
    assert "quantize 1/5" in shown.err
    assert "[STATUS]" in shown.err
    assert "perplexity" in shown.err

    assert cli.main(["verify", str(full), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ok"] is True
    assert report["bits_per_weight"] == pytest.approx(summary["bpw"])
    assert cli.main(["verify", str(tiny_llama)]) == 1

    capfd.readouterr()
    assert cli.main(["eval", str(full), "--tokens", str(tokens), "--against", str(tiny_llama), "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert set(figures) >= {"perplexity", "tokens", "kl_divergence", "top1_agreement"}
    assert figures["tokens"] == 4 * (LENGTH - 1)
    assert 0 < figures["kl_divergence"] < 0.5
    text = tmp_path / "text.txt"
    text.write_text("A small river runs through the town. " * 20, encoding="utf-8")
    assert cli.main(["eval", str(full), "--text", str(text), "-l", "64"]) == 0
    assert "perplexity" in capfd.readouterr().out


def test_drop_in_script_has_the_flags_of_the_command() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "-i", "none", "-o", "none", "-b", "99"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: -b is 99.0")


def test_a_table_that_goes_to_no_terminal_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(*(f"column {i}" for i in range(9)))
    cells = [f"{i}.123456789" for i in range(9)]
    table.add_row(*cells)
    deliver(False, {}, lambda: table)
    out = capsys.readouterr().out
    assert all(cell in out for cell in cells)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"{SAME_BYTES}=true"),
        ("--xla_cpu_enable_fast_math=false", f"--xla_cpu_enable_fast_math=false {SAME_BYTES}=true"),
        (f"{SAME_BYTES}=false", f"{SAME_BYTES}=false"),
    ],
)
def test_a_gpu_is_asked_for_the_same_bytes(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    monkeypatch.setenv("XLA_FLAGS", before)
    set_up(Console(stderr=True))
    assert os.environ["XLA_FLAGS"] == after


def test_importing_does_nothing() -> None:
    """No output, no settings of JAX or logging, no signal handler, no argument read."""
    code = (
        "import jax, logging, signal\n"
        "def state():\n"
        "    return ({k: v for k, v in jax.config.values.items()}, logging.root.handlers, logging.root.level,\n"
        "            signal.getsignal(signal.SIGINT))\n"
        "before = repr(state())\n"
        "import exl2jax, exl2jax.cli, exl2jax.ops\n"
        "assert repr(state()) == before\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, "--bogus"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_are_there_and_documented() -> None:
    import exl2jax
    from exl2jax import ops

    for module in (exl2jax, ops):
        for name in module.__all__:
            assert name.startswith("__") or getattr(module, name).__doc__, name
    assert {"convert", "ConversionConfig", "load_exl2"} <= set(exl2jax.__all__)


def test_calibrate_builds_shows_and_does_not_convert(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "rows.safetensors"
    command = [
        "calibrate",
        "-i",
        str(tiny_llama),
        "-mr",
        "30",
        "-ml",
        "32",
        "--seed",
        "4",
        "--measure",
        "--out",
        str(out),
    ]
    assert cli.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    ids = load_file(out)["input_ids"]
    assert ids.shape == (30, 32)
    assert (shown["rows"], shown["length"], shown["source"]) == (30, 32, "standard")
    assert sum(shown["composition"].values()) == 30
    assert shown["sha256"] == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert shown["coverage"] == len(np.unique(ids)) / 320
    assert shown["first"] == load_tokenizer(tiny_llama).decode(ids[0])
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    for word in ("rows, wiki", "vocabulary", "duplicate rows", "first tokens", "last tokens"):
        assert word in table


def test_calibrate_refuses_in_one_line(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.safetensors"
    command = ["calibrate", "-i", str(tiny_llama), "--out", str(out), "-c"]
    assert cli.main([*command, "ptb"]) == 2
    assert cli.main([*command, str(tmp_path / "none.parquet")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "wikitext2, c4, c4-new" in first
    assert "none.parquet: no such calibration file" in second
    assert not out.exists()
