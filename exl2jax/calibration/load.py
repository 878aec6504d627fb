"""Loading calibration data: from the user's request to checked calibration rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.calibration import composition as domains
from exl2jax.calibration.chat import ChatTemplate, conversation
from exl2jax.calibration.documents import json_file, json_lines, text_blocks
from exl2jax.calibration.examples import example_rows
from exl2jax.calibration.named import named_rows
from exl2jax.calibration.packing import pack_texts
from exl2jax.calibration.parquet import chosen_columns, parquet_texts
from exl2jax.calibration.ready import read_ready
from exl2jax.calibration.records import (
    EXAMPLES,
    NOISE_ID,
    CalibrationConfig,
    CalibrationRows,
    Examples,
    RowBlock,
    Sampler,
    hash_ids,
)
from exl2jax.calibration.self_sampling import self_rows
from exl2jax.calibration.source import Source, parse_source
from exl2jax.calibration.standard import random_ids, standard_rows
from exl2jax.calibration.stdlib import code_fillers, technical_fillers
from exl2jax.calibration.stock_texts import stock_texts_folder
from exl2jax.calibration.texts import directory_texts, package_texts
from exl2jax.calibration.tokenizer import Tokenizer
from exl2jax.errors import CalibrationError, SettingsError

DEFAULT_ROWS, DEFAULT_MEASURE_ROWS, DEFAULT_LENGTH = 100, 16, 2048
"""The stock converter's defaults, for a source that has no size of its own."""

WITHOUT_FILE = ("standard", "exllamav2", "self", "random", "named")
"""Kinds of sources that name no file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """A configuration with everything that building one source needs; `length` None means that of the source."""

    config: CalibrationConfig
    tokenizer: Tokenizer | None
    vocab_size: int
    sampler: Sampler | None
    length: int | None
    noise_rows: int
    chat: Callable[[], ChatTemplate] | None

    def render(self, value: Any, where: str) -> str:
        """The text of a conversation by the model's chat template."""
        if self.chat is None:
            raise CalibrationError(f"{where}: holds a conversation, and there is no model whose chat template would do")
        return self.chat().render(conversation(value, where))

    @property
    def encoder(self) -> Tokenizer:
        """The tokenizer, where a source cannot do without."""
        if self.tokenizer is None:
            raise SettingsError(f"calibration source {self.config.source!r} needs the model's tokenizer")
        return self.tokenizer

    @property
    def tokens_per_row(self) -> int:
        """The length of a row, where a source has none of its own."""
        return DEFAULT_LENGTH if self.length is None else self.length

    def rows_or_default(self, rows: int | None) -> int:
        """The number of rows, where a source has none of its own."""
        if rows is not None:
            return rows
        return DEFAULT_MEASURE_ROWS if self.config.measure else DEFAULT_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class _SelfRows:
    """Rows for the model to write after everything else is checked, so that no weight is read for bad input."""

    request: _Request
    rows: int
    only: Sequence[str] = ()

    def written(self) -> RowBlock:
        """Sample them."""
        return self_rows(
            self.request.sampler,
            self.request.encoder,
            rows=self.rows,
            length=self.request.tokens_per_row,
            seed=self.request.config.seed,
            only=self.only,
            purpose="self-fill" if self.only else "self",
        )


type Built = tuple[list[RowBlock | _SelfRows], list[str]]
"""Blocks in row order, and notes."""


def load_rows(
    config: CalibrationConfig,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    sampler: Sampler | None = None,
    context: int | None = None,
    architecture: str = "",
    chat: Callable[[], ChatTemplate] | None = None,
) -> CalibrationRows:
    """Build the calibration rows that a configuration asks for, and check them.

    `vocab_size` is the number of rows of the model's embedding, `context` the longest row the model can take (None: do
    not check), `sampler` writes rows from the model itself for the source `self` and for `fill_with_self`. `tokenizer`
    may be None for sources of token ids; `chat` gives the model's chat template, for conversations. The same
    arguments give the same bytes in every process.

    Raises `SettingsError` for settings that make no sense and `CalibrationError` for sources that do not serve.
    """
    noise = domains.noise_rows(architecture, config.measure) if config.noise_rows is None else config.noise_rows
    request = _Request(
        config=config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        sampler=sampler,
        length=config.length,
        noise_rows=noise,
        chat=None if chat is None else cache(chat),
    )
    _check_context(config.length, context)
    if isinstance(config.source, str | Path):
        name = str(config.source)
        blocks, notes = _from_sources(request, parse_source(name), context)
    else:
        name = EXAMPLES
        blocks, notes = _from_examples(request, config.source, context)
    checked = [b if isinstance(b, _SelfRows) else _in_vocabulary(b, request, name) for b in blocks]
    blocks = [_in_vocabulary(b.written(), request, name) if isinstance(b, _SelfRows) else b for b in checked]
    ids, mask = _joined(blocks)
    _check_context(ids.shape[1], context)
    return CalibrationRows(
        input_ids=ids,
        attention_mask=mask,
        domains=tuple(block.domain for block in blocks for _ in block.ids),
        source=name,
        seed=config.seed,
        tokenizer="" if tokenizer is None else tokenizer.fingerprint,
        sha256=hash_ids(ids),
        notes=(*notes, *_duplicate_notes(ids)),
    )


