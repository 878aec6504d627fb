"""`exl2jax doctor`: what this installation has, and what is missing for which command."""

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import psutil
import typer
from rich.console import Console
from rich.table import Table

from exl2jax.calibration.stock_texts import SHA256, cache_folder
from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver, invocation, set_up
from exl2jax.hub.publish import hub_token
from exl2jax.pallas import choose_implementation
from exl2jax.version import VERSION

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers", "transformers", "huggingface_hub", "pyarrow")

OPTIONAL = {
    "datasets": ("convert -c wikitext2 or c4 without --cal-dir", "pip install 'exl2jax[datasets]'"),
    "lm_eval": ("eval --task", "pip install 'exl2jax[harness]'"),
    "ray": ("sweep --ray", "pip install 'exl2jax[ray]'"),
    "pip": ("convert -c exllamav2 without --cal-dir, once", "python -m ensurepip"),
}
"""Packages that only some commands need: which ones, and how to get them."""

CUDA = "pip install 'exl2jax[cuda13]'"


def doctor_command(context: typer.Context, as_json: Json = False) -> int:
    """Devices, versions, kernels, caches and disk of this installation, and what is missing for which command."""
    set_up(Console(stderr=True), invocation(context).spelling)
    found = examine()
    deliver(as_json, found, lambda: _table(found))
    return 0


def examine() -> dict[str, Any]:
    """Everything that the command shows, as JSON-able values; sizes in bytes."""
    return {
        "versions": {"exl2jax": VERSION, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "devices": [_device(device) for device in jax.local_devices()],
        "kernels": choose_implementation(),
        "memory": {"present": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "caches": {name: {"path": str(path), "bytes": _size(path)} for name, path in _caches().items()},
        "disk_free": {name: shutil.disk_usage(path).free for name, path in _places().items()},
        "token": hub_token() is not None,
        "missing": _missing(),
    }


def _device(device: Any) -> dict[str, Any]:
    """A device with the memory that JAX may use of it, where it tells."""
    stats = device.memory_stats() or {}
    return {"name": str(device), "kind": device.device_kind, "memory": stats.get("bytes_limit")}


def _caches() -> dict[str, Path]:
    from huggingface_hub import constants

    folders = {"models of the Hub": Path(constants.HF_HUB_CACHE), "calibration texts of exllamav2": cache_folder()}
    compiled = jax.config.jax_compilation_cache_dir
    return {**({"compiled programs": Path(compiled)} if compiled else {}), **folders}


def _places() -> dict[str, Path]:
    """Directories that work directories and downloads usually lie in; the nearest that exists of each."""
    caches = {name: next(p for p in (path, *path.parents) if p.is_dir()) for name, path in _caches().items()}
    return {"this directory": Path.cwd(), **caches}


def _missing() -> list[dict[str, str]]:
    """Parts that are not there, the commands that need them and how to get them."""
    absent = {name: OPTIONAL[name] for name in OPTIONAL if not _installed(name)}
    missing = [{"what": name, "for": command, "get": advice} for name, (command, advice) in absent.items()]
    if hub_token() is None:
        need = "publish, and gated sources by name"
        missing.append({"what": "a token of the Hub", "for": need, "get": "hf auth login, or set HF_TOKEN"})
    if not all((cache_folder() / name).is_file() for name in SHA256):
        need = "convert -c exllamav2 without a network"
        get = "exl2jax calibrate -c exllamav2 once with one"
        missing.append({"what": "texts of exllamav2", "for": need, "get": get})
    if sys.platform == "linux" and Path("/dev/nvidiactl").exists() and jax.default_backend() == "cpu":
        missing.append({"what": "JAX with CUDA", "for": "the GPU of this machine", "get": CUDA})
    return missing


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return importlib.util.find_spec(name) is not None
    return True


def _size(path: Path) -> int:
    """Bytes of the files below a directory, links not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except OSError:  # gone since it was listed
                continue
    return total


def _table(found: dict[str, Any]) -> Table:
    table = Table(title="exl2jax doctor", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items()))
    for device in found["devices"]:
        memory = "" if device["memory"] is None else f", {_gb(device['memory'])}"
        table.add_row("device", f"{device['name']}: {device['kind']}{memory}")
    table.add_row("kernels", found["kernels"])
    table.add_row("memory", f"{_gb(found['memory']['present'])}, {_gb(found['memory']['available'])} available")
    for name, cache in found["caches"].items():
        table.add_row(f"cache, {name}", f"{cache['path']}: {_gb(cache['bytes'])}")
    for name, free in found["disk_free"].items():
        table.add_row(f"disk free, {name}", _gb(free))
    table.add_row("token of the Hub", "found" if found["token"] else "none")
    for each in found["missing"]:
        table.add_row(f"missing: {each['what']}", f"for {each['for']}; get it with {each['get']}")
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
