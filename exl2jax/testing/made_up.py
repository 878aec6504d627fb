"""Measurements that no measuring pass has made, for tests of what comes after it."""

from pathlib import Path

from exl2jax.measure.measurement import Candidate, Measurement, candidate_rows, module_bits
from exl2jax.models import module_specs, open_model, slots_of


def made_up_measurement(source: Path, path: Path) -> Path:
    """A complete stock measurement whose accuracies grow with the bits."""
    specs = module_specs(open_model(source).config)
    modules = {}
    for slot in slots_of(specs):
        rows = [(row, module_bits(slot, row)) for row in candidate_rows(slot)]
        modules[slot.key] = tuple(
            Candidate(qparams=row, total_bits=bits, accuracy=1 - 2.0 ** (-bits / slot.weights)) for row, bits in rows
        )
    Measurement(modules=modules).write(path, specs)
    return path