def _from_examples(request: _Request, examples: Examples, context: int | None) -> Built:
    """The block of data given from Python."""
    block, notes = example_rows(
        examples,
        request.tokenizer,
        rows=request.config.rows,
        length=request.config.length,
        context=context,
        batch_size=request.config.batch_size,
        pad_token_id=request.config.pad_token_id,
    )
    return [block], list(notes)


def _from_sources(request: _Request, sources: Sequence[Source], context: int | None) -> Built:
    """Blocks of one source or of a mixture."""
    for source in sources:
        if source.kind not in WITHOUT_FILE and not Path(source.name).is_file():
            raise CalibrationError(f"{source.name}: no such calibration file; check the path")
    if request.length is None and any(source.kind != "ready" for source in sources):
        request = replace(request, length=min(DEFAULT_LENGTH, context or DEFAULT_LENGTH))
    blocks: list[RowBlock | _SelfRows] = []
    notes: list[str] = []
    for source, rows in _planned(sources, request.config):
        build = _standard if source.kind in ("standard", "exllamav2") else _other
        more, said = build(request, source, rows)
        blocks += more
        notes += said
    lengths = sorted(
        {b.request.tokens_per_row if isinstance(b, _SelfRows) else b.ids.shape[1] for b in blocks},
    )
    if len(lengths) > 1:
        raise CalibrationError(
            f"calibration source {str(request.config.source)!r}: its parts have rows of {lengths} tokens; "
            f"set the length to {lengths[0]}"
        )
    return blocks, notes


def _planned(sources: Sequence[Source], config: CalibrationConfig) -> Iterator[tuple[Source, int | None]]:
    """Each source with its rows: the configured number shared out in proportion to the counts, else the counts.

    Counts are those of the quantization pass; measurement takes the share that it takes of the standard set.
    """
    counts = [source.count for source in sources if source.count is not None]
    if not counts:
        yield from ((source, config.rows) for source in sources)
        return
    total = sum(counts)
    if config.measure:
        ratio = sum(n for _, n in domains.MEASURE_ROWS) / sum(n for _, n in domains.QUANTIZE_ROWS)
        total = max(len(counts), round(total * ratio))
    shared = domains.share(counts, config.rows or total, keep=[True] * len(counts))
    yield from ((source, rows) for source, rows in zip(sources, shared, strict=True) if rows)


def _standard(request: _Request, source: Source, rows: int | None) -> Built:
    """The standard set; rows that its texts cannot fill are left out with a note, or written by the model if asked."""
    config, length = request.config, request.tokens_per_row
    own = source.kind == "standard" and not source.name
    texts = package_texts() if own else directory_texts(_texts_folder(source, config))
    fillers = {domains.CODE: code_fillers, domains.TECHNICAL: technical_fillers} if own else {}
    composition = domains.standard_composition(config.measure, rows)
    built = standard_rows(
        texts,
        composition,
        request.encoder,
        length=length,
        seed=config.seed,
        vocab_size=request.vocab_size,
        fillers=fillers,
        noise_rows=request.noise_rows,
    )
    blocks: list[RowBlock | _SelfRows] = list(built.blocks)
    notes = list(built.notes)
    fill = config.fill_with_self if config.fill_with_self is not None else own and request.sampler is not None
    if built.missing and fill:
        only = [domain for domain, missing in built.missing.items() for _ in range(missing)]
        only = [domains.MULTILINGUAL if domain == domains.SHUFFLED else domain for domain in only]
        blocks.append(_SelfRows(request=request, rows=len(only), only=only))
        notes.append(f"{len(only)} rows that {texts.origin} could not fill were written by the model")
        return blocks, notes
    wanted = dict(composition)
    for domain, missing in built.missing.items():
        notes.append(
            f"{domain}: {wanted[domain] - missing} of {wanted[domain]} rows; "
            f"{texts.origin} hold no more at {length} tokens a row"
        )
    if not any(block.domain in domains.TEXT_DOMAINS for block in built.blocks):
        raise CalibrationError(f"standard set: {texts.origin} fill no row of {length} tokens; ask for shorter rows")
    return blocks, notes


