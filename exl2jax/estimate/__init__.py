"""The cost of a conversion, counted from shapes: operations, launches, bytes, and their time on a device."""

from exl2jax.estimate.devices import DEVICES, Device, find_device
from exl2jax.estimate.passes import Passes, conversion_work
from exl2jax.estimate.plan import DeviceEstimate, device_estimate
from exl2jax.estimate.work import Work

__all__ = [
    "DEVICES",
    "Device",
    "DeviceEstimate",
    "Passes",
    "Work",
    "conversion_work",
    "device_estimate",
    "find_device",
]
