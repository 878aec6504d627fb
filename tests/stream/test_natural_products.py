"""The products that a machine is made for."""

from pathlib import Path

import jax
import pytest

from exl2jax.ops import Products
from exl2jax.stream import devices
from exl2jax.stream.devices import natural_products


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu amx_bf16 amx_tile", Products.BFLOAT16), ("fpu avx512_bf16", Products.FLOAT32)]
)
def test_the_processor_decides(flags: str, expected: Products, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor : 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "PROCESSOR", file)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert natural_products() is expected


def test_without_a_list_of_flags_products_are_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PROCESSOR", tmp_path / "missing")
    assert natural_products() is Products.FLOAT32
