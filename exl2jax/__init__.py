"""exl2jax: convert Hugging Face language models to mixed-precision EXL2 directories."""

from exl2jax import contrib
from exl2jax.calibration import CalibrationConfig
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.convert import convert
from exl2jax.conversion.result import ConversionResult
from exl2jax.errors import Exl2JaxError
from exl2jax.evaluation import Evaluation, evaluate
from exl2jax.models import Exl2Model, load_exl2, open_model
from exl2jax.ops import PackedLinear
from exl2jax.qparams import QParams
from exl2jax.version import VERSION

__version__ = VERSION

__all__ = [
    "CalibrationConfig",
    "ConversionConfig",
    "ConversionResult",
    "Evaluation",
    "Exl2JaxError",
    "Exl2Model",
    "PackedLinear",
    "QParams",
    "__version__",
    "contrib",
    "convert",
    "evaluate",
    "load_exl2",
    "open_model",
]
