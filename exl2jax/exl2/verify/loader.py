"""The files besides the weights that stock ExLlamaV2 0.3.2 opens: required ones, and ones that it would refuse.

Its configuration opens `config.json`, `generation_config.json` and, for a vision model, `preprocessor_config.json`. Its
tokenizer opens `tokenizer.json`, `tokenizer_config.json` and `added_tokens.json`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from exl2jax.errors import FormatError
from exl2jax.exl2.verify.report import Fault
from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.config import CONFIG_NAME
from exl2jax.models.spelling import TEXT_SECTION, stock_spelling
from exl2jax.storage import read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"

LARGEST_TOKENIZER = 256 * 2**20

PROCESSORS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pixtral": (
        ("PixtralImageProcessor", "PixtralImageProcessorFast"),
        ("image_mean", "image_std", "patch_size", "resample", "rescale_factor", "size"),
    ),
    "siglip_vision_model": (
        ("Gemma3ImageProcessor",),
        ("image_mean", "image_std", "resample", "rescale_factor", "size"),
    ),
    "qwen2": (
        ("Qwen2VLImageProcessor",),
        ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"),
    ),
    "qwen2.5": (
        ("Qwen2_5_VLImageProcessor", "Qwen2VLImageProcessor"),
        ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"),
    ),
}
"""By `vision_config.model_type`: the image processors that the loader knows, and the keys that it looks up."""


def loader_faults(directory: Path, raw: Mapping[str, Any]) -> list[Fault]:
    """All faults of these files that stop the loader or make it read something else; `raw` is the config."""
    checks: tuple[Callable[[Path], Iterator[str]], ...] = (
        _tokenizer_faults,
        _tokenizer_config_faults,
        _added_token_faults,
        _generation_faults,
    )
    names = (TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS, GENERATION)
    of_config = (*_token_id_faults(raw), *_spelling_faults(raw))
    faults = [Fault(tensor=CONFIG_NAME, message=message) for message in of_config]
    for name, check in zip(names, checks, strict=True):
        faults += _named(directory / name, check)
    vision = raw.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, dict) else None
    if kind is not None:
        faults += _named(directory / PREPROCESSOR, lambda path: _processor_faults(path, str(kind)))
    return faults


def _named(path: Path, check: Callable[[Path], Iterator[str]]) -> list[Fault]:
    """The faults of one file, the error of reading it included."""
    try:
        return [Fault(tensor=path.name, message=message) for message in check(path)]
    except FormatError as e:
        return [Fault(tensor=path.name, message=str(e))]
    except OSError as e:
        return [Fault(tensor=path.name, message=f"cannot be read ({e})")]


def _token_id_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    for key in ("bos_token_id", "pad_token_id"):
        if not (raw.get(key) is None or _is_id(raw[key])):
            yield f"{key} must be a whole number for the loader, got {raw[key]!r:.40}"
    eos = raw.get("eos_token_id")
    if not (eos is None or _is_id(eos) or (isinstance(eos, list) and eos and all(map(_is_id, eos)))):
        yield f"eos_token_id must be a whole number or a list of some, got {eos!r:.40}"


def _spelling_faults(raw: Mapping[str, Any]) -> Iterator[str]:
    """Keys that the loader misreads, since it knows an older spelling only."""
    names = raw.get("architectures")
    if not (isinstance(names, list) and names and names[0] in ARCHITECTURES):
        return
    spelled = stock_spelling(raw, ARCHITECTURES[names[0]])
    for key, value in spelled.items():
        if raw.get(key) != value and key != TEXT_SECTION:
            yield f"{key} is {raw.get(key)!r:.60} for the loader, and means {value!r:.60}; write it so"


def _tokenizer_faults(path: Path) -> Iterator[str]:
    if not path.exists():
        yield "is missing; ExLlamaV2 from 0.3.1 on reads no other form of a tokenizer"
        return
    from tokenizers import Tokenizer

    if path.stat().st_size > LARGEST_TOKENIZER:
        yield f"has more than the {LARGEST_TOKENIZER} bytes that a tokenizer may have"
        return
    try:
        Tokenizer.from_file(str(path))
    # The library raises bare Exception for every fault of the file.
    except Exception as e:
        yield f"is not a readable tokenizer ({e})"


def _tokenizer_config_faults(path: Path) -> Iterator[str]:
    record = _record(path)
    added = record.get("added_tokens_decoder")
    if added is None:
        return
    if not isinstance(added, dict):
        yield "added_tokens_decoder must be an object"
        return
    for key, token in added.items():
        if not key.isdecimal() or not isinstance(token, dict) or not {"special", "content"} <= set(token):
            yield f"added_tokens_decoder: {key!r:.40} must be an id with content and special; the loader looks up both"
            return


def _added_token_faults(path: Path) -> Iterator[str]:
    wrong = [token for token, number in _record(path).items() if not _is_id(number)]
    if wrong:
        yield f"{wrong[0]!r:.40} must have a whole number"


def _generation_faults(path: Path) -> Iterator[str]:
    eos = _record(path).get("eos_token_id")
    if not (eos is None or _is_id(eos) or isinstance(eos, list)):
        yield f"eos_token_id must be a whole number or a list, got {eos!r:.40}"


def _processor_faults(path: Path, kind: str) -> Iterator[str]:
    if not path.exists():
        yield f"is missing; the loader opens it, since {CONFIG_NAME} has a vision_config"
        return
    record = _record(path)
    if kind not in PROCESSORS:
        return  # the loader goes on without vision
    processors, keys = PROCESSORS[kind]
    if record.get("image_processor_type") not in processors:
        yield f"image_processor_type must be {' or '.join(processors)}, got {record.get('image_processor_type')!r:.40}"
    absent = [key for key in keys if record.get(key) is None]
    if absent:
        yield f"lacks {', '.join(absent)}, which the loader looks up"


def _record(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file; `FormatError` where it is anything else."""
    if not path.exists():
        return {}
    value = read_json(path, FormatError, "a file that the loader opens")
    if not isinstance(value, dict):
        raise FormatError(f"{path}: must hold a JSON object")
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
