"""The result of verification: faults by name, and the figures counted from the files."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault: `tensor` is the name of the tensor, linear or file, `message` says what is wrong and why."""

    tensor: str
    message: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """Result of `verify`.

    `bits_per_weight` is counted over the decoder's linears from the stored tensors, `head_bits_per_weight` over
    `lm_head`; each is None where the tensors to count are not all there. `linears` is the number of linears with all
    five tensors, `bytes` the size of the weight files.
    """

    faults: tuple[Fault, ...]
    bits_per_weight: float | None
    head_bits_per_weight: float | None
    linears: int
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults
