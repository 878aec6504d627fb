"""How often XLA compiles: once for a shape, however many blocks there are, and next to nothing in a second run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exl2jax import ConversionConfig, convert
from exl2jax.models import HFModel, build_decoder, module_specs, open_model
from exl2jax.qparams import q
from exl2jax.quantize.step import QuantizeStep
from exl2jax.stream.blocks import Block
from exl2jax.stream.forward import embed
from exl2jax.stream.progress import RunControl
from exl2jax.stream.streams import Rows
from exl2jax.testing.compilations import compilations
from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import find_recipe

ROOT = Path(__file__).parents[2]
BLOCKS = 8
SETTINGS = [q("4/3", ".5/.5", "32"), q("5/4", ".5/.5", "32"), q("6", "1", "32"), q("3", "1", "32")]
"""Settings of the blocks in turn: four blocks meet all that eight do."""

SECOND_RUN = """
import json, sys, time
import jax
spent = {}
def listen(event, seconds, **_):
    spent[event] = spent.get(event, 0) + seconds
jax.monitoring.register_event_duration_secs_listener(listen)
from exl2jax.cli.entry import main
model, out = sys.argv[1:]
cores, wall = time.process_time(), time.perf_counter()
assert main(["convert", "-i", model, "-o", out, "-c", "random", "-r", "4", "-mr", "4", "-l", "24", "-ml", "24"]) == 0
share = (time.process_time() - cores) / (time.perf_counter() - wall)
print("RESULT", json.dumps({"seconds": spent["/jax/core/compile/backend_compile_duration"], "share": share}))
"""


class Meter:
    """Progress that notes how many compilations there were after each module of each stage."""

    def __init__(self, seen: list[float]) -> None:
        self.seen, self.counts, self.stage = seen, dict[str, list[int]](), ""

    def start(self, stage: str, total: int, done: int) -> None:
        self.stage = stage
        self.counts[stage] = [len(self.seen)]

    def step(self, message: str) -> None:
        self.counts[self.stage].append(len(self.seen))

    def finish(self) -> None:
        pass


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    # All linears of one shape, which is no other test's, lest something be compiled already.
    return write_tiny_llama(
        folder, num_layers=BLOCKS, hidden_size=96, intermediate_size=96, num_heads=6, num_kv_heads=6
    )


def test_measuring_compiles_for_the_first_block_only(path: Path, tmp_path: Path) -> None:
    with compilations() as seen:
        meter = Meter(seen)
        config = ConversionConfig(
            in_dir=path,
            out_dir=tmp_path / "work",
            cal_dataset="random",
            output_measurement=tmp_path / "measurement.json",
            measurement_rows=3,
            measurement_length=24,
            variants=("accuracies=true",),
        )
        convert(config, RunControl(progress=meter))
    assert list(meter.counts) == ["forward", "backward", "price", "measure"]
    for stage, counts in meter.counts.items():
        assert len(counts) == 2 * BLOCKS + 1
        first, four, eight = counts[2], counts[BLOCKS], counts[2 * BLOCKS]
        assert first > counts[0], stage
        assert four == eight == first, stage


@pytest.mark.parametrize("preset", ["stock", "best"])
def test_eight_blocks_are_quantized_with_the_compilations_of_four(path: Path, preset: str, tmp_path: Path) -> None:
    model = open_model(path)
    assert isinstance(model, HFModel)
    specs = module_specs(model.config)
    ids = np.random.default_rng(0).integers(3, 320, (3, 24)).astype(np.int32)
    step = QuantizeStep(
        decoder=build_decoder(model.config),
        recipe=find_recipe(preset),
        strategy={s.key: {x.name: SETTINGS[i // 2 % len(SETTINGS)] for x in s.linears} for i, s in enumerate(specs)},
        head_bits=6,
        input_ids=ids,
        rows=Rows.of(np.ones(ids.shape), model.config.hidden_size),
        out_tensor=tmp_path,
        check_rows=2,
    )
    carry, after = {name: step.rows.place(x) for name, x in step.start(embed(model, ids)).items()}, [0]
    with compilations() as seen:
        for spec in specs:
            carry, _ = step(carry, Block(spec, model.module_params(spec)))
            after.append(len(seen))
    assert after[2] > 0
    assert after[BLOCKS] == after[2 * BLOCKS]


@pytest.mark.slow
def test_a_second_run_hardly_compiles(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", num_layers=2, intermediate_size=64, num_kv_heads=4)
    unset = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    environment = unset | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", None)  # the command's own settings are on trial
    seconds = []
    for name in ("first", "second"):
        arguments = [sys.executable, "-c", SECOND_RUN, str(model), str(tmp_path / name)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT")).removeprefix("RESULT "))
        # Seconds on the wall, of which a busy machine lets a share count.
        seconds.append(found["seconds"] * min(1.0, found["share"]))
    assert seconds[0] > 2 * seconds[1]
    assert seconds[1] < 3
