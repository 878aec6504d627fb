"""The checkpointed scan: the contract of `lax.scan`, checkpoints at block boundaries, resumption, and stopping."""

import copy
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from exl2jax.errors import Interrupted
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.stream.scan import Form, scan

type Carry = dict[str, np.ndarray]

BLOCKS = [3.0, -1.0, 0.5, 2.0, 7.0]


def step(carry: Carry, block: float) -> tuple[Carry, float]:
    """Pure, and every step shows in all that follow."""
    state = carry["row"] * block + 1
    return {"row": state}, float(state.sum())


def start() -> Carry:
    return {"row": np.arange(4.0)}


class Memory:
    """A checkpoint that keeps copies, as a file would."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, Carry, list[float]]] = []

    def load(self) -> tuple[int, Carry, list[float]] | None:
        return copy.deepcopy(self.saved[-1]) if self.saved else None

    def save(self, position: int, carry: Carry, outputs: list[float]) -> None:
        self.saved.append(copy.deepcopy((position, carry, outputs)))


class Recorder:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def start(self, stage: str, total: int, done: int) -> None:
        self.told.append((stage, total, done))

    def step(self, message: str) -> None:
        self.told.append(message)

    def finish(self) -> None:
        self.told.append("finish")


def run(
    memory: Memory,
    *,
    interval: float = 0,
    control: RunControl | None = None,
    load: Callable[[float], float] = float,
    begin: Callable[[], Carry] = start,
) -> tuple[Carry, list[float]]:
    return scan(
        step,
        begin,
        BLOCKS,
        form=Form[Carry](dict, dict, dict),
        load=load,
        describe=lambda spec, output: f"{spec}: {output:.1f}",
        checkpoint=memory,
        interval=interval,
        stage="measure",
        control=control or RunControl(progress=Recorder()),
    )


def test_carry_and_outputs_are_those_of_lax_scan() -> None:
    def jitted(state: jnp.ndarray, block: jnp.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
        state = state * block + 1
        return state, state.sum()

    carry, outputs = run(Memory())
    expected, sums = lax.scan(jitted, jnp.arange(4.0), jnp.asarray(BLOCKS))
    np.testing.assert_allclose(carry["row"], expected)
    np.testing.assert_allclose(outputs, sums)


def test_interval_zero_checkpoints_after_every_block_and_a_long_one_after_the_last() -> None:
    often, once = Memory(), Memory()
    assert run(often)[1] == run(once, interval=3600)[1]
    assert [position for position, _, _ in often.saved] == [1, 2, 3, 4, 5]
    assert [len(outputs) for _, _, outputs in often.saved] == [1, 2, 3, 4, 5]
    assert [(position, len(outputs)) for position, _, outputs in once.saved] == [(5, 5)]


@pytest.mark.parametrize("done", range(len(BLOCKS) + 1))
def test_resuming_from_any_checkpoint_ends_the_same(done: int) -> None:
    """Only what is left is loaded, and the start is not computed again."""
    whole = Memory()
    carry, outputs = run(whole)
    resumed, loaded = Memory(), []
    resumed.saved = whole.saved[:done]

    def load(spec: float) -> float:
        loaded.append(spec)
        return spec

    def begin() -> Carry:
        assert done == 0
        return start()

    again, repeated = run(resumed, load=load, begin=begin)
    assert np.array_equal(again["row"], carry["row"])
    assert repeated == outputs
    assert loaded == BLOCKS[done:]


def test_a_stop_saves_and_raises_at_the_next_boundary() -> None:
    memory, stop = Memory(), StopFlag()
    stop.ask()
    with pytest.raises(Interrupted, match=r"stopped in measure after 1 of 5 modules; run the same command to resume"):
        run(memory, interval=3600, control=RunControl(progress=Recorder(), stop=stop))
    assert [position for position, _, _ in memory.saved] == [1]
    assert run(memory)[1] == run(Memory())[1]


def test_a_stop_after_the_last_block_stops_nothing() -> None:
    memory, stop = Memory(), StopFlag()
    run(memory)
    memory.saved = memory.saved[:4]
    stop.ask()
    assert run(memory, control=RunControl(progress=Recorder(), stop=stop))[1] == run(Memory())[1]


def test_a_block_that_cannot_be_loaded_leaves_the_checkpoints_before_it() -> None:
    memory = Memory()

    def load(spec: float) -> float:
        if spec == BLOCKS[3]:
            raise OSError("gone")
        return spec

    with pytest.raises(OSError, match="gone"):
        run(memory, load=load)
    assert [position for position, _, _ in memory.saved] == [1, 2, 3]
    assert run(memory)[1] == run(Memory())[1]


def test_progress_is_told_of_every_block() -> None:
    recorder, resumed, memory = Recorder(), Recorder(), Memory()
    run(memory, control=RunControl(progress=recorder))
    assert recorder.told == [
        ("measure", 5, 0),
        "3.0: 22.0",
        "-1.0: -18.0",
        "0.5: -5.0",
        "2.0: -6.0",
        "7.0: -38.0",
        "finish",
    ]
    memory.saved = memory.saved[:4]
    run(memory, control=RunControl(progress=resumed))
    assert resumed.told == [("measure", 5, 4), "7.0: -38.0", "finish"]
