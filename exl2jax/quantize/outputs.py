"""Gradients at the linears' outputs: their files, and the feedback between columns that follows from them.

The correlations come from few rows. How much of them holds on other rows was found on the demo model, by what linears
of two layers cost on rows that neither Hessian had seen, over the same without feedback: q and k 0.45 to 0.5, o and
down 0.87 to 0.9, up 0.9, gate 1.0, and v 1.1 to 1.3.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exl2jax.models import LinearSpec
from exl2jax.ops.columns import ColumnFeedback, column_feedback
from exl2jax.pallas import kernels_for
from exl2jax.storage import read_checked_tensors, write_checked_tensors

SAMPLES = 4096
"""Most tokens whose gradients are kept."""

PADDED = 512
"""Samples are padded to a multiple of this, so that few programs serve all linears."""

MOST_COLUMNS = 1 << 14
"""Most columns that errors are fed between: a square of more takes gigabytes, and the samples tell little of it."""

SHRINKAGE: Mapping[str, float] = {
    "q_proj": 0.3,
    "k_proj": 0.3,
    "v_proj": 1.0,
    "o_proj": 0.4,
    "gate_proj": 1.0,
    "w1": 1.0,
    "up_proj": 0.4,
    "w3": 0.4,
    "down_proj": 0.4,
    "w2": 0.4,
}
"""By role of a linear, how far correlations are drawn towards zero; at 1 nothing is fed along."""


class OutputGradients(NamedTuple):
    """Gradients at a linear's outputs: `samples [S, N]` float16 in units of `scale [N]` float32, a root mean square.

    An output without gradients has the scale 0. Samples of nothing but zeros are padding.
    """

    samples: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, gradients: np.ndarray) -> "OutputGradients":
        """Those of tokens `[S, N]` float32, without the tokens that have none."""
        kept = gradients[gradients.any(axis=1)]
        sums = np.sum(np.square(kept), axis=0, dtype=np.float64)
        scale = np.sqrt(sums / max(len(kept), 1)).astype(np.float32)
        units = np.divide(kept, scale, out=np.zeros_like(kept), where=scale > 0)
        return cls(units.astype(np.float16), scale)

    @property
    def padded(self) -> "OutputGradients":
        """With samples up to a multiple of `PADDED`."""
        count = max(1, -(-len(self.samples) // PADDED)) * PADDED
        return self._replace(samples=np.pad(self.samples, ((0, count - len(self.samples)), (0, 0))))


type Outputs = Callable[[LinearSpec], OutputGradients]
"""The gradients at a linear's outputs."""


def feeds_columns(linear: LinearSpec) -> bool:
    """Whether anything is fed from column to column in a linear."""
    return SHRINKAGE[linear.role] < 1 and linear.columns <= MOST_COLUMNS


def feedback_of(linear: LinearSpec, outputs: Outputs | None) -> ColumnFeedback | None:
    """The feedback between the columns of a linear, where the gradients at `outputs` are known."""
    if outputs is None or not feeds_columns(linear):
        return None
    return column_feedback(*outputs(linear).padded, SHRINKAGE[linear.role], blocks=kernels_for().blocks)


def write_output_gradients(directory: Path, linear: LinearSpec, gradients: OutputGradients) -> None:
    """Write the gradients at a linear's outputs to its file."""
    write_checked_tensors(_file(directory, linear), gradients._asdict())


def read_output_gradients(directory: Path, linear: LinearSpec) -> OutputGradients:
    """The gradients at a linear's outputs from its file; `StorageError` where that is damaged or gone."""
    return OutputGradients(**read_checked_tensors(_file(directory, linear))[0])


def sample_bytes(linear: LinearSpec, tokens: int) -> int:
    """Bytes of the gradients that are kept of a linear, from a pass over so many tokens."""
    return 2 * min(tokens, SAMPLES) * linear.columns


def _file(directory: Path, linear: LinearSpec) -> Path:
    return directory / f"{linear.key}.safetensors"
