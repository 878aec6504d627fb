"""Publishing to a Hub on the loopback address: plans, uploads that break off and go on, and refusals."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _http

from exl2jax import cli
from exl2jax.errors import FormatError, HubError, SettingsError
from exl2jax.hub.card import write_set_card
from exl2jax.hub.publish import plan_uploads, publish
from exl2jax.hub.record import write_record
from exl2jax.testing.hub_server import Hub, Repo
from tests.exl2.exl2_dir import SHARDS, edit_config, write_tiny_exl2
from tests.hub.conftest import READ, WRITE
from tests.hub.test_card import record

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the Hub's library, of itself


def exl2(folder: Path, bits: float, seed: int = 0) -> Path:
    directory = write_tiny_exl2(folder / f"tiny-{bits}bpw", seed)
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, {"quantization_config": {**quantization, "bits": bits}})
    write_record(record(bits=bits, bpw=bits), directory)
    return directory


@pytest.fixture
def sizes(tmp_path: Path) -> list[Path]:
    return [exl2(tmp_path, 4.6), exl2(tmp_path, 4.45, seed=1)]


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.roles[WRITE] == "write"
    monkeypatch.setenv("HF_TOKEN", WRITE)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.usefixtures("logged_in")
def test_a_set_becomes_branches_and_a_card_on_main(
    hub: Hub, sizes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measurement = tmp_path / "measurement.json"
    measurement.write_text("{}")
    names = [str(path) for path in sizes]
    assert cli.main(["publish", *names, "--repo", "user/tiny", "--branches", "--measurement", str(measurement)]) == 0
    repo = hub.repos["user/tiny"]
    assert repo.private
    assert set(repo.branches) == {"main", "4.6bpw", "4.45bpw"}
    shared = {"README.md", "kl.png", "measurement.json"}
    assert set(repo.branches["main"]) == shared
    write_set_card([record(bits=b, bpw=b) for b in (4.45, 4.6)], tmp_path)
    assert repo.branches["main"]["README.md"] == (tmp_path / "README.md").read_bytes()
    for path in sizes:
        branch = repo.branches[f"{path.name.removeprefix('tiny-')}"]
        assert {n: data for n, data in branch.items() if n not in shared} == contents(path)
    assert capsys.readouterr().out.split() == [
        f"{hub.endpoint}/user/tiny/tree/{branch}" for branch in ("main", "4.6bpw", "4.45bpw")
    ]


@pytest.mark.usefixtures("logged_in")
def test_an_upload_that_broke_off_goes_on(hub: Hub, sizes: list[Path]) -> None:
    uploads = plan_uploads(sizes, "user/tiny", branches=True)
    hub.refuse_after = 3
    with pytest.raises(
        HubError, match=r"user/tiny, branch 4.45bpw: the upload broke off: .*run the same command again"
    ):
        publish(uploads, public=True, said=lambda _: None)
    assert not hub.repos["user/tiny"].private
    assert hub.repos["user/tiny"].branches["4.6bpw"] == contents(sizes[0]), "what was finished stays"
    assert len(hub.received) == 3
    hub.refuse_after = None
    publish(uploads, public=True, said=lambda _: None)
    assert hub.repos["user/tiny"].branches["4.45bpw"] == contents(sizes[1])
    assert len(hub.received) == len(set(hub.received)) == 4, "no file was sent twice"
    publish(uploads, public=True, said=lambda _: None)
    assert len(hub.received) == 4


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the Hub's library would wait before it tries again."""
    waited: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": waited.append}))
    return waited


