"""Refusals and notes from headers, settings and directory entries, before the first pass."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from exl2jax.conversion.context import Context
from exl2jax.errors import Exl2JaxError, SettingsError, StorageError
from exl2jax.exl2.compile import TOKENIZER_NAME, largest_tensor, require_no_strays
from exl2jax.exl2.copying import foreign_files, plan_copies
from exl2jax.models import head_spec
from exl2jax.models.config import CONFIG_NAME
from exl2jax.qparams import QParams, q
from exl2jax.stock_tables import head_qparams
from exl2jax.storage import TensorHead
from exl2jax.storage.shards import MEGABYTE

SOURCE_LINKS = 3
"""Links that a note names."""


def early_refusals(context: Context) -> list[Exl2JaxError]:
    """Every error of the conversion that can be found without computing anything."""
    checks = (_check_limits, _check_places, _check_copies, _check_strays, _check_shards)
    found: list[Exl2JaxError] = []
    for check in checks:
        try:
            check(context)
        except Exl2JaxError as e:
            found.append(e)
    return found


def early_notes(context: Context) -> tuple[str, ...]:
    """Notes before anything is computed: the lasting ones, and what may stop the conversion later."""
    return (*lasting_notes(context), *_shard_notes(context))


def lasting_notes(context: Context) -> tuple[str, ...]:
    """Notes on the source and on the place of the result, which are still true when it is finished."""
    return (*context.model.notes, *_tokenizer_notes(context), *_place_notes(context))


def _check_limits(context: Context) -> None:
    context.config.limits.require_matches(context.specs)


def _check_places(context: Context) -> None:
    """Refuse a path for the result where no directory can be made."""
    config = context.config
    measurement = None if config.output_measurement is None else config.output_measurement.parent
    for name, path in (("compile_full", config.compile_full), ("output_measurement", measurement)):
        if path is None:
            continue
        there = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise StorageError(
                f"{path}: `{name}` is not a writable directory ({there} is in the way); choose another or fix its "
                "permissions"
            )


def _check_copies(context: Context) -> None:
    if context.config.compile_full is not None:
        plan_copies(context.model.directory)


def _check_strays(context: Context) -> None:
    config = context.config
    if config.output_measurement is None:
        known = () if config.compile_full else context.work.files
        require_no_strays(config.compile_full or context.work.path, known)


def _check_shards(context: Context) -> None:
    """Refuse shards that the largest tensor cannot fit, however narrow the codes that the allocation chooses."""
    if context.config.output_measurement is None:
        require_shards(context, _uniform(context, min))


def require_shards(context: Context, qparams: Mapping[str, QParams]) -> None:
    """Raise `SettingsError` where a tensor of the result, every linear quantized by its `qparams`, fits no shard."""
    if (beyond := _beyond_shards(context, qparams)) is not None:
        raise SettingsError(
            f"`shard_size` is {context.config.shard_size:g} MB; {beyond.name} takes {beyond.nbytes / MEGABYTE:.2f} MB; "
            "raise it, or set it to 0 for one file"
        )


def _beyond_shards(context: Context, qparams: Mapping[str, QParams]) -> TensorHead | None:
    """The largest tensor of the result, if it does not fit a shard."""
    size = context.config.shard_size
    largest = largest_tensor(context.model, qparams)
    return largest if 0 < size * MEGABYTE < largest.nbytes else None


def _uniform(context: Context, pick: Callable[[Iterable[int]], int]) -> dict[str, QParams]:
    """The widest (`max`) or the narrowest (`min`) setting that each linear may get, by key; the head has its own."""
    limits, head = context.config.limits, head_spec(context.model.config)
    linears = [linear for spec in context.specs for linear in spec.linears]
    chosen = {linear.key: q(str(pick(limits.widths(linear.key))), "1", "32") for linear in linears}
    return {**chosen, head.key: head_qparams(context.config.head_bits)}


def _shard_notes(context: Context) -> Iterator[str]:
    """A note on shards that fit the narrowest codes and not the widest; a given measurement decides at once."""
    config = context.config
    if config.output_measurement is not None or config.measurement is not None:
        return
    beyond = _beyond_shards(context, _uniform(context, max))
    if beyond is not None and _beyond_shards(context, _uniform(context, min)) is None:
        yield (
            f"`shard_size` is {config.shard_size:g} MB; {beyond.name} takes {beyond.nbytes / MEGABYTE:.2f} MB if it "
            "gets the widest codes: the conversion stops before the quantization if its bits do not fit, and goes on "
            "with a larger `shard_size`"
        )


def _tokenizer_notes(context: Context) -> Iterator[str]:
    rows, known = context.model.config.vocab_size, context.tokenizer.vocab_size
    if known > rows:
        yield (
            f"the tokenizer knows {known} ids, the embedding has {rows} rows: a text with the ids from {rows} on stops "
            "a loader; resize the embedding, or take the added tokens out of the tokenizer"
        )
    if context.tokenizer.written is not None and context.config.compile_full is not None:
        yield f"the source has no {TOKENIZER_NAME}: the result gets one that encodes the built-in texts alike"


def _place_notes(context: Context) -> Iterator[str]:
    """Notes on links that are followed, and on old files where the result goes."""
    target = context.config.compile_full
    if target is None:
        return
    source = context.model.directory.resolve()
    copies = plan_copies(context.model.directory).files if _copyable(context) else ()
    outside = [p for p in copies if p.is_symlink() and not _is_near(p.resolve(), source)]
    if outside:
        names = ", ".join(f"{p.name} -> {p.resolve()}" for p in outside[:SOURCE_LINKS])
        more = f" and {len(outside) - SOURCE_LINKS} more" if len(outside) > SOURCE_LINKS else ""
        yield f"links out of the model's directory are followed, the result gets what they point to: {names}{more}"
    written = {CONFIG_NAME, *(p.name for p in copies), *([TOKENIZER_NAME] if context.tokenizer.written else [])}
    foreign = foreign_files(target, written)
    if foreign:
        yield f"{target}: holds files that are not of this model and stay where they are: {', '.join(foreign)}"


def _copyable(context: Context) -> bool:
    try:
        _check_copies(context)
    except Exl2JaxError:
        return False
    return True


def _is_near(path: Path, source: Path) -> bool:
    """Whether a file lies in the model's directory or in the store of the download cache that it belongs to."""
    store = source.parent.parent / "blobs" if source.parent.name == "snapshots" else source
    return path.is_relative_to(source) or path.is_relative_to(store)
