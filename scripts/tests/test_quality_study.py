"""The quality study in its short form: a tiny model, one target, every variant's door opened once."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exl2jax.testing.tiny_model import write_tiny_llama
from exl2jax.variants.recipe import PRESETS
from scripts.studies.quality import EVERY_TARGET, METHODS, MORE, PARTS, VARIANTS, Study, Trial, plot, study, table

ROWS, LENGTH = 4, 32


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    base = tmp_path_factory.mktemp("study")
    ids = np.random.default_rng(1).integers(0, 300, (12, LENGTH))
    for name, part in (("quantize", ids[:8]), ("measure", ids[:3]), ("heldout", ids[8:])):
        save_file({"input_ids": part}, base / f"{name}.safetensors")
    return argparse.Namespace(
        model=write_tiny_llama(base / "model", num_layers=1),
        out=base / "out",
        rows=ROWS,
        calibration=str(base / "quantize.safetensors"),
        measuring=str(base / "measure.safetensors"),
        heldout=str(base / "heldout.safetensors"),
        development=False,
        more="",
        keep=True,
    )


@pytest.fixture(scope="module")
def tiny_study(arguments: argparse.Namespace) -> Study:
    return Study(arguments)


def test_trials_are_run_once_and_judged_by_domain(tiny_study: Study) -> None:
    records = [tiny_study.run(Trial(variant=v, bits=5.0, rows=ROWS)) for v in ("best", "stock")]
    for record in records:
        assert 4.5 < record["bpw"] <= 5.0 and len(record["costs"]) == 2
        assert all(cost["cpu_seconds"] > 0 and cost["peak_memory"] > 1e8 for cost in record["costs"])
        for found in record["domains"].values():
            assert 0 < found["kl"] < 1 and 0 < found["top1"] <= 1 and found["kl_error"] >= 0
        assert 0 < record["used"]["kl"] < 1
    path = tiny_study.out / f"best-5-{ROWS}-0.json"
    path.write_text(json.dumps(records[0] | {"bpw": 1.0}))
    assert tiny_study.run(Trial(variant="best", bits=5.0, rows=ROWS))["bpw"] == 1.0
    assert not list((tiny_study.out / "work").glob("best*"))
    assert (tiny_study.out / f"exl2-best-5-{ROWS}-0" / "output.safetensors").exists()
    lines = table(records).splitlines()
    assert len(lines) == 4 and lines[2].startswith("| best | ") and lines[3].startswith("| stock | ")
    plot(records, tiny_study.out / "plot.png")
    assert (tiny_study.out / "plot.png").stat().st_size > 5000


def test_recipes_that_measure_alike_share_a_measurement(tiny_study: Study) -> None:
    best, plain = (tiny_study.measurement(VARIANTS[name]) for name in ("best", "fisher"))
    assert best == plain != tiny_study.measurement(VARIANTS["stock"])
    assert best != tiny_study.measurement(VARIANTS["all tokens alike"])
    assert {tiny_study.measurement(VARIANTS[name]) for name in METHODS} == {best}
    own = [tiny_study.measurement(VARIANTS[name]) for name in ("rotation", "equalize")]
    assert len({best, *own}) == 3
    assert own[0].name == "measurement-fisher-8-0-scales-columns-transform-rotation-seed-0.json"


def test_subsets_of_the_calibration_differ_and_keep_its_order(tiny_study: Study) -> None:
    files = {tiny_study._calibration_rows(ROWS, subset) for subset in range(3)}
    assert len(files) == 3 and len({Path(f).read_bytes() for f in files}) == 3


def test_a_tuned_trial_gets_text_of_its_own(arguments: argparse.Namespace, tmp_path: Path) -> None:
    words = np.random.default_rng(3).integers(0, 10**6, 200 * LENGTH)
    (tmp_path / "more.txt").write_text("\n\n".join(str(word) for word in words))
    study = Study(
        argparse.Namespace(**{**vars(arguments), "out": tmp_path / "out", "more": str(tmp_path / "more.txt")})
    )
    assert study._text(PRESETS["fast"], ROWS, 0) == {
        "cal_dataset": str(tmp_path / "out" / f"rows-{ROWS}-0.safetensors")
    }
    found = study._text(PRESETS["max"], ROWS, 0)
    ids, longer = (load_file(x)["input_ids"] for x in (study._calibration_rows(ROWS, 0), found["cal_dataset"]))
    assert found["dataset_rows"] == len(ids) and len(longer) == len(ids) + MORE
    np.testing.assert_array_equal(longer[: len(ids)], ids)
    assert not {row.tobytes() for row in longer[len(ids) :]} & {row.tobytes() for row in ids.astype(np.int32)}


def test_development_rows_are_those_that_no_trial_sees(arguments: argparse.Namespace, tmp_path: Path) -> None:
    ids = np.random.default_rng(2).integers(0, 300, (73, LENGTH))
    measured = [0, 1, 10, 11, 58]
    for name, part in (("all", ids), ("measured", ids[measured])):
        save_file({"input_ids": part}, tmp_path / f"{name}.safetensors")
    files = {"calibration": str(tmp_path / "all.safetensors"), "measuring": str(tmp_path / "measured.safetensors")}
    chosen = {**vars(arguments), **files, "development": True, "out": tmp_path / "out", "rows": 24}
    found = Study(argparse.Namespace(**chosen))
    seen = {*measured, *np.unique(np.linspace(0, 70, 24).round().astype(int))}
    fresh = [row for row in range(73) if row not in seen]
    web, text, code = ([r for r in fresh if r in part] for part in (range(10), range(10, 58), range(58, 73)))
    np.testing.assert_array_equal(found.judge.ids, ids[[*web[:5], *code[:5], *text[:2]]])
    sizes = {name: part.stop - part.start for name, part in found.judge.domains.items()}
    assert sizes == {"web": min(len(web), 5), "code": 5, "encyclopedia": 2}
    with pytest.raises(SystemExit, match="leave none of web"):
        Study(argparse.Namespace(**{**chosen, "rows": 73}))


def test_the_whole_study_holds_the_presets_and_the_parts() -> None:
    trials = list(study([], [2.5, 3.0], 115, subsets=3))
    assert {t.variant for t in trials} == {*EVERY_TARGET, *PARTS} < set(VARIANTS)
    assert len({t.key for t in trials}) == len(trials) == 2 * 3 + len(PARTS) + 2
    assert {(t.rows, t.bits) for t in trials} == {(115, 2.5), (115, 3.0), (24, 3.0)}
    assert {t.variant for t in study(["fast"], [3.0], 115, subsets=3)} == {"fast"}
    named = list(study(["fast", "stock"], [2.5, 3.0], 115, subsets=3))
    assert [(t.variant, t.bits) for t in named] == [("fast", 2.5), ("stock", 2.5), ("fast", 3.0), ("stock", 3.0)]
