"""Fuzzing of everything that is read from strangers, with hypothesis.

A target is a sound file, a strategy of damages to it, and the function that reads it. Whatever the content, reading
ends in a result or in an error of ours, within ten seconds and a gigabyte of memory.
"""

import json
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from exl2jax.calibration import load_tokenizer
from exl2jax.calibration.parquet import parquet_texts
from exl2jax.calibration.ready import read_ready
from exl2jax.conversion.checkpoint import FileCheckpoint
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.settings import resumed_config, settings_record
from exl2jax.conversion.work_directory import JobState, WorkDirectory
from exl2jax.errors import Exl2JaxError
from exl2jax.exl2.verify.directory import verify
from exl2jax.measure.measurement import Measurement, read_measurement
from exl2jax.models import module_specs, open_model, read_config
from exl2jax.storage import TensorFiles, write_checked_tensors
from exl2jax.testing.tiny_model import write_tiny_llama
from tests.exl2.exl2_dir import write_tiny_exl2

SECONDS_A_CASE = 10
GIGABYTE = 2**30

NUMBERS = [0, -1, 1, 2, 3, 31, 32, 2**31, 2**32, 2**53, 2**63, 2**64, 10**18, 10**400, -(2**63), 0.0, -0.0, 0.5]
EXTREMES = [1e-320, 1e308, 3.0, True, False, None, [], {}, [[]], [{}], {"": None}, [None] * 50, [0] * 9, ["a"]]
WORDS_OF_EVIL = ["", "a", "..", "../x", "/etc/passwd", "\0", "\ud800", "é" * 300, "1", "nan", "__class__"]
NASTY = st.sampled_from([*NUMBERS, *EXTREMES, *WORDS_OF_EVIL])


@dataclass(frozen=True)
class Target:
    """`name`, what to write (`content` from a damage), and how to `read` it in a prepared directory."""

    name: str
    share: float
    damages: st.SearchStrategy[Any]
    content: Callable[[Any], bytes]
    file: str
    read: Callable[[Path], Any]


# --- damages


def _json_edits() -> st.SearchStrategy[Any]:
    edit = st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.sampled_from("rrrdkw"), NASTY)
    return st.lists(edit, min_size=1, max_size=3)


def edited(value: Any, edits: Any) -> Any:
    """A JSON value with edits: each walks down by indices and replaces, drops, renames or wraps what it finds."""
    value = json.loads(json.dumps(value))
    for path, action, new in edits:
        holder: Any = {"": value}
        key: Any = ""
        for step in path:
            below = holder[key]
            if not isinstance(below, dict | list) or not below:
                break
            holder, key = below, list(below)[step % len(below)] if isinstance(below, dict) else step % len(below)
        value = _apply(value, holder, key, action, deepcopy(new))
    return value


def _apply(value: Any, holder: Any, key: Any, action: str, new: Any) -> Any:
    if key == "" and "" in holder and holder[""] is value:
        return new if action == "r" else value
    if action == "d":
        del holder[key]
    elif action == "k" and isinstance(holder, dict):
        holder[str(new)[:50]] = holder.pop(key)
    elif action == "w":
        holder[key] = [holder[key]]
    else:
        holder[key] = new
    return value


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _byte_edits() -> st.SearchStrategy[Any]:
    edit = st.tuples(
        st.sampled_from(["set", "set", "flip", "cut", "insert", "word"]), st.floats(0, 1), st.integers(0, 255)
    )
    return st.lists(edit, min_size=1, max_size=5)