@pytest.mark.usefixtures("logged_in")
def test_a_connection_that_breaks_in_the_middle_of_an_upload(
    hub: Hub, sizes: list[Path], waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", *map(str, sizes), "--repo", "user/tiny", "--branches"]
    hub.drop_after = 4  # the plot of the set, two shards of the first size, a shard of the second
    assert cli.main(command) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "user/tiny, branch 4.45bpw: the upload broke off: the Hub did not answer as expected" in message
    assert message.endswith("run the same command again: what was uploaded is not sent again")
    assert len(hub.received) == 4 and len(hub.dropped) > 1 and sum(waits) > 10, "the library had tried again"
    assert hub.repos["user/tiny"].branches["4.6bpw"].items() >= contents(sizes[0]).items(), "what was finished stays"
    arrived = list(hub.received)
    hub.drop_after = None
    assert cli.main(command) == 0
    assert hub.repos["user/tiny"].branches["4.45bpw"].items() >= contents(sizes[1]).items()
    assert hub.received[:4] == arrived and len(set(hub.received)) == len(hub.received) == 5, "nothing was sent twice"


@pytest.mark.usefixtures("logged_in")
def test_a_connection_that_breaks_once_is_tried_again(hub: Hub, sizes: list[Path], waits: list[float]) -> None:
    hub.drop_after, hub.drops = 1, 1
    publish(plan_uploads(sizes[:1], "user/tiny", branches=False), public=False, said=lambda _: None)
    assert hub.repos["user/tiny"].branches["main"] == contents(sizes[0])
    assert len(hub.dropped) == len(waits) == 1


@pytest.mark.usefixtures("logged_in")
def test_a_repository_for_each_size(hub: Hub, sizes: list[Path]) -> None:
    publish(plan_uploads(sizes, "user/tiny-{bits}bpw", branches=False), public=False, said=lambda _: None)
    assert hub.repos["user/tiny-4.6bpw"].branches == {"main": contents(sizes[0])}
    assert hub.repos["user/tiny-4.45bpw"].branches == {"main": contents(sizes[1])}


def test_without_a_token_nothing_is_sent(hub: Hub, sizes: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["publish", *map(str, sizes), "--repo", "user/tiny", "--branches"]
    assert cli.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    assert "no token found" in shown.err
    listed = json.loads(shown.out)
    assert listed["sent"] is False and [u["branch"] for u in listed["uploads"]] == ["main", "4.6bpw", "4.45bpw"]
    assert listed["uploads"][1]["files"] == {n: len(data) for n, data in contents(sizes[0]).items()}
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert SHARDS[0] in table and "4.45bpw" in table and "nothing was sent" in table
    assert not hub.requests


@pytest.mark.usefixtures("logged_in")
def test_a_dry_run_sends_nothing(hub: Hub, sizes: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["publish", str(sizes[0]), "--repo", "user/tiny", "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out and not hub.requests


@pytest.mark.usefixtures("logged_in")
def test_damaged_directories_are_refused(hub: Hub, sizes: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (sizes[1] / SHARDS[1]).unlink()
    assert cli.main(["publish", *map(str, sizes), "--repo", "user/tiny", "--branches"]) == 1
    assert "tiny-4.45bpw: not published, for `exl2jax verify` finds" in capsys.readouterr().err
    assert not hub.requests


@pytest.mark.usefixtures("logged_in")
def test_a_repository_with_other_files_is_refused(hub: Hub, sizes: list[Path]) -> None:
    hub.repos["user/tiny"] = Repo(branches={"main": {".gitattributes": b"", "notes.txt": b"mine"}})
    with pytest.raises(HubError, match=r"its branch main has other files \(notes.txt\)"):
        publish(plan_uploads(sizes[:1], "user/tiny", branches=False), public=False, said=lambda _: None)
    assert not hub.received


def test_a_token_without_write_rights(hub: Hub, sizes: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READ)
    uploads = plan_uploads(sizes[:1], "user/tiny", branches=False)
    with pytest.raises(HubError, match="for reading only"):
        publish(uploads, public=False, said=lambda _: None)
    hub.roles[READ] = "fineGrained"
    with pytest.raises(HubError, match="user/tiny: cannot be created: the token has no right to do this"):
        publish(uploads, public=False, said=lambda _: None)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(HubError, match="the token: the token has no right"):
        publish(uploads, public=False, said=lambda _: None)
    assert not hub.repos


def test_plans_that_make_no_sense(sizes: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="take `branches`, or a `repo` with"):
        plan_uploads(sizes, "user/tiny", branches=False)
    with pytest.raises(SettingsError, match="give sizes that differ"):
        plan_uploads([sizes[0], sizes[0]], "user/tiny", branches=True)
    with pytest.raises(SettingsError, match="must be USER/NAME"):
        plan_uploads(sizes, "tiny", branches=True)
    with pytest.raises(SettingsError, match="give `branches`"):
        plan_uploads(sizes[:1], "user/tiny", branches=False, main_files=[tmp_path / "measurement.json"])
    edit_config(sizes[0], {"quantization_config": None})
    with pytest.raises(FormatError, match="names no bits"):
        plan_uploads(sizes, "user/tiny", branches=True)
