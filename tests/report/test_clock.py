"""The clock of a whole job, against a job whose true times are known."""

import pytest

from exl2jax.report.clock import JobClock, clock


class Watch:
    """A time that the test moves, and a progress that keeps what it is told."""

    def __init__(self) -> None:
        self.time, self.messages, self.stages = 0.0, [], []  # type: ignore[var-annotated]

    def __call__(self) -> float:
        return self.time

    def start(self, stage: str, total: int, done: int) -> None:
        self.stages.append((stage, total, done))

    def step(self, message: str) -> None:
        self.messages.append(message)

    def finish(self) -> None:
        self.stages.append("finish")


def run(told: JobClock, watch: Watch, stage: str, steps: int, seconds: float, done: int = 0) -> list[float | None]:
    told.start(stage, steps, done)
    left = []
    for _ in range(steps - done):
        watch.time += seconds
        told.step("m")
        left.append(told.left())
    told.finish()
    return left


def test_time_left_at_a_steady_speed_is_exact() -> None:
    watch = Watch()
    told = JobClock(watch, lambda: {"measure": 20.0, "quantize": 40.0}, watch)
    assert run(told, watch, "measure", 4, 5.0) == pytest.approx([55.0, 50.0, 45.0, 40.0])
    assert run(told, watch, "quantize", 4, 10.0) == pytest.approx([30.0, 20.0, 10.0, 0.0])
    assert watch.messages[0] == "m [0:55 left of all]" and watch.messages[-1] == "m [0:00 left of all]"
    assert watch.stages == [("measure", 4, 0), "finish", ("quantize", 4, 0), "finish"]


def test_a_finished_stage_corrects_the_rest() -> None:
    watch = Watch()
    told = JobClock(watch, lambda: {"a": 1.0, "b": 1.0, "c": 1.0}, watch)
    run(told, watch, "a", 2, 50.0)
    assert run(told, watch, "b", 1, 300.0)[0] == pytest.approx((100.0 + 300.0) / 2)


def test_what_an_earlier_run_did_is_not_counted_as_speed() -> None:
    watch = Watch()
    told = JobClock(watch, lambda: {"a": 10.0, "b": 10.0}, watch)
    assert run(told, watch, "b", 10, 1.0, done=8) == pytest.approx([1.0, 0.0]), "a was over, 8 of 10 steps too"


def test_a_stage_outside_the_job_says_nothing_of_it() -> None:
    watch = Watch()
    told = JobClock(watch, lambda: {"quantize": 10.0}, watch)
    assert run(told, watch, "sample", 2, 7.0) == [None, None]
    assert watch.messages == ["m", "m"]
    assert run(told, watch, "quantize", 2, 1.0) == pytest.approx([1.0, 0.0])


def test_clocks() -> None:
    assert [clock(s) for s in (0, 59.6, 61, 3661)] == ["0:00", "1:00", "1:01", "1:01:01"]
