"""Settings are declared once: everything else follows from the declaration, for a setting added here too."""

import ast
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

from exl2jax import ConversionConfig
from exl2jax.cli.entry import app
from exl2jax.conversion import inputs
from exl2jax.conversion.declaration import Decides, declare, settings_of
from exl2jax.conversion.settings import resumed_config, settings_record
from exl2jax.errors import JobError, SettingsError
from exl2jax.report.page import STYLE

PACKAGE = Path(__file__).parents[2] / "exl2jax"
SETTINGS = tuple(settings_of(ConversionConfig))


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended(ConversionConfig):
    """The settings of a conversion and two of another kind."""

    wave: tuple[int, ...] = field(
        default=(), metadata=declare("A length of wave.", Decides.MEASUREMENT, short="w", low=1, high=9)
    )
    colour: Path | None = field(default=None, metadata=declare("A file of colours.", Decides.RUN, recorded=False))


def config(**changes: Any) -> Extended:
    return Extended(**{"in_dir": Path("model"), "out_dir": Path("work"), **changes})


def test_every_field_is_a_setting_with_a_help_text() -> None:
    assert [s.name for s in SETTINGS] == [f.name for f in fields(ConversionConfig)]
    assert all(s.declared.help.endswith(".") for s in SETTINGS)
    words = [word for s in SETTINGS for word in (s.declared.short, s.long) if word]
    assert len(words) == len(set(words)), "no two settings share a flag"


def test_an_added_setting_is_recorded_resumed_and_checked() -> None:
    record = settings_record(config(wave=(3, 5), colour=Path("red")))
    assert record["wave"] == [3, 5] and "colour" not in record
    back = resumed_config(Path("work"), record, {"bits": 3.0}, Extended)
    assert back == config(in_dir=Path("model").resolve(), wave=(3, 5), bits=3.0)
    with pytest.raises(JobError, match="'wave'"):
        resumed_config(Path("work"), {k: v for k, v in record.items() if k != "wave"}, {}, Extended)
    for wrong, message in (((10,), "`wave` is 10; it must lie between 1 and 9"), (("x",), "`wave` is 'x'; .* whole")):
        with pytest.raises(SettingsError, match=message):
            config(wave=wrong)


def test_an_added_setting_is_compared_on_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(**changes: Any) -> dict[str, Any]:
        model: Any = SimpleNamespace(config_digest="c", weights_digest=lambda: "w")
        tokenizer: Any = SimpleNamespace(fingerprint="t")
        return inputs.job_inputs(config(**changes), model, tokenizer)

    assert inputs.differences(compared(), compared(wave=(3,))) == ["wave not given there, 3 now"]
    assert inputs.differences(compared(), compared(colour=Path("red"), devices=1, checkpoint_interval=0)) == []
    assert inputs.differences(compared(), compared(shard_size=1, compile_full=Path("x"))) == []
    measuring = {"output_measurement": Path("m.json")}
    assert "bits" not in compared(**measuring) and "seed" in compared(**measuring)
    assert inputs.differences(compared(bits=3.0), compared(bits=4.5)) == ["`bits` 3.0 there, 4.5 now"]
    assert inputs.differences(compared(), compared(cal_dataset="self")) == ["`cal_dataset` standard there, self now"]


def test_every_deciding_setting_is_compared() -> None:
    """By its value, or, where the declaration says so, by an entry of the inputs that stands for its content."""
    for setting in SETTINGS:
        if setting.declared.decides in (Decides.MEASUREMENT, Decides.QUANTIZATION) and not setting.declared.by_content:
            assert setting.name in {s.name for s in inputs.compared_settings(config())}
    by_content = {s.name for s in SETTINGS if s.declared.by_content}
    assert by_content == {"in_dir", "cal_dataset", "measurement", "preset", "products", "variants"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": True}, "`bits` is True; it must be a number"),
        ({"bits": "4"}, "`bits` is '4'; it must be a number"),
        ({"length": 2.5}, "`length` is 2.5; it must be a whole number"),
        ({"length": 1}, "`length` is 1; it must be at least 2"),
        ({"head_bits": 7}, "`head_bits` is 7; it must be one of 2, 3, 4, 5, 6, 8"),
        ({"rope_scale": 0.0}, "`rope_scale` is 0.0; it must be finite and greater than 0"),
        ({"rope_alpha": float("inf")}, "`rope_alpha` is inf; it must be finite"),
        ({"no_resume": 1}, "`no_resume` is 1; it must be true or false"),
        ({"cal_dir": "sets"}, "`cal_dir` is 'sets'; it must be a path"),
        ({"shard_size": -1}, "`shard_size` is -1; it must be at least 0"),
        ({"cal_split": "test"}, "`cal_split` is 'test'; it must be one of train, validation"),
        ({"devices": 0}, "`devices` is 0; it must be at least 1"),
    ],
)
def test_wrong_values_name_the_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message).replace(r"\ it", " it")):
        config(**changes)


def test_a_record_survives_its_way_through_a_job_file() -> None:
    given = config(
        compile_full=Path("full"), cal_columns=("a", "b"), cal_dir=Path("sets"), pins=("*=8",), exclude_bits=(2,)
    )
    paths = {name: Path(getattr(given, name)).resolve() for name in ("in_dir", "compile_full", "cal_dir")}
    assert resumed_config(Path("work"), settings_record(given), {}, Extended) == replace(given, **paths)


COMMANDS = get_command(app).commands.values()  # type: ignore[attr-defined]
FLAGS = sorted(
    {flag for command in COMMANDS for parameter in command.params for flag in parameter.opts if flag[0] == "-"}
)
FLAG = re.compile(rf"(?<![\w-])({'|'.join(FLAGS)})(?![\w-])")
"""Any flag of any command."""


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(PACKAGE.rglob("*.py")) if not {"cli", "testing", "__main__.py"} & set(p.parts)],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_no_flag_is_spelled_below_the_command(path: Path) -> None:
    """Messages and docstrings name settings; only the command knows flags.

    A style sheet has names that look alike, another program has flags of its own, and a card shows a whole command.
    """
    if path == PACKAGE / "hub" / "command.py":
        return
    texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    found = [m[0] for text in texts if isinstance(text, str) and text not in (STYLE, "-m") for m in FLAG.finditer(text)]
    assert not found
