"""The facts of one finished size for its card, kept in `exl2jax.json` beside the weights."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.result import ConversionResult
from exl2jax.errors import FormatError
from exl2jax.evaluation import EvalRows, Evaluation, evaluate_one, load_eval_rows, reference_pass
from exl2jax.evaluation.rows import HELDOUT
from exl2jax.exl2.copying import RECORD_FILE
from exl2jax.hub.command import command_of
from exl2jax.models import Model, ModelConfig, open_model
from exl2jax.storage import is_shard, read_json, write_json
from exl2jax.storage.digests import digest
from exl2jax.storage.hub_cache import cached_source
from exl2jax.version import VERSION

FORMAT = 1
CONTEXT = 8192
"""Tokens of the cache that the card's memory is computed for."""

EVALUATION_LENGTH = 256
"""Tokens of a row of the built-in held-out text: it is short, and every domain should have several rows."""

METADATA = ("license", "license_name", "license_link", "language", "tags", "pipeline_tag")
"""Keys of the source's card that the quantized model's card takes over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeRecord:
    """One size: `bytes` are those of the weight files, `memory` adds a cache of `CONTEXT` tokens in half precision.

    `evaluation` holds figures on `evaluated_on`, by domain too, and is None where nothing was evaluated; `metadata` are
    the source card's. `fingerprints` name what decides the bytes, `files` the SHA-256 of each weight file.
    """

    name: str
    base_model: str | None
    revision: str | None
    quantized_by: str | None
    metadata: Mapping[str, Any]
    bits: float
    bpw: float
    head_bits: int
    bytes: int
    memory: int
    evaluated_on: str | None
    source_perplexity: float | None
    evaluation: Mapping[str, Any] | None
    command: str
    seed: int
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    files: Mapping[str, str]

    def figure(self, name: str, domain: str | None = None) -> float | None:
        """A figure of the evaluation, over all tokens or those of a domain."""
        if self.evaluation is None:
            return None
        return (self.evaluation if domain is None else self.evaluation["domains"].get(domain, {})).get(name)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of the evaluation."""
        return tuple(self.evaluation["domains"]) if self.evaluation else ()


def record_size(
    config: ConversionConfig,
    result: ConversionResult,
    evaluation: tuple[Evaluation, float] | None,
    *,
    base_model: str | None = None,
    quantized_by: str | None = None,
) -> SizeRecord:
    """The record of a finished conversion with `compile_full`; `evaluation` comes with the source's perplexity."""
    assert config.compile_full is not None and result.bpw is not None and result.size is not None
    model = open_model(config.in_dir)
    name, _, revision = (cached_source(config.in_dir) or "").partition("@")
    found = None if evaluation is None else {k: v for k, v in asdict(evaluation[0]).items() if k not in _SPEED}
    calibration = (result.calibration or {}).items()
    return SizeRecord(
        name=(base_model or name or config.in_dir.absolute().name).rpartition("/")[2],
        base_model=base_model or name or None,
        revision=revision or None,
        quantized_by=quantized_by,
        metadata=source_metadata(config.in_dir),
        bits=result.bits,
        bpw=result.bpw,
        head_bits=config.head_bits,
        bytes=result.size,
        memory=result.size + cache_bytes(model.config),
        evaluated_on=None if evaluation is None else HELDOUT_SAID,
        source_perplexity=None if evaluation is None else evaluation[1],
        evaluation=found,
        command=command_of(replace(config, products=config.precision)),
        seed=config.seed,
        versions=versions(),
        fingerprints={
            "model config": model.config_digest,
            **_weights(model),
            **({"measurement": digest(config.measurement)} if config.measurement else {}),
            **{f"calibration rows, {stage} pass": rows["sha256"] for stage, rows in calibration},
        },
        files={p.name: _sha256(p) for p in sorted(config.compile_full.iterdir()) if is_shard(p.name)},
    )


_SPEED = ("seconds", "tokens_per_second", "depth")
HELDOUT_SAID = "the held-out text that exl2jax ships, which no calibration set holds"


def evaluate_sizes(source: Path, directories: Sequence[Path]) -> list[tuple[Evaluation, float]]:
    """Figures of directories on the held-out text against their source, each with the source's own perplexity."""
    rows: EvalRows = load_eval_rows(HELDOUT, source, EVALUATION_LENGTH, None)
    reference = reference_pass(source, rows)
    return [(evaluate_one(directory, rows, reference), reference.perplexity) for directory in directories]


def cache_bytes(config: ModelConfig) -> int:
    """Bytes of a cache of keys and values for `CONTEXT` tokens in half precision."""
    return 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * CONTEXT


def source_metadata(directory: Path) -> dict[str, Any]:
    """Licence, language and tags from the head of the source's card; empty without a readable one."""
    from huggingface_hub import metadata_load

    path = directory / "README.md"
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path)
    # Whatever a stranger's YAML holds, it is no reason to fail at the end of a conversion.
    except Exception:
        return {}
    return {key: found[key] for key in METADATA if key in found} if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """Versions of what decides the bytes."""
    import jax

    packages = {name: version(name) for name in ("jax", "jaxlib", "numpy")}
    device = jax.devices()[0]
    return {"exl2jax": VERSION, **packages, "python": platform.python_version(), "device": device.device_kind}


def write_record(record: SizeRecord, directory: Path) -> None:
    """Keep a record in a directory."""
    write_json(directory / RECORD_FILE, {"format": FORMAT, **asdict(record)})


def read_record(directory: Path) -> SizeRecord | None:
    """The record in a directory, None where there is none; `FormatError` for one that is not ours."""
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    found = read_json(path, FormatError, "the record of the conversion")
    names = {field.name for field in fields(SizeRecord)}
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT or set(found) != names:
        raise FormatError(f"{path}: not a record of this version of exl2jax; convert again, or remove the file")
    return SizeRecord(**found)


def _weights(model: Model) -> dict[str, str]:
    digest = getattr(model, "weights_digest", None)
    return {} if digest is None else {"model weights": digest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
