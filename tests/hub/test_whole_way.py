"""From a name to published sizes: one command converts, one publishes, against a Hub on the loopback address."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import metadata_load
from hypothesis import given
from hypothesis import strategies as st

from exl2jax import cli, evaluate
from exl2jax.allocate.strategy import Strategy
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.preflight import exact_size
from exl2jax.conversion.set_file import SET_NAME
from exl2jax.conversion.sizes import MEASURED, Size, bits_within, largest_step, parse_bytes, require_distinct
from exl2jax.errors import MeasurementError, SettingsError
from exl2jax.evaluation import load_eval_rows
from exl2jax.exl2.verify.directory import verify
from exl2jax.hub.finish import CardWishes
from exl2jax.hub.record import RECORD_FILE, read_record
from exl2jax.stream.devices import natural_products
from exl2jax.testing.hub_server import Hub, Repo
from tests.hub.conftest import WRITE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's library, of itself
ROWS = ["-c", "random", "-r", "3", "-mr", "2", "-l", "24", "-ml", "24", "--preset", "fast"]


@pytest.mark.slow
def test_from_a_name_to_branches(
    hub: Hub, published: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, template = tmp_path / "work", str(tmp_path / "out" / "{name}-{bits}bpw-exl2")
    command = ["convert", "-i", "org/tiny", "-o", str(work), "-cf", template, "-b", "2.0,3.0,5.0", "-hb", "6,6,8"]
    command += [*ROWS, "--quantized-by", "someone", "--json"]
    assert cli.main(command) == 1, "2.0 bits cannot be reached"
    refused, *made = json.loads(capsys.readouterr().out)["sizes"]
    assert "can be reached" in refused["refused"] or "reach" in refused["refused"]
    folders = [Path(each["output"]) for each in made]
    assert [folder.name for folder in folders] == ["tiny-3bpw-exl2", "tiny-5bpw-exl2"]
    assert all(verify(folder).ok for folder in folders)
    records = [read_record(folder) for folder in folders]
    assert [(r.bits, r.head_bits) for r in records if r] == [(3.0, 6), (5.0, 8)]
    first = records[0]
    assert first and first.base_model == "org/tiny" and first.revision == published.commit("main")
    assert first.evaluation and first.evaluation["kl_divergence"] > records[1].evaluation["kl_divergence"]  # type: ignore[index]
    assert made[0]["evaluation"]["kl_divergence"] == first.evaluation["kl_divergence"]
    card = (work / "README.md").read_text()
    assert f"{first.evaluation['kl_divergence']:.4f}" in card and "Text of the source" not in card
    assert metadata_load(folders[0] / "README.md")["license"] == "apache-2.0"  # type: ignore[index]
    assert f"convert -i org/tiny@{first.revision} -o WORK" in card and str(tmp_path) not in card
    assert f"--products {natural_products()}" in card
    _fits_sizes(Path(work), tmp_path, monkeypatch)

    monkeypatch.setenv("HF_TOKEN", WRITE)
    upload = ["publish", *map(str, folders), "--repo", "user/tiny-exl2", "--branches", "--measurement"]
    assert cli.main([*upload, str(work / MEASURED)]) == 0
    branches = hub.repos["user/tiny-exl2"].branches
    assert set(branches) == {"main", "3bpw", "5bpw"}
    assert branches["main"]["README.md"].decode() == card
    assert branches["3bpw"]["output.safetensors"] == (folders[0] / "output.safetensors").read_bytes()


def test_one_size_is_judged_where_that_is_wanted(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "exl2"
    command = ["convert", "-i", str(tiny_llama), "-o", str(tmp_path / "work"), "-cf", str(out), "-b", "4", *ROWS]
    assert cli.main([*command, "--evaluate", "--no-card", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["evaluation"]
    expected = evaluate(out, load_eval_rows("heldout", tiny_llama, 256).ids, tiny_llama)
    assert found["kl_divergence"] == expected.kl_divergence and found["tokens"] == expected.tokens
    assert not (out / RECORD_FILE).exists(), "no card, no record"
    assert cli.main(command) == 0, "the finished job"
    assert "quality on other text" in capsys.readouterr().out


def _fits_sizes(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most bits whose files have at most the bytes asked for, by few allocations; a thousandth more has more."""
    made = next((tmp_path / "out").glob("*-3bpw-exl2"))
    source = next((tmp_path / "cache").glob("models--org--tiny/snapshots/*"))
    base = ConversionConfig(in_dir=source, out_dir=work, preset="fast")
    sizes: dict[float, int] = {}

    def counted(context: Context, strategy: Strategy) -> int:
        sizes[context.config.bits] = exact_size(context, strategy)
        return sizes[context.config.bits]

    monkeypatch.setattr("exl2jax.conversion.sizes.exact_size", counted)
    bytes_made = (made / "output.safetensors").stat().st_size
    bits = bits_within(base, work / MEASURED, Size(head_bits=6, most_bytes=bytes_made))
    assert bits >= 3.0 - 1e-9 and sizes[bits] <= bytes_made < sizes[round(bits + 0.001, 3)]
    assert len(sizes) <= 8
    with pytest.raises(MeasurementError, match="the smallest that this model comes to is"):
        bits_within(base, work / MEASURED, Size(head_bits=6, most_bytes=10_000))
    assert bits_within(base, work / MEASURED, Size(head_bits=6, most_bytes=10**9)) == 8.0


