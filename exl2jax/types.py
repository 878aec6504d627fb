"""The glossary of dimensions and the array aliases used in signatures.

========  ==============================================================
letter    meaning
========  ==============================================================
`R`       calibration rows (a "batch" of the stock converter is one row)
`T`       tokens of a row
`D`       hidden size
`K`       rows of a weight matrix, its `in_features`
`N`       columns of a weight matrix, its `out_features`
`G`       quantization groups of a matrix, runs of rows
========  ==============================================================

Weights are `[K, N]` everywhere: the sequential walk of GPTQ goes over rows, and columns are independent.
"""

from collections.abc import Mapping

import jax
import numpy as np

type HostArray = np.ndarray
type Array = jax.Array
type AnyArray = jax.Array | np.ndarray
type Tensors = Mapping[str, np.ndarray]
