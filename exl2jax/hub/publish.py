"""Publishing EXL2 directories: a plan of branches and files, and its upload by the Hub's own library."""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2jax.errors import FormatError, HubError, SettingsError
from exl2jax.exl2.verify.directory import verify
from exl2jax.hub.faults import LOG_IN, hub_faults
from exl2jax.storage import read_json

log = logging.getLogger(__name__)

MAIN = "main"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SERVERS_OWN = {".gitattributes"}
"""Files that the Hub puts into a new repository."""

RESUME = "run the same command again: what was uploaded is not sent again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """Files for one branch of a repository, by their name there."""

    repo: str
    branch: str
    files: tuple[tuple[str, Path], ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for _, path in self.files)


def plan_uploads(
    directories: Sequence[Path], repo: str, *, branches: bool, main_files: Sequence[Path] = ()
) -> tuple[Upload, ...]:
    """The files of each branch or repository, main first where a set has files of its own.

    `repo` is `USER/NAME`, and may hold `{bits}` for a repository each. With `branches`, each directory is a branch
    named by its bits, and `main_files` are on main. Raises `SettingsError` for directories that would overwrite each
    other, and `FormatError` for what is not an EXL2 directory.
    """
    placed = []
    for directory in directories:
        bits = f"{_bits(directory):g}"
        target = repo.replace("{bits}", bits)
        if REPO.fullmatch(target) is None:
            raise SettingsError(f"`repo` is {repo!r}; it must be USER/NAME, with {{bits}} for a repository each")
        branch = f"{bits}bpw" if branches else MAIN
        placed.append(Upload(repo=target, branch=branch, files=_files_of(directory)))
    places = [(each.repo, each.branch) for each in placed]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        advice = "give sizes that differ" if branches else "take `branches`, or a `repo` with {bits}"
        raise SettingsError(f"{twice[0]}: several directories would go to its branch {twice[1]}; {advice}")
    if not main_files:
        return tuple(placed)
    if not branches:
        raise SettingsError("the files of a set go to main beside its branches; give `branches`")
    return (Upload(repo=placed[0].repo, branch=MAIN, files=tuple((p.name, p) for p in main_files)), *placed)


def require_sound(directories: Iterable[Path]) -> None:
    """Raise `FormatError` for the first directory that `verify` does not pass."""
    for directory in directories:
        report = verify(directory)
        if not report.ok:
            first, more = report.faults[0], len(report.faults) - 1
            also = f", and {more} more faults" if more else ""
            raise FormatError(
                f"{directory}: not published, for `exl2jax verify` finds: {first.tensor}: {first.message}{also}"
            )


def hub_token() -> str | None:
    """The token that the Hub's library would use."""
    from huggingface_hub import get_token

    return get_token()


def publish(uploads: Sequence[Upload], *, public: bool, said: Callable[[str], None]) -> tuple[str, ...]:
    """Create what is missing and upload branch after branch; returns the address of each branch.

    What was uploaded before a failure stays, and is not sent again. Raises `HubError`.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    _require_write(api)
    addresses = []
    own = {upload.repo: {name for u in uploads if u.repo == upload.repo for name, _ in u.files} for upload in uploads}
    for repo in dict.fromkeys(upload.repo for upload in uploads):
        with hub_faults(f"{repo}: cannot be created", RESUME):
            api.create_repo(repo, private=not public, exist_ok=True)
        _require_no_others(api, [u for u in uploads if u.repo == repo], own[repo])
    for number, upload in enumerate(uploads, start=1):
        where = f"{upload.repo}, branch {upload.branch}"
        said(f"{number} of {len(uploads)}: {where}, {upload.size / 1e9:.2f} GB")
        with hub_faults(f"{where}: the upload broke off", RESUME):
            if upload.branch != MAIN:
                api.create_branch(upload.repo, branch=upload.branch, exist_ok=True)
            _send(api, upload)
        addresses.append(f"{api.endpoint}/{upload.repo}/tree/{upload.branch}")
    return tuple(addresses)


def _send(api: Any, upload: Upload) -> None:
    """One folder after the other: files of one upload may lie in several."""
    folders: dict[Path, list[str]] = {}
    for name, path in upload.files:
        folders.setdefault(path.parent, []).append(name)
    for folder, names in folders.items():
        api.upload_folder(
            repo_id=upload.repo,
            folder_path=folder,
            revision=upload.branch,
            allow_patterns=names,
            commit_message="Upload by exl2jax",
        )


def _require_write(api: Any) -> None:
    """Refuse a token that is known to be for reading only, before anything is created."""
    with hub_faults("the token", RESUME):
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"the token is for reading only; make one with write access, then {LOG_IN}")


def _require_no_others(api: Any, uploads: Sequence[Upload], own: set[str]) -> None:
    """Refuse a branch that holds files which this upload does not replace: it is something else's home."""
    with hub_faults(f"{uploads[0].repo}: cannot be read", RESUME):
        there = {ref.name for ref in api.list_repo_refs(uploads[0].repo).branches}
        for upload in uploads:
            if upload.branch not in there:
                continue
            present = set(api.list_repo_files(upload.repo, revision=upload.branch))
            others = sorted(present - own - SERVERS_OWN)
            if others:
                listed = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
                raise HubError(
                    f"{upload.repo}: its branch {upload.branch} has other files ({listed}); "
                    "choose another repository, or remove them there"
                )


def _bits(directory: Path) -> float:
    config = read_json(directory / "config.json", FormatError, "the model's configuration")
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    bits = quantization.get("bits") if isinstance(quantization, dict) else None
    if not isinstance(bits, int | float) or isinstance(bits, bool):
        raise FormatError(
            f"{directory}: config.json names no bits of an EXL2 model; give a directory that convert made"
        )
    return float(bits)


def _files_of(directory: Path) -> tuple[tuple[str, Path], ...]:
    """The files of a directory, hidden ones and folders apart."""
    paths = sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))
    return tuple((path.name, path) for path in paths)
