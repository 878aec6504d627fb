"""`exl2jax publish`: upload EXL2 directories to the Hub."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from exl2jax.cli.options import Json
from exl2jax.cli.shared import deliver, say, set_up
from exl2jax.hub.card import NAMES as CARD_FILES
from exl2jax.hub.card import read_sizes, write_set_card
from exl2jax.hub.publish import Upload, hub_token, plan_uploads, publish, require_sound


def publish_command(
    directories: Annotated[list[Path], typer.Argument(help="EXL2 directories.")],
    repo: Annotated[str, typer.Option("--repo", help="USER/NAME; {bits} in it makes a repository of each size.")],
    branches: Annotated[
        bool, typer.Option("--branches", help="One repository, a branch for each size; the set's card on main.")
    ] = False,
    measurement: Annotated[
        Path | None, typer.Option("--measurement", help="measurement.json, to publish on main beside the branches.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public [private].")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List branches, files and sizes, send nothing; always so without a token.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Upload EXL2 directories that verify passes, resuming what broke off."""
    set_up(Console(stderr=True))
    plan_uploads(directories, repo, branches=branches)  # bad arguments are named before the long check
    require_sound(directories)
    with tempfile.TemporaryDirectory() as folder:
        main = _set_files(directories, Path(folder)) if branches else []
        main += [measurement] if measurement else []
        uploads = plan_uploads(directories, repo, branches=branches, main_files=main)
        token = hub_token()
        if token is None and not dry_run:
            say("no token found, so nothing is sent; log in with `hf auth login` or set HF_TOKEN")
        if dry_run or token is None:
            deliver(as_json, {"uploads": [_record(u) for u in uploads], "sent": False}, lambda: upload_table(uploads))
            return 0
        addresses = publish(uploads, public=public, said=say)
    deliver(as_json, {"addresses": list(addresses), "sent": True}, lambda: "\n".join(addresses))
    return 0


def upload_table(uploads: tuple[Upload, ...]) -> Table:
    """Branches, files and sizes."""
    table = Table("repository", "branch", "file", "MB")
    for upload in uploads:
        for name, path in upload.files:
            table.add_row(upload.repo, upload.branch, name, f"{path.stat().st_size / 1e6:.1f}")
    total = sum(upload.size for upload in uploads)
    table.caption = f"{total / 1e6:.1f} MB in all; a dry run, nothing was sent"
    return table


def _set_files(directories: list[Path], folder: Path) -> list[Path]:
    """The card of the set, where the directories have records to make it from."""
    sizes = read_sizes(directories)
    if not sizes:
        return []
    write_set_card(sizes, folder)
    return [folder / name for name in CARD_FILES if (folder / name).is_file()]


def _record(upload: Upload) -> dict[str, Any]:
    files = {name: path.stat().st_size for name, path in upload.files}
    return {"repo": upload.repo, "branch": upload.branch, "files": files}
