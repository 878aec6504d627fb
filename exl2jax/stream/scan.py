"""The checkpointed scan over modules: the contract of `lax.scan`, driven from the host.

Blocks stream from disk one ahead of the computation. `step(carry, block) -> (carry, output)` consumes the carry, whose
streams it may overwrite; a checkpoint persists it, so that a killed run resumes there and ends in the same bytes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from exl2jax.errors import Interrupted
from exl2jax.stream.devices import as_first_process, require_agreement
from exl2jax.stream.memory import give_back
from exl2jax.stream.progress import RunControl
from exl2jax.stream.streams import Stream

type Carry = dict[str, Stream]
"""Streams of a pass by name."""

type HostCarry = Mapping[str, Any]
"""The same in host memory: arrays, or rows one by one, by name."""

STATES = "row"
"""Name of the hidden states in a carry."""

REFERENCE = "ref"
"""Name, in a carry, of the full-precision states."""

GRADIENT = "gradient"
"""Name of the gradients in the carry of the backward scan."""

PERTURBED = "perturbed"
"""Name, in the carry, of the states of the perturbed models, `[modules * k, T, D]`."""


class Checkpoint[O](Protocol):
    """Where a scan leaves its state."""

    def load(self) -> tuple[int, HostCarry, list[O]] | None:
        """Blocks done, carry and outputs of the last checkpoint, if there is one."""

    def save(self, position: int, carry: HostCarry, outputs: list[O]) -> None:
        """Persist the state after `position` blocks; on return it is the one that `load` gives."""


class Form[C](NamedTuple):
    """How a carry is brought to where a pass computes on it, and back to host memory for a checkpoint.

    `last` takes from the carry after the last block what is still read; the last checkpoint holds no more.
    """

    place: Callable[[HostCarry], C]
    keep: Callable[[C], HostCarry]
    last: Callable[[C], C]


def streams_by(place: Callable[[np.ndarray], Stream], last: Sequence[str]) -> Form[Carry]:
    """The form of a carry of streams, each placed by `place`; `last` names those that are read after the pass."""
    return Form(
        lambda carry: {name: place(values) for name, values in carry.items()},
        lambda carry: {name: stream.rows() for name, stream in carry.items()},
        lambda carry: {name: carry[name] for name in last},
    )


def scan[S, B, C, O](
    step: Callable[[C, B], tuple[C, O]],
    start: Callable[[], HostCarry],
    specs: Sequence[S],
    *,
    form: Form[C],
    load: Callable[[S], B],
    describe: Callable[[S, O], str],
    checkpoint: Checkpoint[O],
    interval: float,
    stage: str,
    control: RunControl,
    unit: str = "modules",
) -> tuple[C, list[O]]:
    """Run `step` over the blocks of `specs`, from the last checkpoint or from `start()`.

    A checkpoint is written at block boundaries, at most every `interval` seconds (0: always), after the last block, and
    when `control` asks to stop, which raises `Interrupted` once everything is saved. Of several processes the first
    decides for all. `unit` names what is counted in messages.
    """
    found = checkpoint.load()
    require_agreement(f"{stage} after {found[0] if found else 0} {unit}")
    position, outputs = (found[0], found[2]) if found else (0, [])
    carry = form.place(found[1] if found else start())
    del found
    control.progress.start(stage, len(specs), position)
    saved = time.monotonic()
    for spec, block in zip(specs[position:], _ahead(load, specs[position:]), strict=True):
        carry, output = step(carry, block)
        outputs.append(output)
        position += 1
        control.progress.step(describe(spec, output))
        give_back()
        done = position == len(specs)
        if done:
            carry = form.last(carry)
        stopping = as_first_process(control.stop.asked) and not done
        if done or stopping or as_first_process(time.monotonic() - saved >= interval):
            checkpoint.save(position, form.keep(carry), outputs)
            saved = time.monotonic()
        if stopping:
            raise Interrupted(
                f"stopped in {stage} after {position} of {len(specs)} {unit}; run the same command to resume"
            )
    control.progress.finish()
    return carry, outputs


def _ahead[S, B](load: Callable[[S], B], specs: Sequence[S]) -> Iterator[B]:
    """Load blocks one ahead of their use, so that reading overlaps computing."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(load, specs[0]) if specs else None
        for i in range(len(specs)):
            assert waiting is not None  # submitted below for every spec that follows
            block = waiting.result()
            waiting = pool.submit(load, specs[i + 1]) if i + 1 < len(specs) else None
            yield block
