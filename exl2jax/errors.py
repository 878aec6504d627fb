"""The exceptions a caller can catch. Each message names the file, the tensor or the setting, and what to do."""


class Exl2JaxError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, with whatever a terminal cannot show (names come from strangers' files) spelt out."""
        shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in super().__str__())
        return "".join(shown)


class SettingsError(Exl2JaxError, ValueError):
    """A setting is out of range or contradicts another one (wrong usage)."""

    exit_code = 2


class ModelError(Exl2JaxError):
    """The source model cannot be read: config, tokenizer or weights."""


class UnsupportedModelError(ModelError):
    """The model is readable but of a kind that is not supported, refused by name."""


class CalibrationError(Exl2JaxError):
    """The calibration source is missing, unreadable, too short or does not fit the model."""


class MeasurementError(Exl2JaxError):
    """A measurement file does not fit the model or cannot reach the target bits per weight."""


class JobError(Exl2JaxError):
    """The work directory belongs to another job, is locked, or is damaged."""


class HessianError(Exl2JaxError):
    """A Hessian stayed not positive definite after every damping attempt, or holds NaN or infinity."""


class NumericalError(Exl2JaxError):
    """NaN or infinity appeared in weights, activations or results."""


class FormatError(Exl2JaxError):
    """An EXL2 tensor or directory violates the format."""


class StorageError(Exl2JaxError):
    """A file could not be read or written."""


class HubError(Exl2JaxError):
    """A repository of the Hub cannot be read or written."""


class Interrupted(Exl2JaxError):  # noqa: N818  (a request carried out, not a fault)
    """The user or the system asked to stop; the work directory holds everything needed to resume."""

    exit_code = 130
