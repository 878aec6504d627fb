"""Verification: an EXL2 directory is read back and checked against every rule of the format (docs/format.md 1)."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.errors import Exl2JaxError
from exl2jax.exl2.verify.config import bits_faults, quantization_faults, stated_bits, stated_head_bits
from exl2jax.exl2.verify.files import Shards, leftover_faults, open_shards
from exl2jax.exl2.verify.linear import is_quantized, linear_faults, stored_bits
from exl2jax.exl2.verify.loader import loader_faults
from exl2jax.exl2.verify.report import Fault, VerifyReport
from exl2jax.models import (
    LinearSpec,
    ModelConfig,
    ModuleSpec,
    embedding_shapes,
    head_norm_spec,
    head_spec,
    module_specs,
    read_config,
)
from exl2jax.models.config import CONFIG_NAME
from exl2jax.models.source import FLOAT_DTYPES
from exl2jax.ops.packing import TENSOR_NAMES
from exl2jax.qparams import padded_columns
from exl2jax.stock_tables import head_qparams

__all__ = ["Fault", "VerifyReport", "verify"]

CHUNK = 2**22
"""Values of a float tensor checked at a time."""

TABLE_TENSORS = (".q_weight", ".q_groups")
"""Tensors whose shapes give the count of bits."""

LAYER = re.compile(r"(?:.*\.)?model\.layers\.(\d+)\.")

_UNQUANTIZED = "is the unquantized weight of a linear that must be quantized; remove it"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Implied:
    """The contents that `config.json` demands of the files."""

    modules: tuple[ModuleSpec, ...]
    head: LinearSpec
    plain: dict[str, tuple[int, ...]]
    copied: tuple[str, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> "_Implied":
        modules = module_specs(config)
        plain = embedding_shapes(config)
        for shapes in (*(spec.plain for spec in modules), head_norm_spec(config).tensors):
            plain |= shapes
        return cls(modules=modules, head=head_spec(config), plain=plain, copied=config.arch.copied)

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Every linear that must be quantized, in order, the head last."""
        return (*(linear for spec in self.modules for linear in spec.linears), self.head)

    def names(self) -> frozenset[str]:
        """Every tensor that belongs in the directory."""
        quantized = {f"{linear.key}.{name}" for linear in self.linears for name in TENSOR_NAMES}
        return frozenset(quantized | {f"{linear.key}.bias" for linear in self.linears if linear.bias} | set(self.plain))


def verify(directory: Path) -> VerifyReport:
    """Check an EXL2 directory and report every fault by the name of the tensor, linear or file.

    Whatever the directory holds becomes a fault, not an exception, and no fault hides the others: without a usable
    `config.json` the linears that the files hold are still checked in themselves. One linear is in memory at a time.
    """
    if not _is_directory(directory):
        faults = (Fault(tensor=str(directory), message="is not a readable directory"),)
        return VerifyReport(faults=faults, bits_per_weight=None, head_bits_per_weight=None, linears=0, bytes=0)
    shards, faults = open_shards(directory)
    config, raw, unreadable = _read_config(directory)
    faults += [*unreadable, *loader_faults(directory, raw)]
    if config is None:
        return _report(shards, [*faults, *_faults_without_config(shards)], None, None)
    faults += quantization_faults(raw)
    if not len(shards):
        return _report(shards, faults, None, None)
    config, absurd = _bounded(config, shards)
    implied = _Implied.of(config)
    counted, head = _count_bits(shards, implied)
    broken = list(_tensor_faults(shards, implied, stated_head_bits(raw)))
    stated = stated_bits(raw)
    # A count over damaged tables cannot be compared with the config.
    if stated is not None and counted is not None and not any(f.tensor.endswith(TABLE_TENSORS) for f in broken):
        faults += bits_faults(stated, counted, implied.modules)
    return _report(shards, [*faults, *absurd, *broken], counted, head)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission to look
        return False


def _report(shards: Shards, faults: Sequence[Fault], counted: float | None, head: float | None) -> VerifyReport:
    complete = sum(stored_bits(shards, key) is not None for key in shards.quantized_keys())
    return VerifyReport(
        faults=tuple(faults),
        bits_per_weight=counted,
        head_bits_per_weight=head,
        linears=complete,
        bytes=shards.bytes,
    )


def _read_config(directory: Path) -> tuple[ModelConfig | None, dict[str, Any], list[Fault]]:
    try:
        config, raw, _ = read_config(directory)
    # Besides our own errors: numbers in a hostile config that overflow on their way into a record.
    except (Exl2JaxError, OSError, ArithmeticError, ValueError) as e:
        return None, {}, [Fault(tensor=CONFIG_NAME, message=str(e))]
    return config, raw, []


def _bounded(config: ModelConfig, shards: Shards) -> tuple[ModelConfig, list[Fault]]:
    """The config with no more layers than the files name, where it claims more layers than there are tensors.

    An absurd number is reported as one fault, and not as one for each of the linears that it implies.
    """
    if config.num_layers <= len(shards):
        return config, []
    message = f"num_hidden_layers is {config.num_layers}, the files hold {len(shards)} tensors in all"
    seen = {match[1] for match in map(LAYER.match, shards) if match}
    return replace(config, num_layers=max(1, len(seen))), [Fault(tensor=CONFIG_NAME, message=message)]


