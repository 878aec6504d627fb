"""Sources by name: `ORG/NAME[@REVISION]` is fetched from the Hub, as far as a conversion reads it."""

import logging
import re
from pathlib import Path

from exl2jax.errors import HubError, ModelError
from exl2jax.hub.faults import hub_faults

log = logging.getLogger(__name__)

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")

WANTED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
"""Files of a repository that a conversion reads or copies."""

UNWANTED = ("*/*", "consolidated*", "adapter_*", "training_args*")
"""Files that a conversion never reads: those in folders, other copies of the weights, remains of training."""


def source_directory(given: Path) -> Path:
    """A directory as it is, or the cached snapshot of the repository `ORG/NAME[@REVISION]`, fetched as far as needed.

    A directory of that name wins. Without a network the cache is used. Raises `ModelError` for what is neither, and
    `HubError` or `StorageError` for a repository that cannot be had.
    """
    if given.exists():
        return given
    named = NAME.fullmatch(str(given))
    if named is None:
        raise ModelError(f"{given}: no such model directory, and no name of a repository (ORG/NAME[@REVISION])")
    from huggingface_hub import constants, snapshot_download

    what = f"{given}: no such directory here; as a repository of {constants.ENDPOINT}"
    with hub_faults(what, "then run the same command again: what was fetched is not fetched again"):
        folder = Path(
            snapshot_download(
                named["repo"],
                revision=named["revision"],
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )
    if not (folder / "config.json").is_file():
        raise HubError(f"{given}: the repository has no config.json, so it holds no model that can be converted")
    log.info("%s: commit %s", given, folder.name)
    return folder