WORDS = [0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def damaged(content: bytes, edits: Any, near: int | None = None) -> bytes:
    """Bytes with edits at relative positions, most of them within the first `near` bytes."""
    data = bytearray(content)
    for i, (action, place, value) in enumerate(edits):
        span = len(data) if near is None or i % 4 == 3 else min(near, len(data))
        at = min(int(place * span), max(len(data) - 1, 0))
        if action == "cut":
            del data[at:]
        elif action == "insert":
            data[at:at] = bytes([value]) * (value % 9)
        elif action == "word":
            data[at : at + 8] = WORDS[value % len(WORDS)].to_bytes(8, "little")
        elif data:
            data[at] = value if action == "set" else data[at] ^ (1 << value % 8)
    return bytes(data)


def _header(tensors: bytes, edits: Any) -> bytes:
    """A safetensors file whose header was edited as JSON, its length put right."""
    length = int.from_bytes(tensors[:8], "little")
    header = _dump(edited(json.loads(tensors[8 : 8 + length]), edits))
    return len(header).to_bytes(8, "little") + header + tensors[8 + length :]


# --- readers


def _read_tensors(directory: Path) -> None:
    files = TensorFiles([directory / "a.safetensors"])
    for name in files:
        files.read(name)


def _read_model(directory: Path) -> None:
    config, _, _ = read_config(directory)
    module_specs(config)
    model = open_model(directory)
    getattr(model, "check_headers", lambda: None)()


def _read_job(directory: Path) -> None:
    work = WorkDirectory(directory)
    asked = work.settings()
    resumed_config(directory, asked, {})
    work.resume(JobState(inputs={"bits": 4.0}, settings={"in_dir": "model"}, stage="measure"))


def _read_checkpoint(directory: Path) -> None:
    FileCheckpoint(
        work=WorkDirectory(directory), stage="measure", job="job", write=lambda _: None, read=lambda n: [0.5] * n
    ).load()


def _read_parquet(directory: Path) -> None:
    for _ in parquet_texts(directory / "a.parquet", ()):
        pass


# --- targets


def _parquet(home: Path) -> bytes:
    table = pa.table({"text": [f"line {i} " * (i % 5) for i in range(200)], "n": list(range(200))})
    pq.write_table(table, home / "sound.parquet", row_group_size=60, compression="snappy")
    return (home / "sound.parquet").read_bytes()


def targets(home: Path) -> list[Target]:
    """Every target, each with a directory `home/NAME` prepared for it."""
    model = write_tiny_llama(home / "model", intermediate_size=96, num_layers=1)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tensors = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}, {"format": "pt"})
    specs = module_specs(read_config(model)[0])
    for name in ("config", "index"):
        shutil.copytree(model, home / name)
    (home / "index" / "model.safetensors").rename(home / "index" / "one.safetensors")
    names = list(TensorFiles([model / "model.safetensors"]))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "one.safetensors")}
    exl2 = write_tiny_exl2(home / "exl2")
    shard = sorted(exl2.glob("*.safetensors"))[0]
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    job = _sound_job(home / "jobs")
    json_edits, byte_edits = _json_edits(), _byte_edits()

    def of_json(name: str, share: float, value: Any, file: str, read: Callable[[Path], Any]) -> Target:
        return Target(name, share, json_edits, lambda e: _dump(edited(value, e)), file, read)

    def of_bytes(name: str, share: float, sound: bytes, file: str, read: Any, near: int | None = None) -> Target:
        return Target(name, share, byte_edits, lambda e: damaged(sound, e, near), file, read)

    parquet, ready = _parquet(home), save({"input_ids": np.arange(12).reshape(3, 4)})
    checkpoint = _sound_checkpoint(home)
    read_rows = partial(read_ready, rows=None, length=None)
    measurement = _measurement(specs)
    return [
        Target("header", 16, json_edits, lambda e: _header(tensors, e), "a.safetensors", _read_tensors),
        of_bytes("safetensors", 16, tensors, "a.safetensors", _read_tensors, 200),
        of_json("config", 16, config, "config.json", _read_model),
        of_bytes("config bytes", 4, _dump(config), "config.json", _read_model),
        of_json("index", 8, index, "model.safetensors.index.json", TensorFiles.of_source),
        of_json("measurement", 12, measurement, "m.json", lambda d: read_measurement(d / "m.json", specs)),
        of_json("job", 10, job, "job_new.json", _read_job),
        of_bytes("checkpoint", 6, checkpoint, "hidden_states.safetensors", _read_checkpoint, 200),
        of_bytes("parquet", 8, parquet, "a.parquet", _read_parquet),
        of_bytes("parquet footer", 8, parquet[::-1], "a.parquet", _read_parquet, 900),
        of_bytes("ready", 4, ready, "r.safetensors", lambda d: read_rows(d / "r.safetensors")),
        of_json("tokenizer", 3, tokenizer, "tokenizer.json", load_tokenizer),
        of_json("exl2 config", 1, json.loads((exl2 / "config.json").read_text()), "config.json", verify),
        of_bytes("exl2 shard", 1, shard.read_bytes(), shard.name, verify, None),
    ]