def _texts_folder(source: Source, config: CalibrationConfig) -> Path:
    return stock_texts_folder(config.cal_dir) if source.kind == "exllamav2" else Path(source.name)


def _other(request: _Request, source: Source, rows: int | None) -> Built:
    """Every source but the standard set."""
    config = request.config
    if source.kind == "ready":
        return [read_ready(Path(source.name), rows=rows, length=request.length)], []
    wanted, length = request.rows_or_default(rows), request.tokens_per_row
    if source.kind == "self":
        return [_SelfRows(request=request, rows=wanted)], []
    if source.kind == "random":
        ids = random_ids(wanted, length, _known_ids(request), config.seed)
        return [RowBlock(domain=domains.RANDOM, ids=ids)], []
    if source.kind == "named":
        ids = named_rows(
            source.name,
            request.encoder,
            rows=wanted,
            length=length,
            seed=config.seed,
            split=config.split,
            cal_dir=config.cal_dir,
        )
        return [RowBlock(domain=source.name, ids=ids)], []
    texts = _file_texts(request, source, config.columns)
    block = pack_texts(texts, request.encoder, domain=source.kind, where=source.name, rows=wanted, length=length)
    note = chosen_columns(Path(source.name), config.columns).note if source.kind == "parquet" else ""
    return [block], [note] if note else []


def _known_ids(request: _Request) -> int:
    if request.tokenizer is None:
        return request.vocab_size
    return min(request.vocab_size, request.tokenizer.vocab_size)


def _file_texts(request: _Request, source: Source, columns: Sequence[str]) -> Iterator[str]:
    """The texts of a file, in order."""
    path = Path(source.name)
    if source.kind == "text":
        return text_blocks(path)
    read = {"parquet": parquet_texts, "jsonl": json_lines, "json": json_file}[source.kind]
    return read(path, columns, request.render)


def _in_vocabulary(block: RowBlock, request: _Request, name: str) -> RowBlock:
    """The block, its real tokens checked; padding with an id of no token becomes id 0."""
    ids, mask, vocab_size = block.ids, block.mask, request.vocab_size
    outside = (ids < 0) | (ids >= vocab_size)
    if block.domain == domains.NOISE or request.noise_rows:
        outside &= ~(ids == NOISE_ID).all(axis=1, keepdims=True)
    if mask is not None:
        ids = np.where(outside & (mask == 0), 0, ids)
        outside &= mask != 0
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise CalibrationError(
            f"{name}: token id {ids[row, column]} at row {row}, position {column} of its {block.domain} rows is "
            f"outside the model's vocabulary of {vocab_size}; use the tokenizer that belongs to the model"
        )
    return replace(block, ids=ids)


def _joined(blocks: Sequence[RowBlock]) -> tuple[np.ndarray, np.ndarray | None]:
    ids = np.ascontiguousarray(np.concatenate([block.ids for block in blocks]), dtype=np.int32)
    if all(block.mask is None for block in blocks):
        return ids, None
    masks = [np.ones(block.ids.shape, np.int32) if block.mask is None else block.mask for block in blocks]
    return ids, np.ascontiguousarray(np.concatenate(masks), dtype=np.int32)


def _check_context(length: int | None, context: int | None) -> None:
    if length is not None and context is not None and length > context:
        raise CalibrationError(
            f"calibration rows of {length} tokens are longer than the model's context of {context}; "
            f"set the length to at most {context}"
        )


def _duplicate_notes(ids: np.ndarray) -> list[str]:
    """A note if rows repeat (noise rows do by nature)."""
    duplicates = count_duplicates(ids)
    return [f"{duplicates} of {len(ids)} rows repeat an earlier row"] if duplicates else []


def count_duplicates(ids: np.ndarray) -> int:
    """Rows of `[rows, length]` that equal an earlier one; noise rows are not counted."""
    rows = ids[~(ids == NOISE_ID).all(axis=1)]
    return len(rows) - len({row.tobytes() for row in rows})
