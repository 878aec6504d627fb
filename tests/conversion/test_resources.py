"""A longer model costs more time and nothing else: no more compilations, no more device memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import monitoring
from safetensors.numpy import save_file

from exl2jax import ConversionConfig, convert
from exl2jax.stream.progress import RunControl
from exl2jax.testing.tiny_model import write_tiny_llama

LAYERS = 4
PACKING = "quantize"
"""The stage whose small functions of packing are compiled for every new shape of group that a linear happens to get."""


@dataclass
class Watch:
    """A progress that notes what is compiled and what is alive on the device after every step."""

    lowered: list[str] = field(default_factory=list)
    stages: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def start(self, stage: str, total: int, done: int) -> None:
        self.steps = self.stages.setdefault(stage, [])

    def step(self, message: str) -> None:
        alive = sum(array.nbytes for array in jax.live_arrays())
        self.steps.append((len(self.lowered), alive))

    def finish(self) -> None:
        pass

    def listen(self, event: str, duration: float, **details: object) -> None:
        if event.endswith("jaxpr_to_mlir_module_duration"):
            self.lowered.append(str(details.get("fun_name")))


@pytest.fixture(scope="module", params=["best", pytest.param("stock", marks=pytest.mark.slow)])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watch, Path]]:
    """A conversion into the work directory alone, watched. No other test has its vocabulary: all is compiled anew."""
    base = tmp_path_factory.mktemp("resources")
    model = write_tiny_llama(base / "model", num_layers=LAYERS, seed=6, vocab_size=352)
    tokens = base / "rows.safetensors"
    save_file({"input_ids": np.random.default_rng(0).integers(0, 300, (4, 40))}, tokens)
    watch = Watch()
    monitoring.register_event_duration_secs_listener(watch.listen)
    try:
        config = ConversionConfig(
            in_dir=model, out_dir=base / "work", cal_dataset=str(tokens), bits=4.5, preset=request.param
        )
        convert(config, RunControl(progress=watch))
    finally:
        monitoring.unregister_event_duration_listener(watch.listen)
    yield watch, base / "work"


def test_later_layers_compile_nothing_new(watched: tuple[Watch, Path]) -> None:
    """Once a layer of each kind is through, every function that hidden states go through serves all that follow."""
    watch, _ = watched
    for stage, steps in watch.stages.items():
        first, last = steps[1][0], steps[2 * LAYERS - 1][0]
        new = watch.lowered[first:last]
        assert [name for name in new if stage != PACKING or "_chunk" in name] == [], stage
    assert watch.lowered


def test_later_layers_hold_no_more_memory(watched: tuple[Watch, Path]) -> None:
    """Linears of a module may still be written while the next is quantized: two layers show all there is to hold.

    While the last module is quantized, the head goes up: only there it is left out.
    """
    watch, _ = watched
    for stage, steps in watch.stages.items():
        last = 2 * LAYERS - (stage == "quantize")
        alive = [amount for _, amount in steps[1:last]]
        assert max(alive[4:]) <= max(alive[:4]), stage


def test_the_work_directory_has_the_names_that_stock_users_know(watched: tuple[Watch, Path]) -> None:
    """Without `-cf` the shards lie there too, and no loader's glob finds a source shard beside them."""
    _, work = watched
    names = {path.name for path in work.iterdir()}
    assert {"job_new.json", "cal_data.safetensors", "measurement.json", "out_tensor", "output.safetensors"} <= names
    linears = {path.name for path in (work / "out_tensor").iterdir()}
    assert len(linears) == 7 * LAYERS + 1
    assert {"model.layers.2.self_attn.q_proj.safetensors", "lm_head.safetensors"} <= linears
