"""The progress of a run: lines without a terminal, a bar on a terminal, stock's status lines."""

import io
import json
import re

import pytest
from rich.console import Console

from exl2jax.report import StatusProgress, make_progress, progress
from exl2jax.report.progress import BarProgress, LineProgress


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=60)


def test_lines_tell_how_far_and_how_long(clock: Clock) -> None:
    out = console()
    shown = make_progress(out, status=False)
    assert isinstance(shown, LineProgress)
    shown.start("measure", 60, 0)
    clock.now += 90
    shown.step("model.layers.0.self_attn: error 0.0418 to 0.0002 [not markup]")
    clock.now += 30
    shown.step("x")
    shown.finish()
    assert lines(out) == [
        "measure: 60 steps",
        "measure 1/60, 1:28:30 left: model.layers.0.self_attn: error 0.0418 to 0.0002 [not markup]",
        "measure 2/60, 58:00 left: x",
        "measure: done in 2:00",
    ]


def test_a_resumed_stage_counts_its_own_time_only(clock: Clock) -> None:
    out = console()
    shown = make_progress(out, status=False)
    shown.start("quantize", 10, 8)
    clock.now += 7
    shown.step("x")
    assert lines(out) == ["quantize: 10 steps, resuming after 8", "quantize 9/10, 0:07 left: x"]


def test_status_lines_as_stock_prints_them() -> None:
    out = console()
    shown = make_progress(out, status=True)
    assert isinstance(shown, StatusProgress)
    shown.start("measure", 4, 1)
    shown.step("a")
    shown.finish()
    for stage in ("price", "trace", "outputs", "quantize", "3.0 bpw: tune"):
        shown.start(stage, 2, 0)
    found = [re.fullmatch(r"\[STATUS\](.*)\[/STATUS\]", line) for line in lines(out)]
    assert [json.loads(match[1]) for match in found if match] == [
        {"stage": "Measuring", "completion": 0.25},
        {"stage": "Measuring", "completion": 0.5},
        {"stage": "Measuring", "completion": 0.0},
        *[{"stage": "Quantizing", "completion": 0.0}] * 4,
    ]
    assert "measure 2/4" in lines(out)[2]


def test_a_terminal_gets_a_bar() -> None:
    out = console(terminal=True)
    shown = make_progress(out, status=False)
    assert isinstance(shown, BarProgress)
    shown.step("before any stage")
    shown.start("measure", 3, 1)
    shown.step("model.layers.0.mlp: [not markup]")
    shown.finish()
    shown.finish()
    text = "\n".join(lines(out))
    assert "model.layers.0.mlp: [not markup]" in text
    assert "before any stage" not in text
    assert "2/3" in text
