"""The experiments: a conversion is killed, refused or loses power at a chosen moment, then resumed and compared."""

import errno
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from exl2jax.errors import Exl2JaxError
from tests.reliability.disk import Killed, Operation, Watch, freeze_at, kill_at, nothing, refuse_from
from tests.reliability.power import Image, PowerModel, restore
from tests.reliability.scene import Scene, differences, fresh, outcome

POINTS = ("write", "rename", "fsync")
"""Kinds of operation at which a run is killed."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: what it leaves, its operations, and every state of the disk a power loss could leave."""

    outcome: dict[str, str]
    operations: tuple[Operation, ...]
    images: tuple[tuple[str, Image], ...]

    def kill_points(self) -> list[tuple[int, bool]]:
        """Where a run is killed: in the middle of every write, ahead of every rename and fsync."""
        return [(o.index, o.kind == "write") for o in self.operations if o.kind in POINTS]

    def fault_points(self) -> list[tuple[int, int]]:
        """Operation and error number of every refusal: each error once for every file that is written."""
        first = {errno.ENOSPC: "write", errno.EACCES: "create", errno.EIO: "fsync", errno.EROFS: "rename"}
        points = []
        for error, kind in first.items():
            before = ""
            for operation in self.operations:
                if operation.kind == kind and "." in operation.path:
                    if operation.path != before:
                        points.append((operation.index, error))
                    before = operation.path
        return points


def reference(scene: Scene, base: Path) -> Reference:
    """Run undisturbed, taking notes."""
    operations: list[Operation] = []
    images: dict[str, tuple[str, Image]] = {}
    model = PowerModel(fresh(base))

    def before(operation: Operation) -> None:
        operations.append(replace(operation, tear=nothing))
        for variant, image in model.images():
            images.setdefault(_key(image), (f"{variant} ahead of {_shown(operation)}", image))

    with Watch(base, before, model.after):
        scene.run(base)
    for variant, image in model.images():
        images.setdefault(_key(image), (f"{variant} at the end", image))
    return Reference(outcome(base), tuple(operations), tuple(images.values()))


def freeze(scene: Scene, base: Path, index: int, torn: bool) -> None:
    """Leave in `base` what a run killed at an operation leaves, without a process to kill."""
    try:
        with Watch(fresh(base), freeze_at(index, torn)):
            scene.run(base)
    except Killed:
        return
    raise AssertionError(f"the run ended before operation {index}")


def kill_in_child(scene: Scene, base: Path, index: int, torn: bool) -> None:
    """The same by SIGKILL of a forked process; the caller must not have started JAX's threads yet."""

    def child() -> None:
        with Watch(base, kill_at(index, torn)):
            scene.run(base)

    fresh(base)
    status = os.waitpid(_fork(child), 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"operation {index}: status {status}"


def kill_after(scene: Scene, base: Path, seconds: float) -> bool:
    """SIGKILL to a forked process some seconds after its conversion began; False when it had ended before."""
    fresh(base)
    pid = _fork(lambda: scene.run(base))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def resume_faults(scene: Scene, base: Path, expected: dict[str, str]) -> list[str]:
    """Resume what lies in `base`; the files that then differ from an undisturbed run's."""
    scene.run(base)
    return differences(base, expected)


def refuse(scene: Scene, base: Path, index: int, error: int, expected: dict[str, str]) -> list[str]:
    """Everything wrong with how a run takes a refusal that lasts, and with the resume once its cause is gone."""
    wrong = []
    try:
        with Watch(fresh(base), refuse_from(index, error)):
            scene.run(base)
        wrong.append("nothing was reported")
    except Exl2JaxError as e:
        wrong += _unclear(str(e), e.exit_code, error)
    return wrong + resume_faults(scene, base, expected)


def lose_power(scene: Scene, base: Path, image: Image, expected: dict[str, str]) -> list[str]:
    """Everything wrong with a resume from what a power loss left; a finished job must have lost nothing."""
    restore(image, fresh(base))
    job = image.get("work/job_new.json")
    if job and json.loads(job)["stage"] == "finished":
        lost = [name for name in expected if not (base / name).is_file()]
        if lost:
            return [f"the job is finished, but {name} is lost" for name in lost]
    return resume_faults(scene, base, expected)


def _unclear(message: str, code: int, error: int) -> list[str]:
    wrong = [] if code == 1 else [f"exit code {code}"]
    if os.strerror(error) not in message:
        wrong.append(f"the message does not say what happened: {message}")
    if "/" not in message or ("run again" not in message and "choose another" not in message):
        wrong.append(f"the message does not say where and what to do: {message}")
    return wrong


def _key(image: Image) -> str:
    return hashlib.sha256(repr(sorted(image.items())).encode()).hexdigest()


def _shown(operation: Operation) -> str:
    return f"{operation.kind} {operation.path}"


def _fork(work: Callable[[], None]) -> int:
    """A child process that does `work` and ends at once, quietly, with 0 or 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def spread[T](items: list[T], count: int) -> Iterator[T]:
    """At most `count` of the items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        yield from items
    else:
        yield from (items[round(i * (len(items) - 1) / (count - 1))] for i in range(count))
