"""Sources by name against a Hub on the loopback address."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download

from exl2jax import cli
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.errors import HubError, ModelError, StorageError
from exl2jax.hub import source_directory
from exl2jax.hub.sources import NAME
from exl2jax.storage.hub_cache import cached_source
from exl2jax.stream.progress import RunControl
from exl2jax.testing.hub_server import Hub, Repo


def test_names() -> None:
    assert NAME.fullmatch("org/name") and NAME.fullmatch("org/na.me-1@refs/pr/3") and NAME.fullmatch("o/n@abc")
    for other in ("/abs/path", "name", "a/b/c", "../up", "org/name@", "./here", "org/"):
        assert not NAME.fullmatch(other), other


def test_the_needed_files_are_fetched_once(hub: Hub, published: Repo, tiny_llama: Path) -> None:
    folder = source_directory(Path("org/tiny"))
    expected = {p.name for p in tiny_llama.iterdir()} | {"README.md", "LICENSE"}
    assert {p.name for p in folder.iterdir()} == expected
    for name in expected:
        assert (folder / name).read_bytes() == published.branches["main"][name]
    assert cached_source(folder) == f"org/tiny@{published.commit('main')}"
    fetched = [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r]
    assert len(fetched) == len(expected)
    assert source_directory(Path("org/tiny")) == folder
    assert [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r] == fetched, "the cache is used"


def test_a_revision_is_a_commit_of_its_own(hub: Hub, published: Repo) -> None:
    published.branches["old"] = {**published.branches["main"], "LICENSE": b"older terms"}
    folder = source_directory(Path("org/tiny@old"))
    assert folder.name == published.commit("old") != published.commit("main")
    assert (folder / "LICENSE").read_bytes() == b"older terms"
    assert source_directory(Path(f"org/tiny@{folder.name}")) == folder


def test_the_commit_is_part_of_the_inputs(hub: Hub, published: Repo, tmp_path: Path, tiny_llama: Path) -> None:
    def inputs(source: Path) -> dict[str, Any]:
        config = ConversionConfig(in_dir=source, out_dir=tmp_path / "work")
        return Context.open(config, RunControl()).inputs

    folder = source_directory(Path("org/tiny"))
    named, plain = inputs(folder), inputs(tiny_llama)
    assert named.pop("source") == f"org/tiny@{folder.name}"
    assert named == plain, "a directory has the same inputs but for the commit"


def test_without_a_network_the_cache_serves(hub: Hub, published: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source_directory(Path("org/tiny"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert source_directory(Path("org/tiny")) == folder
    with pytest.raises(HubError, match="not in the cache, and the Hub cannot be reached"):
        source_directory(Path("org/other"))


def test_a_directory_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert source_directory(Path("org/tiny")) == Path("org/tiny")
    assert not hub.requests


def test_only_the_cache_names_a_source(tmp_path: Path) -> None:
    assert cached_source(tmp_path / "models--org--name" / "snapshots" / "abc") == "org/name@abc"
    assert cached_source(tmp_path / "model") is None and cached_source(tmp_path / "x" / "snapshots" / "abc") is None


def test_refusals(hub: Hub, published: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"/nowhere: no such model directory, and no name of a repository \(ORG/NAME"):
        source_directory(Path("/nowhere"))
    with pytest.raises(
        HubError, match=r"org/none: no such directory here; as a repository of .*: there is no such rep"
    ):
        source_directory(Path("org/none"))
    with pytest.raises(HubError, match="no such revision"):
        source_directory(Path("org/tiny@gone"))
    hub.repos["org/bare"] = Repo(branches={"main": {"README.md": b"nothing"}})
    with pytest.raises(HubError, match=r"no config\.json"):
        source_directory(Path("org/bare"))
    published.gated = True
    with pytest.raises(HubError, match="gated; ask for access on its page and log in with `hf auth login`"):
        source_directory(Path("org/tiny"))
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert source_directory(Path("org/tiny")).name == published.commit("main")


def test_a_full_disk(hub: Hub, published: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(StorageError, match="the disk is full"):
        source_directory(Path("org/tiny"))


@pytest.mark.parametrize("command", ["plan", "eval", "calibrate", "generate"])
def test_the_commands_take_names(
    command: str,
    hub: Hub,
    published: Repo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens = ["-r", "2", "-l", "16"]
    arguments = {
        "plan": ["org/tiny", "-c", "random", *tokens],
        "eval": ["org/tiny", *tokens],
        "calibrate": ["-i", "org/tiny", "-c", "random", *tokens, "--out", str(tmp_path / "rows.safetensors")],
        "generate": ["org/tiny", "--prompt", "the", "--max-new", "2"],
    }
    assert cli.main([command, *arguments[command], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) and f"commit {published.commit('main')}" in caplog.text
    with_none = [a.replace("org/tiny", "org/none") for a in arguments[command]]
    assert cli.main([command, *with_none]) == 1
    assert "there is no such repository" in capsys.readouterr().err
