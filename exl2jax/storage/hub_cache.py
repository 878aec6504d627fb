"""The repository and commit that a directory of the Hub's cache holds: `models--ORG--NAME/snapshots/COMMIT`."""

from pathlib import Path

FOLDER, SNAPSHOTS = "models--", "snapshots"


def cached_source(directory: Path) -> str | None:
    """`ORG/NAME@COMMIT` of a snapshot in the cache, None for every other directory."""
    path = directory.absolute()
    folder = path.parent.parent.name
    if path.parent.name != SNAPSHOTS or not folder.startswith(FOLDER):
        return None
    return f"{folder.removeprefix(FOLDER).replace('--', '/')}@{path.name}"
