"""Every command that works on a conversion takes the flag of every setting, by construction."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import exl2jax.cli.settings as shared
from exl2jax import ConversionConfig, cli
from exl2jax.cli.convert import LISTED
from exl2jax.cli.settings import flags, takes_settings
from exl2jax.cli.spelling import Spelling
from exl2jax.conversion.declaration import Decides, Setting, declare, settings_of
from exl2jax.conversion.settings import settings_record
from exl2jax.conversion.work_directory import JobState, WorkDirectory
from exl2jax.lab.plan import OWN, plan_settings, read_plan

ROOT = Path(__file__).parents[1]
SETTINGS = tuple(settings_of(ConversionConfig))
VALUES = {
    "preset": "fast",
    "variants": "scales=stock",
    "pins": "*=8",
    "head_bits": "8",
    "cal_split": "validation",
    "moe_calibration": "all",
    "products": "bfloat16",
}
"""Values that not every text would do for."""


class Seen(Exception):  # noqa: N818  (no error: it ends the command where the work would begin)
    """Raised in place of the work, once the settings are read."""


def value_of(setting: Setting) -> list[str]:
    if setting.kind is bool:
        return []
    return [VALUES.get(setting.name, "folder" if setting.kind in (str, Path) else "3")]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that a command was given."""
    seen: list[dict[str, Any]] = []

    def stop(settings: dict[str, Any], *_: Any) -> None:
        seen.append(settings)
        raise Seen

    for command in ("convert", "plan", "calibrate"):
        monkeypatch.setattr(f"exl2jax.cli.{command}.conversion_config", stop)
    monkeypatch.setattr("exl2jax.cli.sweep.read_plan", lambda _, settings: stop(settings))
    return seen


COMMON = {
    "convert": ["-o", "work"],
    "plan": [],
    "calibrate": ["--out", "rows.safetensors"],
    "sweep": ["plan.toml", "--out", "folder"],
}
CASES = [
    (command, setting, flag)
    for command in COMMON
    for setting in (plan_settings() if command == "sweep" else SETTINGS)
    for flag in flags(setting)
]


@pytest.mark.parametrize(("command", "setting", "flag"), CASES, ids=lambda x: getattr(x, "name", x))
def test_every_command_takes_every_flag(
    command: str, setting: Setting, flag: str, config: list[dict[str, Any]]
) -> None:
    with pytest.raises(Seen):
        cli.main([command, *COMMON[command], flag, *value_of(setting)])
    [found] = config
    given = found.pop(setting.name)
    assert set(found) <= {"out_dir"}, "nothing that was not given is set"
    assert setting.decode(setting.encode(given)) is not None
    kind = setting.kind
    assert all(isinstance(item, kind) for item in (given if setting.many else [given]))


def test_a_sweep_leaves_out_its_own_settings_only() -> None:
    assert {s.name for s in SETTINGS} - {s.name for s in plan_settings()} == set(OWN)


def test_help_shows_every_flag_and_default() -> None:
    commands = get_command(cli.entry.app).commands  # type: ignore[attr-defined]
    for name in COMMON:
        options = {parameter.name: parameter for parameter in commands[name].params}
        for setting in plan_settings() if name == "sweep" else SETTINGS:
            option = options[setting.name]
            if name == "convert" and setting.name in LISTED:  # several values, as text
                assert tuple(option.opts) == flags(setting)
                continue
            assert tuple(option.opts) == flags(setting)
            assert option.help.startswith(setting.declared.help.rstrip("."))
            assert option.show_default == (setting.declared.unset or True)
            if not setting.many and not setting.required:
                assert option.default == setting.default


def test_the_documentation_names_every_flag() -> None:
    text = "".join((ROOT / path).read_text() for path in ("README.md", "docs/laboratory.md", "docs/calibration.md"))
    missing = [
        flag for setting in SETTINGS for flag in flags(setting) if f"{flag}`" not in text and f"{flag} " not in text
    ]
    assert not [flag for flag in missing if flag.startswith("--") and "-" in flag[2:]]
    assert not [s.name for s in SETTINGS if all(flag in missing for flag in flags(s))]


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended(ConversionConfig):
    """A setting more."""

    wave: tuple[int, ...] = field(default=(), metadata=declare("A wave.", Decides.MEASUREMENT, short="w"))
    ripple: float | None = field(default=None, metadata=declare("A ripple.", Decides.OUTPUT, unset="none", low=0))


