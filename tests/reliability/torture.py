"""The experiments in full: `python -m tests.reliability.torture [STAGE ...]`, or `make torture`.

Stages: kills, moments, faults, power, corruption, fuzz. Figures of every stage that was run go into the table of
docs/reliability.md; the exit code is 1 when anything was lost, unclear or crashed.
"""

import json
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

from tests.reliability import experiments
from tests.reliability.experiments import Reference, reference
from tests.reliability.scene import Scene, make_scene

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
WORKERS = 2
MOMENTS = 100
SEED = 20_260_101

type Job = tuple[Any, ...]
type Wrong = list[str]


class House:
    """Where the experiments live: the scene, its undisturbed run, and a base directory per worker."""

    def __init__(self, home: Path) -> None:
        self.home, self.scene = home, make_scene(home / "scene")

    def base(self) -> Path:
        return self.home / f"base-{os.getpid()}"


def _undisturbed(house: House, queue: Any) -> None:
    queue.put(reference(house.scene, house.base()))


def _kill(house: House, known: Reference, job: Job) -> Wrong:
    index, torn = job
    base = house.base()
    experiments.kill_in_child(house.scene, base, index, torn)
    return _finish(house.scene, base, known)


def _moment(house: House, known: Reference, job: Job) -> Wrong:
    (seconds,) = job
    base = house.base()
    while not experiments.kill_after(house.scene, base, seconds):
        seconds *= 0.9  # it ended before: the machine is less busy than when the span was measured
    return _finish(house.scene, base, known)


def _finish(scene: Scene, base: Path, known: Reference) -> Wrong:
    """Hand a killed conversion to the process that resumes: this one must stay free of JAX's threads to fork."""
    pipe = _FINISHER[0]
    pipe.send((scene, base, known.outcome))
    return pipe.recv()


_FINISHER: list[Any] = []


def _finisher(pipe: Any) -> None:
    while True:
        try:
            scene, base, expected = pipe.recv()
        except EOFError:
            return
        pipe.send(_guarded(partial(experiments.resume_faults, scene, base, expected)))


def _refuse(house: House, known: Reference, job: Job) -> Wrong:
    return experiments.refuse(house.scene, house.base(), *job, known.outcome)


def _power(house: House, known: Reference, job: Job) -> Wrong:
    return experiments.lose_power(house.scene, house.base(), known.images[job[0]][1], known.outcome)


def _guarded(act: Callable[[], Wrong]) -> Wrong:
    try:
        return act()
    except Exception as e:
        return [f"{type(e).__name__}: {e}"]


def _worker(house: House, known: Reference, act: Any, forks: bool, jobs: Any, results: Any) -> None:
    if forks:
        mine, other = multiprocessing.Pipe()
        pid = os.fork()
        if pid == 0:
            mine.close()
            _finisher(other)
            os._exit(0)
        other.close()
        _FINISHER[:] = [mine]
    for job in iter(jobs.get, None):
        results.put((job, _guarded(partial(act, house, known, job))))


def each(house: House, known: Reference, act: Any, jobs: Iterable[Job], *, forks: bool, name: str) -> dict[str, Any]:
    """Do an experiment for every job, on all workers; print what went wrong, return the figures."""
    context = multiprocessing.get_context("fork")
    todo, results = context.Queue(), context.Queue()
    listed = list(jobs)
    workers = [context.Process(target=_worker, args=(house, known, act, forks, todo, results)) for _ in range(WORKERS)]
    begun = time.monotonic()
    for worker in workers:
        worker.start()
    for job in [*listed, *[None] * WORKERS]:
        todo.put(job)
    failed = 0
    for i in range(len(listed)):
        job, wrong = results.get()
        failed += bool(wrong)
        for line in wrong:
            print(f"{name} {job}: {line}", flush=True)
        if (i + 1) % 25 == 0:
            print(f"{name}: {i + 1} of {len(listed)}, {time.monotonic() - begun:.0f} s", flush=True)
    for worker in workers:
        worker.join()
    return {"cases": len(listed), "failed": failed, "seconds": round(time.monotonic() - begun)}


