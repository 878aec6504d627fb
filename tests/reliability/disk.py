"""Watching and spoiling what a conversion does on disk, below the product and without its knowledge.

Python's own doors to the file system (and the one call by which safetensors writes) are replaced while a `Watch` is
open. Every change under the watched directory becomes an `Operation`, told to `before` ahead of it and to `after`
behind it; an exception from `before` is what the product sees in the operation's place.
"""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError


def nothing(*_: Any) -> None:
    """No action."""


@dataclass(frozen=True)
class Operation:
    """The `index`-th change: its `kind`, the `path` below the watched directory, a rename's `source`.

    `tear` leaves the operation half done where it can be.
    """

    index: int
    kind: str
    path: str
    source: str = ""
    tear: Callable[[], None] = nothing


class Watch:
    """Replaces the doors to the file system while open; not for use from two threads at once."""

    def __init__(self, root: Path, before: Callable[[Operation], None] = nothing, after: Any = nothing) -> None:
        self.root, self.before, self.after, self.count = root.resolve(), before, after, 0

    def __enter__(self) -> "Watch":
        self._stack = ExitStack()
        for module, name, kind in (
            (os, "unlink", "unlink"),
            (os, "remove", "unlink"),
            (os, "mkdir", "mkdir"),
            (os, "rmdir", "rmdir"),
            (os, "chmod", "chmod"),
        ):
            self._replace(module, name, self._simple(getattr(module, name), kind))
        for name in ("replace", "rename"):
            self._replace(os, name, self._rename(getattr(os, name)))
        self._replace(os, "fsync", self._by_descriptor(os.fsync, "fsync"))
        self._replace(os, "sendfile", self._sendfile(os.sendfile))
        self._replace(os, "posix_fallocate", self._by_descriptor(os.posix_fallocate, "write"))
        self._replace(np.memmap, "flush", self._flush(np.memmap.flush))
        self._replace(os, "open", self._os_open(os.open))
        opener = self._file_open(io.open)
        self._replace(io, "open", opener)
        self._replace(builtins, "open", opener)
        self._replace(safetensors.numpy, "serialize_file", self._serialize(safetensors.numpy.serialize_file))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, module: Any, name: str, new: Any) -> None:
        self._stack.enter_context(patch.object(module, name, new))

    def _inside(self, path: Any) -> str | None:
        """The path below the root, empty for the root itself; None for what is not watched, locks among them."""
        if not isinstance(path, str | os.PathLike):
            return None
        full = os.path.abspath(os.fspath(path))  # noqa: PTH100  (pathlib would resolve links)
        if full == str(self.root):
            return ""
        if not full.startswith(str(self.root) + os.sep) or full.endswith(".lock"):
            return None
        return full[len(str(self.root)) + 1 :]

    def _do(self, kind: str, path: str, act: Callable[[], Any], **more: Any) -> Any:
        operation = Operation(self.count, kind, path, **more)
        self.count += 1
        self.before(operation)
        result = act()
        self.after(operation)
        return result

    def _simple(self, real: Any, kind: str) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            inside = self._inside(path)
            if inside is None:
                return real(path, *args, **kwargs)
            return self._do(kind, inside, lambda: real(path, *args, **kwargs))

        return call

    def _rename(self, real: Any) -> Any:
        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            inside = self._inside(target)
            if inside is None:
                return real(source, target, **kwargs)
            return self._do("rename", inside, lambda: real(source, target, **kwargs), source=self._inside(source))

        return call

    def _by_descriptor(self, real: Any, kind: str) -> Any:
        def call(descriptor: int, *args: Any) -> Any:
            inside = self._inside(Path(f"/proc/self/fd/{descriptor}").readlink())
            if inside is None:
                return real(descriptor, *args)
            return self._do(kind, inside, lambda: real(descriptor, *args))

        return call

    def _flush(self, real: Any) -> Any:
        def flush(mapped: Any) -> Any:
            inside = self._inside(mapped.filename)
            return real(mapped) if inside is None else self._do("fsync", inside, lambda: real(mapped))

        return flush

    def _sendfile(self, real: Any) -> Any:
        def call(out: int, source: int, offset: Any, count: int) -> Any:
            inside = self._inside(Path(f"/proc/self/fd/{out}").readlink())
            if inside is None or offset >= os.fstat(source).st_size:
                return real(out, source, offset, count)
            half = os.fstat(source).st_size // 2
            return self._do(
                "write", inside, lambda: real(out, source, offset, count), tear=lambda: real(out, source, 0, half)
            )

        return call

    def _os_open(self, real: Any) -> Any:
        def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> Any:
            inside = self._inside(path)
            if inside is None or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(path, flags, *args, **kwargs)
            return self._do("create", inside, lambda: real(path, flags, *args, **kwargs))

        return call

    def _file_open(self, real: Any) -> Any:
        def call(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            inside = self._inside(path)
            if inside is None or not set(mode) & set("wax"):
                return real(path, mode, *args, **kwargs)
            file = self._do("create", inside, lambda: real(path, mode, *args, **kwargs))
            return _File(file, lambda act, tear: self._do("write", inside, act, tear=tear))

        return call

    def _serialize(self, real: Any) -> Any:
        def call(tensors: Any, path: Any, **kwargs: Any) -> Any:
            inside = self._inside(path)
            if inside is None:
                return real(tensors, path, **kwargs)

            def tear() -> None:
                real(tensors, path, **kwargs)
                os.truncate(path, os.stat(path).st_size // 2)  # noqa: PTH116

            try:
                return self._do("write", inside, lambda: real(tensors, path, **kwargs), tear=tear)
            except OSError as e:  # the library reports the system's refusals in its own words
                raise SafetensorError(f"I/O error: {os.strerror(e.errno or 0)} (os error {e.errno})") from e

        return call


class _File:
    """A file whose writes are told."""

    def __init__(self, file: Any, told: Callable[[Callable[[], Any], Callable[[], None]], Any]) -> None:
        self._file, self._told = file, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> Any:
        def tear() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        return self._told(lambda: self._file.write(content), tear)


class Killed(BaseException):
    """The process is dead: raised at every operation after its end, so that nothing it does reaches the disk."""


def kill_at(index: int, torn: bool) -> Callable[[Operation], None]:
    """SIGKILL to the own process at an operation, with `torn` in the middle of it."""

    def before(operation: Operation) -> None:
        if operation.index == index:
            if torn:
                operation.tear()
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def freeze_at(index: int, torn: bool) -> Callable[[Operation], None]:
    """The effect of `kill_at` on the disk without killing the process: no operation from this one on happens."""

    def before(operation: Operation) -> None:
        if operation.index >= index:
            if operation.index == index and torn:
                operation.tear()
            raise Killed

    return before


REFUSED = {
    errno.ENOSPC: {"write", "mkdir"},
    errno.EACCES: {"create", "mkdir"},
    errno.EIO: {"write", "fsync"},
    errno.EROFS: {"create", "rename", "mkdir", "unlink"},
}
"""Operations that a full disk, missing rights, a broken disk and a read-only file system refuse."""


def refuse_from(index: int, error: int) -> Callable[[Operation], None]:
    """Refuse every operation of the error's kinds from this one on; a write is torn first, as a full disk does."""

    def before(operation: Operation) -> None:
        if operation.index >= index and operation.kind in REFUSED[error]:
            if operation.kind == "write" and error != errno.EROFS:
                operation.tear()
            raise OSError(error, os.strerror(error), operation.path)

    return before
