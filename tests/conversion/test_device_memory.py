"""Hidden states on the device or in host memory, stopped in between or not: the same bytes, and few waits a module."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exl2jax import ConversionConfig, convert
from exl2jax.errors import Interrupted, SettingsError
from exl2jax.stream import chunks
from exl2jax.stream.progress import RunControl, StopFlag
from exl2jax.testing.compilations import compilations
from exl2jax.testing.counting import reads
from exl2jax.testing.tiny_model import write_tiny_llama

LAYERS, ROWS, LENGTH = 3, 5, 24
MOST_READS = 3
"""Reads of the device that a module may take in any pass."""


class Meter:
    """Progress that notes how many reads there were after each module of a pass, and can ask for a stop."""

    def __init__(self, seen: list[str], compiled: list[float], stop: StopFlag | None = None) -> None:
        self.seen, self.compiled, self.stop = seen, compiled, stop
        self.waits, self.programs, self.stage = dict[str, list[int]](), dict[str, list[int]](), ""

    def start(self, stage: str, total: int, done: int) -> None:
        self.stage, self.waits[stage], self.programs[stage] = stage, [len(self.seen)], [len(self.compiled)]

    def step(self, message: str) -> None:
        self.waits[self.stage].append(len(self.seen))
        self.programs[self.stage].append(len(self.compiled))
        if self.stop is not None and self.stage == "quantize" and len(self.waits[self.stage]) == 3:
            self.stop.ask()

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConversionConfig:
    home = tmp_path_factory.mktemp("resident")
    model = write_tiny_llama(
        home / "model", num_layers=LAYERS, hidden_size=96, intermediate_size=96, num_heads=6, num_kv_heads=6
    )
    rows = np.random.default_rng(3).integers(3, 300, (ROWS, LENGTH))
    return ConversionConfig(
        in_dir=model, out_dir=home / "work", compile_full=home / "exl2", cal_dataset=rows, measurement_rows=3, bits=4.2
    )


def elsewhere(config: ConversionConfig, home: Path, memory: float | None) -> ConversionConfig:
    return replace(config, out_dir=home / "work", compile_full=home / "exl2", device_memory=memory)


def result(config: ConversionConfig) -> dict[str, bytes]:
    assert config.compile_full is not None
    found = {path.name: path.read_bytes() for path in config.compile_full.glob("*.safetensors")}
    return found | {"measurement": (config.out_dir / "measurement.json").read_bytes()}


def test_states_may_live_anywhere(config: ConversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 2 * LENGTH)  # three chunks, the last one padded
    with reads() as seen, compilations() as compiled:
        meter = Meter(seen, compiled)
        convert(config, RunControl(progress=meter))
    for stage, counts in meter.waits.items():
        modules = np.asarray(counts[1 : 2 * LAYERS + 1]) - counts[0]  # the head's own check comes after
        # Summed up, since the files of a module are read while the next one is quantized.
        assert (modules <= MOST_READS * np.arange(1, 2 * LAYERS + 1)).all(), (stage, modules)
    for stage, counts in meter.programs.items():
        assert counts[4] == counts[2 * LAYERS], f"{stage} compiles after the second block"
    whole = result(config)

    streamed = elsewhere(config, tmp_path / "streamed", 0.0)
    convert(streamed)
    assert result(streamed) == whole

    stopped, stop = elsewhere(config, tmp_path / "stopped", 0.0), StopFlag()
    with pytest.raises(Interrupted):
        convert(stopped, RunControl(progress=Meter([], [], stop), stop=stop))
    convert(replace(stopped, device_memory=None))  # goes on with its states on the device
    assert result(stopped) == whole


def test_a_negative_budget_is_refused(config: ConversionConfig) -> None:
    with pytest.raises(SettingsError, match="`device_memory` is -1"):
        replace(config, device_memory=-1)