def corruption() -> dict[str, Any]:
    """Every single fault that the tests of `verify` know, through pytest."""
    begun = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/evaluate/test_verify.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    listing = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False)
    cases = sum("[" in line for line in listing.stdout.splitlines() if "::test_" in line)
    if done.returncode:
        print(done.stdout[-3000:])
    return {"cases": cases, "failed": int(done.returncode != 0), "seconds": round(time.monotonic() - begun)}


def fuzz() -> dict[str, Any]:
    """The fuzz corpus and the generated cases, each target in a process of its own."""
    from tests.reliability.fuzzing import fuzz_all

    return fuzz_all(workers=WORKERS)


def main(stages: list[str]) -> int:
    """Run the stages, write the page, return the exit code."""
    logging.disable(logging.WARNING)
    known_stages = ["kills", "moments", "faults", "power", "corruption", "fuzz"]
    stages = stages or known_stages
    if unknown := [s for s in stages if s not in known_stages]:
        print(f"unknown stage {unknown[0]}; known are {', '.join(known_stages)}")
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="exl2jax-torture-") as home:
        jax.config.update("jax_compilation_cache_dir", f"{home}/cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        house, known = House(Path(home)), None
        for stage in stages:
            if stage not in ("corruption", "fuzz") and known is None:
                context = multiprocessing.get_context("fork")
                queue = context.Queue()
                first = context.Process(target=_undisturbed, args=(house, queue))
                first.start()
                known = queue.get()
                first.join()
            figures = _stage(stage, house, known)
            failed += figures["failed"]
            print(f"{stage}: {json.dumps(figures)}", flush=True)
            record(stage, figures)
    return int(failed > 0)


def _stage(stage: str, house: House, known: Any) -> dict[str, Any]:
    match stage:
        case "kills":
            return each(house, known, _kill, known.kill_points(), forks=True, name=stage)
        case "moments":
            chance = random.Random(SEED)
            span = _cold_span(house)
            moments = [(chance.uniform(0, span),) for _ in range(MOMENTS)]
            return each(house, known, _moment, moments, forks=True, name=stage)
        case "faults":
            return each(house, known, _refuse, known.fault_points(), forks=False, name=stage)
        case "power":
            return each(house, known, _power, [(i,) for i in range(len(known.images))], forks=False, name=stage)
        case "corruption":
            return corruption()
        case _:
            return fuzz()


def _cold_span(house: House) -> float:
    """Seconds of one conversion in a forked process that finds its programs compiled."""
    base = experiments.fresh(house.base())
    begun = time.monotonic()
    assert not experiments.kill_after(house.scene, base, 600), "one conversion takes more than ten minutes"
    return time.monotonic() - begun


LABELS = {
    "kills": "SIGKILL in the middle of every write, ahead of every rename and every fsync",
    "moments": "SIGKILL at seeded random moments",
    "faults": "ENOSPC, EACCES, EIO and EROFS, at every file written",
    "power": "states of the disk after a loss of power",
    "corruption": "single faults in an EXL2 directory found by `verify`",
    "fuzz": "hostile files read",
}
START, END = "<!-- figures: written by make torture -->", "<!-- end of figures -->"


def record(stage: str, figures: dict[str, Any]) -> None:
    """Put the figures of a stage into its row of the page's table."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(START)
    table, tail = rest.split(END)
    rows = {line.split("|")[1].strip(): line for line in table.strip().splitlines() if line.startswith("| ")}
    rows.pop("experiment", None)
    more = f", {figures['note']}" if "note" in figures else ""
    rows[LABELS[stage]] = f"| {LABELS[stage]} | {figures['cases']}{more} | {figures['failed']} | {figures['seconds']} |"
    lines = ["| experiment | cases | failed | seconds |", "|---|---|---|---|"]
    lines += [rows[label] for label in LABELS.values() if label in rows]
    PAGE.write_text(head + START + "\n" + "\n".join(lines) + "\n" + END + tail, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