@given(
    rises=st.lists(st.integers(0, 40), min_size=1, max_size=300),
    most=st.integers(-5, 6000),
    slope=st.floats(0.5, 100),
)
def test_the_largest_step_that_fits(rises: list[int], most: int, slope: float) -> None:
    """Whatever the slope is worth, the answer is that of trying every step."""
    sizes = dict(enumerate(itertools.accumulate(rises), start=7))
    fitting = [step for step, size in sizes.items() if size <= most]
    found = largest_step(sizes.__getitem__, min(sizes), max(sizes), most, slope)
    assert found == (max(fitting) if fitting else None)


@given(start=st.integers(0, 10**9), slope=st.integers(100, 10**6), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_sizes_that_rise_as_expected_take_few_tries(start: int, slope: int, share: float, seed: int) -> None:
    """Sizes of 6000 steps that stay up to two steps behind a line: six tries, not a dozen."""
    behind = np.random.default_rng(seed).integers(0, 2 * slope, 6001)
    sizes = np.maximum.accumulate(start + slope * np.arange(6001) - behind)
    tried: list[int] = []

    def size_of(step: int) -> int:
        tried.append(step)
        return int(sizes[step - 2000])

    most = int(sizes[0] + share * (sizes[-1] - sizes[0]))
    found = largest_step(size_of, 2000, 8000, most, slope)
    assert found == 2000 + int(np.searchsorted(sizes, most, "right")) - 1
    assert len(tried) <= 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-b", "3,4", "-cf", "out/model"], "with several sizes it must hold {bits}"),
        (["-b", "3,3"], "is given twice"),
        (["-b", "3,4", "-hb", "6,6,8"], "3 values for 2 sizes"),
        (["-b", "3,nine"], "it must be a number"),
        (["-b", "3,9"], "must lie between 2 and 8"),
        (["-b", "3", "--size", "1GB"], "one choice"),
        (["--size", "5"], "a number with MB, GB, MiB or GiB"),
        (["-b", "3,4", "-om", "m.json"], "makes no size"),
    ],
)
def test_bad_sizes(
    arguments: list[str], said: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    assert cli.main(["convert", "-i", str(tiny_llama), "-o", str(work), *ROWS, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not work.exists()


SET = ["-b", "3,4.5", "-hb", "6,8", *ROWS, "--seed", "3", "--no-evaluate", "--quantized-by", "someone"]


def test_a_set_resumes_by_its_work_directory_alone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[ConversionConfig, list[Size]]] = []
    wished: list[CardWishes] = []
    monkeypatch.setattr("exl2jax.cli.convert.convert_sizes", lambda c, sizes, *_: asked.append((c, sizes)) or [])
    monkeypatch.setattr("exl2jax.cli.convert.finish_set", lambda c, made, wishes: wished.append(wishes) or {})
    work, template = str(tmp_path / "work"), str(tmp_path / "{name}-{bits}")
    assert cli.main(["convert", "-i", str(tiny_llama), "-o", work, "-cf", template, *SET]) == 0
    assert cli.main(["convert", "-o", work]) == 0
    assert asked[1] == asked[0] and [s.head_bits for s in asked[0][1]] == [6, 8]
    assert wished[1] == wished[0] == CardWishes(evaluate=False, quantized_by="someone")
    assert cli.main(["convert", "-o", work, "--size", "1GB", "--evaluate"]) == 0
    assert asked[2] == (asked[0][0], [Size(head_bits=6, most_bytes=10**9)])
    assert wished[2] == CardWishes(evaluate=True, quantized_by="someone")
    capsys.readouterr()
    assert cli.main(["convert", "-o", work, "-hb", "8"]) == 2
    assert "-hb belongs to sizes; name them too, by -b/--bits or --size" in capsys.readouterr().err
    (tmp_path / "work" / SET_NAME).write_text("{}")
    assert cli.main(["convert", "-o", work]) == 1
    assert "not the record of a set" in capsys.readouterr().err


def test_sizes_by_hand() -> None:
    assert [parse_bytes(t) for t in ("5.5GB", "1 gib", "250MB", "2MiB")] == [5_500_000_000, 2**30, 250_000_000, 2**21]
    base = ConversionConfig(in_dir=Path("m"), out_dir=Path("w"), compile_full=Path("x-{head_bits}"))
    require_distinct(base, [(4.0, 6), (4.0, 8)], several=True)
    with pytest.raises(SettingsError, match="must hold"):
        require_distinct(base, [(4.0, 6), (5.0, 6)], several=True)
