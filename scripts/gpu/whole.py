"""One whole conversion by the preset `best`: seconds by stage, programs, and the digests of what it writes."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from exl2jax import ConversionConfig, convert
from exl2jax.stream.progress import RunControl
from scripts.bench.traffic import PROGRAMS, SECONDS, Meter, compiling, set_up


def digests(work: Path, out: Path) -> dict[str, str]:
    """SHA-256 of the measurement and of every shard, by file name."""
    files = [work / "measurement.json", *sorted(out.glob("*.safetensors"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def device() -> dict[str, Any]:
    """The first device, and the most bytes that were in use on it where it counts them."""
    first = jax.local_devices()[0]
    return {"device": first.device_kind, "peak_device_bytes": (first.memory_stats() or {}).get("peak_bytes_in_use")}


def run(config: ConversionConfig, result: Path) -> dict[str, Any]:
    """Convert, and write what is known so far to `result` after every module."""
    meter = Meter(result)
    begun = time.perf_counter()
    with compiling(meter):
        done = convert(config, RunControl(progress=meter))
    meter.finish()
    total = {what: sum(found.get(what, 0) for _, _, found in meter.modules) for what in (PROGRAMS, *SECONDS.values())}
    assert config.compile_full is not None
    return {
        "seconds": round(time.perf_counter() - begun, 2),
        "stages": done.seconds,
        "perplexity": done.perplexity,
        "perplexity_full": done.perplexity_full,
        "bpw": done.bpw,
        "total": total,
        "digests": digests(config.out_dir, config.compile_full),
        "modules": meter.modules,
        **device(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="JSON file to write")
    parser.add_argument("--model", type=Path, required=True, help="model to convert")
    parser.add_argument("--work", type=Path, required=True, help="folder for the work directory and the result")
    parser.add_argument("--calibration", type=Path, required=True, help="ready token rows")
    parser.add_argument("--rows", type=int, default=32, help="calibration rows")
    parser.add_argument("--measurement-rows", type=int, default=16, help="measurement rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    given = parser.parse_args(argv)
    set_up()
    config = ConversionConfig(
        in_dir=given.model,
        out_dir=given.work / "work",
        compile_full=given.work / "exl2",
        cal_dataset=str(given.calibration),
        bits=4.0,
        dataset_rows=given.rows,
        measurement_rows=given.measurement_rows,
        length=given.length,
        measurement_length=given.length,
        no_resume=True,
    )
    given.result.write_text(json.dumps(run(config, given.result), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
