"""The full-precision input of every module, kept in a file for the passes that work backwards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exl2jax.models import Decoder, ModuleSpec
from exl2jax.storage import reserve, storing
from exl2jax.stream.blocks import Block, forward_block
from exl2jax.stream.forward import require_finite
from exl2jax.stream.scan import STATES, Carry
from exl2jax.stream.streams import read, whole


class InputStack:
    """The input states of every module, `[modules, R, T, D]` float32 in a file that is mapped, not loaded."""

    def __init__(self, path: Path, specs: Sequence[ModuleSpec], shape: tuple[int, int, int]) -> None:
        """Open the file, or make it with all its space reserved: `fresh` says which."""
        self._position = {spec.key: i for i, spec in enumerate(specs)}
        wanted = (len(specs) + 1, *shape)
        self._path = path
        self.fresh = reserve(path, int(np.prod(wanted, dtype=np.int64)) * 4)
        self._states = np.memmap(path, np.float32, "r+", shape=wanted)

    def write(self, place: int, states: np.ndarray) -> None:
        """Write a module's input `[R, T, D]`; the entry after the last module is the final output."""
        # Through the file: pages of a mapping that are written for the first time each cost a fault.
        with storing(self._path), self._path.open("r+b") as file:
            file.seek(place * self._states[0].nbytes)
            np.ascontiguousarray(states, np.float32).tofile(file)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[modules + 1, R, T, D]`: inputs of all modules and the output of the last."""
        return self._states.shape

    def position(self, spec: ModuleSpec) -> int:
        """Place of a module in the order of the model."""
        return self._position[spec.key]

    def read(self, spec: ModuleSpec) -> np.ndarray:
        """The input of a module."""
        return self._states[self._position[spec.key]]

    def final(self) -> np.ndarray:
        """The output of the last module."""
        return self._states[-1]

    def flush(self) -> None:
        """Write everything to disk."""
        with storing(self._path):
            self._states.flush()


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardStep:
    """The step of the forward scan: the module's output, kept as the next one's input; the first is there already."""

    decoder: Decoder
    stack: InputStack

    def __call__(self, carry: Carry, block: Block) -> tuple[Carry, None]:
        """Run a module on the full-precision states."""
        out, tally = forward_block(self.decoder, block, carry[STATES])
        tally, parts = read((tally, out.parts() if out.resident else []))
        require_finite(tally, block.spec)
        self.stack.write(self.stack.position(block.spec) + 1, whole(out.spans, parts) if parts else out.array())
        return {STATES: out}, None
