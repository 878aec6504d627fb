"""A power loss, by the letter of POSIX: a file's content is on disk after its fsync, a name after its directory's.

The model follows the operations of a run. At any moment it gives what a disk could hold if the power went now: only
what was synced, or every name but no content that was not synced, or half of such content.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.disk import Operation

type Image = dict[str, bytes | None]
"""Content by path; None is a directory."""

VARIANTS = ("lost", "empty", "torn")


class PowerModel:
    """The part of `root` that survives a power loss; pass `after` to a `Watch` over it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._names: dict[str, int] = {}
        self._safe_names: dict[str, int] = {}
        self._directories: set[int] = set()
        self._safe_content: dict[int, bytes] = {}
        self._next = 0

    def after(self, operation: Operation) -> None:
        path = operation.path
        match operation.kind:
            case "create" | "write" | "mkdir" if path not in self._names:
                self._names[path] = self._next
                if operation.kind == "mkdir":
                    self._directories.add(self._next)
                self._next += 1
            case "create" | "write":
                self._safe_content.pop(self._names[path], None)
            case "rename":
                self._names[path] = self._names.pop(operation.source)
            case "unlink" | "rmdir":
                self._names.pop(path, None)
            case "fsync":
                self._sync(path)

    def _sync(self, path: str) -> None:
        if path and self._names[path] not in self._directories:
            self._safe_content[self._names[path]] = (self.root / path).read_bytes()
            return
        here = {n: i for n, i in self._names.items() if os.path.dirname(n) == path}  # noqa: PTH120
        elsewhere = {n: i for n, i in self._safe_names.items() if os.path.dirname(n) != path}  # noqa: PTH120
        self._safe_names = elsewhere | here

    def images(self) -> Iterator[tuple[str, Image]]:
        """The possible contents of the disk after a power loss now, by variant."""
        for variant in VARIANTS:
            names = self._safe_names if variant == "lost" else self._names
            kept = {n: i for n, i in names.items() if all(str(p) in names for p in Path(n).parents[:-1])}
            yield variant, {name: self._content(name, number, variant) for name, number in sorted(kept.items())}

    def _content(self, name: str, number: int, variant: str) -> bytes | None:
        if number in self._directories:
            return None
        if number in self._safe_content:
            return self._safe_content[number]
        if variant == "torn":
            now = (self.root / name).read_bytes()
            return now[: len(now) // 2]
        return b""


def restore(image: Image, base: Path) -> None:
    """Lay an image out in an empty directory."""
    for name, content in image.items():
        if content is None:
            (base / name).mkdir(parents=True, exist_ok=True)
        else:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_bytes(content)
