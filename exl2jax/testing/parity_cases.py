"""The models whose logits are compared with those of `transformers`, and the form of the committed references.

A reference is `tests/models/reference/NAME.npz`. For each sequence length L it holds `input_ids_L` int32 [rows, L],
`positions_L` int32 [P], `logits_L` float32 [rows, P, columns] at those positions and at every `column_stride`-th token,
and `logsumexp_L` float64 [rows, P] over all tokens. `weights_sha256` names the weights they were computed from and
`versions` the software, as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.testing.tiny_architectures import TINY
from exl2jax.testing.tiny_layout import TinyArchitecture, write_tiny
from exl2jax.testing.tiny_model import write_tiny_llama

REFERENCE_DIR = Path(__file__).parents[2] / "tests" / "models" / "reference"
ROWS = 2


@dataclass(frozen=True)
class ParityCase:
    """A model and the sequence lengths to run it at: `tiny`, or what `write_tiny_llama` makes of `options`.

    Of the vocabulary each `stride`-th column is kept.
    """

    name: str
    lengths: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    tiny: TinyArchitecture | None = None
    stride: int = 1

    def write(self, folder: Path) -> Path:
        """Write the model's directory."""
        return write_tiny_llama(folder, **self.options) if self.tiny is None else write_tiny(folder, self.tiny)

    @property
    def reference(self) -> Path:
        """Where the reference logits are kept."""
        return REFERENCE_DIR / f"{self.name}.npz"


LLAMA_CASES = (
    ParityCase("plain", (7, 48, 100), {"seed": 1}),
    ParityCase(
        "untied_biases",
        (7, 48, 100),
        {
            "seed": 2,
            "tie": False,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 24,
            "num_kv_heads": 1,
            "dtype": "bfloat16",
            "shards": 3,
        },
    ),
    ParityCase(
        "rope_linear",
        (7, 48, 100),
        {"seed": 3, "dtype": "float32", "rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    ParityCase(
        "rope_dynamic",
        (7, 32, 33, 100),
        {"seed": 4, "max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    ),
    ParityCase(
        "rope_llama3",
        (7, 48, 100),
        {
            "seed": 5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    ParityCase(
        "rope_yarn",
        (7, 48, 180),
        {
            "seed": 6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
)

TINY_CASES = (
    *LLAMA_CASES,
    *(ParityCase(name, tiny.lengths, tiny=tiny, stride=10) for name, tiny in TINY.items()),
)

DEMO_CASE = ParityCase("demo_model", (64,), stride=8)


def make_input_ids(length: int, vocab_size: int) -> np.ndarray:
    """Random token rows, int32 [ROWS, length]."""
    return np.random.default_rng(length).integers(0, vocab_size, size=(ROWS, length), dtype=np.int32)


def kept_positions(length: int) -> np.ndarray:
    """First, middle and the last two positions of a sequence, int32."""
    return np.unique([0, length // 2, length - 2, length - 1]).astype(np.int32)