def test_an_added_setting_becomes_a_flag_a_key_of_settings_files_and_of_sweeps(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def command(context: typer.Context, settings: dict[str, Any], file: shared.SettingsFile = None) -> int:
        """A command."""
        seen.append(settings)
        return 0

    app = typer.Typer()
    app.command()(takes_settings(tuple(settings_of(Extended)))(command))
    run = get_command(app)
    run(["-w", "1", "-w", "2", "--ripple", "0.5"], standalone_mode=False)
    (tmp_path / "settings.toml").write_text("wave = [3]\nripple = 2\n")
    run(["--settings", str(tmp_path / "settings.toml"), "--ripple", "4"], standalone_mode=False)
    run([], standalone_mode=False)
    assert seen == [{"wave": (1, 2), "ripple": 0.5}, {"wave": (3,), "ripple": 4.0}, {}]
    assert {"wave", "ripple"} <= {s.name for s in plan_settings(Extended)}


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.declared.recorded], ids=lambda s: s.name)
def test_settings_files_take_names_and_long_flags(
    setting: Setting, tmp_path: Path, config: list[dict[str, Any]]
) -> None:
    text = (value_of(setting) or ["true"])[0]
    plain = text if setting.kind in (bool, int, float) else f'"{text}"'
    for key in (setting.name, setting.long):
        path = tmp_path / "settings.toml"
        path.write_text(f"{key} = {f'[{plain}]' if setting.many else plain}\n")
        with pytest.raises(Seen):
            cli.main(["plan", "--settings", str(path)])
    first, second = config
    assert first == second and setting.name in first


@pytest.mark.parametrize("setting", plan_settings(), ids=lambda s: s.name)
def test_a_plan_takes_every_setting_and_flags_stand_over_it(setting: Setting, tmp_path: Path) -> None:
    text = (value_of(setting) or ["true"])[0]
    plain = text if setting.kind in (bool, int, float) else f'"{text}"'
    entry = f"{setting.name} = {f'[{plain}]' if setting.many else plain}\n"
    path = tmp_path / "plan.toml"
    path.write_text(f'models = ["m"]\ntargets = [4]\n[settings]\n{entry}[variants.a]\npreset = "fast"\n')
    [cell] = read_plan(path).cells()
    value = getattr(cell.config(tmp_path), setting.name)
    default = () if setting.many else setting.default
    assert value != default
    path.write_text(f'models = ["m"]\ntargets = [4]\n[variants.a]\npreset = "fast"\n{entry}')
    assert getattr(read_plan(path).cells()[0].config(tmp_path), setting.name) == value
    [over] = read_plan(path, {setting.name: default}).cells()
    assert getattr(over.config(tmp_path), setting.name) == default
    deciding = setting.declared.decides
    assert (over.name == cell.name) == (deciding == Decides.RUN)
    assert (over.measurement != cell.measurement) == (deciding == Decides.MEASUREMENT)


FLAGS = {"bits": ("-b", "--bits"), "measurement": ("-m", "--measurement"), "measurement_rows": ("-mr",)}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-b", "4"], "-b, -m/--measurement, -mr, other, `A B`"),
        (["--bits=4", "-m", "x"], "--bits, -m, -mr, other, `A B`"),
        (["-b4.5", "-mr3"], "-b, -m/--measurement, -mr, other, `A B`"),
        ([], "-b/--bits, -m/--measurement, -mr, other, `A B`"),
    ],
)
def test_settings_are_spelled_as_typed(arguments: list[str], shown: str) -> None:
    assert Spelling(FLAGS, arguments)("`bits`, `measurement`, `measurement_rows`, `other`, `A B`") == shown


def test_a_work_directory_of_other_settings_is_refused_as_typed(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    begun = ["convert", "-i", str(tiny_llama), "-o", str(work), "-c", "random", "-r", "2", "-mr", "2", "-l", "32"]
    begun += ["-ml", "32", "--preset", "stock", "-om", str(tmp_path / "m.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exl2jax.conversion.convert._Conversion._deliver_measurement", lambda *_: 1 / 0)
        patch.setattr("exl2jax.conversion.passes.MeasureStep", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(begun)
    capsys.readouterr()
    changed = ["3" if before == "-mr" else word for before, word in zip(["", *begun], begun, strict=False)]
    assert cli.main([*changed, "--seed", "5"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "begun with other inputs: -mr 2 there, 3 now; --seed 0 there, 5 now." in message
    assert message.endswith("start over with -nr/--no_resume, or choose another -o")


def test_a_plan_of_a_job_resumes_its_settings(tmp_path: Path, config: list[dict[str, Any]]) -> None:
    work = WorkDirectory(tmp_path / "work")
    work.path.mkdir()
    begun = ConversionConfig(in_dir=tmp_path / "model", out_dir=work.path, bits=3.0, pins=("*=8",))
    work.save(JobState(inputs={}, settings=settings_record(begun), stage="quantize"))
    assert shared.conversion_config({"out_dir": work.path, "bits": 5.0}) == replace(begun, bits=5.0)