def _count_bits(shards: Shards, implied: _Implied) -> tuple[float | None, float | None]:
    """Bits per weight of the decoder and of the head, None where tensors are missing."""
    decoder = [stored_bits(shards, linear.key) for linear in implied.linears[:-1]]
    complete = [bits for bits in decoder if bits is not None]
    head = stored_bits(shards, implied.head.key)
    weights = sum(spec.weights for spec in implied.modules)
    return (
        sum(complete) / weights if len(complete) == len(decoder) else None,
        None if head is None else head / implied.head.weights,
    )


def _tensor_faults(shards: Shards, implied: _Implied, head_bits: int | None) -> Iterator[Fault]:
    """Faults of every required tensor in the order of the model, then of tensors that must not be there."""
    for name, shape in implied.plain.items():
        yield from _guarded(name, _float_faults, shards, name, shape, FLOAT_DTYPES)
    for spec in implied.modules:
        for linear in spec.linears:
            yield from _guarded(linear.key, _linear_faults, shards, linear, spec.linears)
    widths = None if head_bits is None else head_qparams(head_bits).bits
    yield from _guarded(implied.head.key, _linear_faults, shards, implied.head, (), widths)
    yield from _stray_faults(shards, implied)


def _guarded[**P](name: str, check: Callable[P, Iterable[Fault]], *args: P.args, **kwargs: P.kwargs) -> list[Fault]:
    """Run a check; a tensor that cannot be read although its header could is a fault as well."""
    try:
        return list(check(*args, **kwargs))
    except Exl2JaxError as e:
        return [Fault(tensor=name, message=str(e))]


def _linear_faults(
    shards: Shards, linear: LinearSpec, module: Sequence[LinearSpec], widths: Sequence[int] | None = None
) -> Iterator[Fault]:
    """Faults of a linear and of its bias; `module` are the linears that must be quantized together with it."""
    if is_quantized(shards, linear.key):
        yield from linear_faults(shards, linear, widths)
    else:
        others = [other.name for other in module if is_quantized(shards, other.key)]
        rest = f" while {', '.join(others)} of its module are quantized; it must be all or none" if others else ""
        yield Fault(tensor=linear.key, message=f"is missing: none of its tensors is stored{rest}")
    if linear.bias:
        shape = (padded_columns(linear.columns),)
        yield from _float_faults(shards, f"{linear.key}.bias", shape, ("F16",))


def _float_faults(shards: Shards, name: str, shape: tuple[int, ...], dtypes: Sequence[str]) -> Iterator[Fault]:
    """Faults of an unquantized tensor: presence, dtype, shape, finite values."""
    if name not in shards:
        yield Fault(tensor=name, message="is missing")
        return
    if shards.shape(name) != shape:
        yield Fault(tensor=name, message=f"has shape {list(shards.shape(name))}, must be {list(shape)}")
    if shards.dtype(name) not in dtypes:
        yield Fault(tensor=name, message=f"is {shards.dtype(name)}, must be {' or '.join(dtypes)}")
        return
    values = shards.read(name).reshape(-1)
    broken = sum(
        int(np.sum(~np.isfinite(values[i : i + CHUNK].astype(np.float32)))) for i in range(0, values.size, CHUNK)
    )
    if broken:
        yield Fault(tensor=name, message=f"holds NaN or infinity in {broken} places")


def _stray_faults(shards: Shards, implied: _Implied) -> Iterator[Fault]:
    """Faults of tensors that do not belong there: the loader would read them, or they would waste memory."""
    weights = frozenset(f"{linear.key}.weight" for linear in implied.linears)
    biases = frozenset(f"{linear.key}.bias" for linear in implied.linears)
    expected = implied.names()
    yield from leftover_faults(shards, weights)
    for name in shards:
        if name in expected or (implied.copied and name.startswith(implied.copied)):
            continue
        if name in weights:
            yield Fault(tensor=name, message=_UNQUANTIZED)
        elif name in biases:
            yield Fault(tensor=name, message=f"must not be there: {CONFIG_NAME} implies no bias")
        else:
            yield Fault(tensor=name, message=f"is no part of the model that {CONFIG_NAME} describes")


def _faults_without_config(shards: Shards) -> Iterator[Fault]:
    """Faults of the stored linears where no config says which there must be and how large."""
    for key in shards.quantized_keys():
        shapes = [shards.shape(f"{key}.{n}") if f"{key}.{n}" in shards else () for n in ("q_invperm", "q_weight")]
        rows, columns = shapes[0][:1], shapes[1][1:2]
        if rows and columns:
            spec = LinearSpec(name=key, key=key, rows=rows[0], columns=columns[0])
            yield from _guarded(key, linear_faults, shards, spec)
        else:
            absent = [f"{key}.{name}" for name in TENSOR_NAMES if f"{key}.{name}" not in shards]
            yield from (Fault(tensor=name, message="is missing") for name in absent)
        if f"{key}.weight" in shards:
            yield Fault(tensor=f"{key}.weight", message=_UNQUANTIZED)
