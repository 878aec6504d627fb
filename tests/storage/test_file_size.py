"""The predicted size of a safetensors file against the file that the library writes."""

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from exl2jax.storage import TensorHead
from exl2jax.storage.headers import file_size

DTYPES = {
    "BOOL": np.bool_,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "I16": np.int16,
    "I32": np.int32,
}
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple)
HEADS = st.dictionaries(
    st.text("abcdef.0123é", min_size=1, max_size=12), st.tuples(st.sampled_from(list(DTYPES)), SHAPES)
)


@given(HEADS)
def test_a_files_size_is_known_from_its_header(heads: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    tensors = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in heads.items()}
    written = save(tensors, {"format": "pt"})
    assert file_size([TensorHead(name, *head) for name, head in heads.items()], {"format": "pt"}) == len(written)
