"""The files of packed linears and changed norms in the work directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.models.modules import NormSpec


def tensor_file(out_tensor: Path, key: str) -> Path:
    """Where the quantization pass leaves the tensors of a linear, or of a norm that it changed."""
    return out_tensor / f"{key}.safetensors"


def stored_norm(norm: NormSpec, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A norm's tensors in half precision, from its parameters, whose weight has the offset added."""
    offset = {"weight": np.float32(norm.offset)}
    values = {part: np.asarray(params[part], np.float32) - offset.get(part, np.float32(0)) for part in params}
    return {f"{norm.key}.{part}": value.astype(np.float16) for part, value in values.items()}
