"""Published figures of devices: what their makers say they can do at most."""

import os
from dataclasses import dataclass

from exl2jax.errors import SettingsError


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A device: bytes of memory, and per second float32 operations, TF32 products, bytes of memory and of the bus.

    `fast` is the rate of matrix products at the device's default precision (dense TF32 on NVIDIA's), `exact` that of
    float32 ones, `elementwise` that of single operations: half of `exact`, which counts a product and its sum.
    `kernels` says whether the package's own GPU kernels run there (compute capability 9.0); elsewhere loops of
    few launches do (`ops/fused.py`).
    """

    title: str
    memory: float
    fast: float
    exact: float
    elementwise: float
    bandwidth: float
    bus: float
    kernels: bool = False
    launches: bool = True


def _gpu(
    title: str, *, gigabytes: float, fast: float, exact: float, bandwidth: float, bus: float, hopper: bool
) -> Device:
    """A GPU by its data sheet: memory in GB, rates in TFLOP/s, bandwidth in TB/s, bus in GB/s one way."""
    return Device(
        title=title,
        memory=gigabytes * 1e9,
        fast=fast * 1e12,
        exact=exact * 1e12,
        elementwise=exact * 1e12 / 2,
        bandwidth=bandwidth * 1e12,
        bus=bus * 1e9,
        kernels=hopper,
    )


PCIE_4, PCIE_5 = 32.0, 64.0
"""GB/s of sixteen lanes one way."""

DEVICES = {
    "h100": _gpu("H100 SXM 80 GB", gigabytes=80, fast=495, exact=67, bandwidth=3.35, bus=PCIE_5, hopper=True),
    "h200": _gpu("H200 SXM 141 GB", gigabytes=141, fast=495, exact=67, bandwidth=4.8, bus=PCIE_5, hopper=True),
    "b200": _gpu("B200 SXM 180 GB", gigabytes=180, fast=1100, exact=75, bandwidth=7.7, bus=PCIE_5, hopper=True),
    "a100": _gpu("A100 SXM 80 GB", gigabytes=80, fast=156, exact=19.5, bandwidth=2.04, bus=PCIE_4, hopper=False),
    "l40s": _gpu("L40S 48 GB", gigabytes=48, fast=183, exact=91.6, bandwidth=0.864, bus=PCIE_4, hopper=False),
    "rtx5090": _gpu("RTX 5090 32 GB", gigabytes=32, fast=105, exact=105, bandwidth=1.79, bus=PCIE_5, hopper=True),
    "rtx4090": _gpu("RTX 4090 24 GB", gigabytes=24, fast=82.6, exact=82.6, bandwidth=1.01, bus=PCIE_4, hopper=False),
    "rtx3090": _gpu("RTX 3090 24 GB", gigabytes=24, fast=35.6, exact=35.6, bandwidth=0.936, bus=PCIE_4, hopper=False),
}
"""Devices by name; `cpu` is this machine."""

CPU = "cpu"
CORE = {"products": 107e9, "elementwise": 49e9}
"""Rates of one core, as `scripts/bench/table.py` measured one with AVX-512 (docs/performance.md)."""

CPU_BANDWIDTH = 3.8e9


def find_device(name: str) -> Device:
    """A device by its name; `SettingsError` names the choices for any other."""
    if name == CPU:
        return _this_machine()
    if name not in DEVICES:
        raise SettingsError(f"`device` is {name!r}; it must be one of {', '.join((*DEVICES, CPU))}")
    return DEVICES[name]


def _this_machine() -> Device:
    cores = os.cpu_count() or 1
    return Device(
        title=f"this machine, {cores} cores",
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        fast=cores * CORE["products"],
        exact=cores * CORE["products"],
        elementwise=cores * CORE["elementwise"],
        bandwidth=CPU_BANDWIDTH,
        bus=float("inf"),
        launches=False,
    )