def _sound_job(home: Path) -> Any:
    home.mkdir()
    work = WorkDirectory(home)
    settings = settings_record(ConversionConfig(in_dir=home.parent / "model", out_dir=home))
    records = {"seconds": {"measure": 1.0}}
    work.save(JobState(inputs={"bits": 4.0}, settings=settings, stage="quantize", records=records))
    return json.loads(work.job_file.read_text(encoding="utf-8"))


def _sound_checkpoint(home: Path) -> bytes:
    metadata = {"format": "2", "stage": "measure", "job": "job", "position": "2", "outputs": ""}
    write_checked_tensors(home / "c.safetensors", {"row.00000": np.ones((2, 3), np.float32)}, metadata)
    return (home / "c.safetensors").read_bytes()


def _measurement(specs: Any) -> Any:
    from exl2jax.measure.measurement import Candidate, candidate_rows, module_bits

    modules = {
        spec.key: tuple(
            Candidate(qparams=row, total_bits=module_bits(spec, row), accuracy=0.9) for row in candidate_rows(spec)[:4]
        )
        for spec in specs
    }
    return Measurement(modules=modules).to_json(len(modules))


# --- running


@contextmanager
def limited(seconds: int = SECONDS_A_CASE) -> Any:
    """Turn a hang into an error."""

    def late(*_: Any) -> None:
        raise AssertionError(f"took more than {seconds} s")

    # Seconds of work, not of waiting on a busy machine; again each second, for an error can be lost in a callback.
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run_target(target: Target, home: Path, count: int, start: int = 0) -> int:
    """Read `count` damaged files; anything but a result or an error of ours escapes."""
    directory = home / target.name
    directory.mkdir(exist_ok=True)
    done = 0

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )
    @given(target.damages)
    def case(damage: Any) -> None:
        nonlocal done
        done += 1
        content = target.content(damage)
        if target.name == "parquet footer":
            content = content[::-1]
        (directory / target.file).write_bytes(content)
        with limited():
            try:
                target.read(directory)
            except Exl2JaxError as e:
                assert str(e).isprintable() or "\n" in str(e), f"a message that cannot be shown: {e!r}"

    case()
    return done


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CASES = 110_000
"""Cases of the full run; hypothesis may end a target early when its damages are exhausted."""


def fuzz_all(workers: int, cases: int = CASES) -> dict[str, Any]:
    """Every target's share of the cases, spread over processes: figures for the page."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="exl2jax-fuzz-") as home:
        names = [target.name for target in targets(Path(home) / "names")]
        jobs = [(name, part) for name in names for part in range(workers)]
        with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=4) as pool:
            found = pool.starmap(partial(_one, home, cases, workers), jobs, chunksize=1)
    failed = sum(bool(problem) for _, problem, _ in found)
    for (name, _), (_, problem, _) in zip(jobs, found, strict=True):
        if problem:
            print(f"fuzz {name}: {problem}", flush=True)
    peak = max(memory for _, _, memory in found)
    return {
        "cases": sum(done for done, _, _ in found),
        "failed": failed + (peak > GIGABYTE),
        "seconds": round(time.monotonic() - begun),
        "note": f"peak memory {peak / 1e6:.0f} MB",
    }


def _one(home: str, cases: int, parts: int, name: str, part: int) -> tuple[int, str, int]:
    place = Path(home) / f"{name.replace(' ', '-')}-{part}"
    every = targets(place)
    target = next(t for t in every if t.name == name)
    count = round(cases * target.share / sum(t.share for t in every) / parts)
    try:
        return run_target(target, place, count, start=part), "", peak_memory()
    except BaseException as e:
        return 0, f"{type(e).__name__}: {e} {getattr(e, '__notes__', '')}", peak_memory()
