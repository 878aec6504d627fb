"""The standard set: rows of every domain, put together from texts by fixed rules (docs/format.md 5.1)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from exl2jax.calibration import composition as domains
from exl2jax.calibration.composition import Composition
from exl2jax.calibration.records import NOISE_ID, RowBlock
from exl2jax.calibration.seeds import stream
from exl2jax.calibration.texts import StandardTexts, stories, web_text, wiki_articles
from exl2jax.calibration.tokenizer import Tokenizer

PIECE = 128
"""Tokens of a piece in the shuffled rows (half a row where rows are shorter than two pieces)."""

type Fillers = Mapping[str, Callable[[], Iterable[str]]]
"""More text for a domain, asked for only when the domain's own text does not fill its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandardRows:
    """Blocks in row order, the rows each domain could not fill, and notes on fillers."""

    blocks: tuple[RowBlock, ...]
    missing: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Build:
    """The inputs of every domain's rule; `available` ids are `0 .. vocab-1`."""

    texts: StandardTexts
    tokenizer: Tokenizer
    length: int
    seed: int
    vocab: int
    fillers: Fillers


def standard_rows(
    texts: StandardTexts,
    composition: Composition,
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int,
    vocab_size: int,
    fillers: Fillers | None = None,
    noise_rows: int = 0,
) -> StandardRows:
    """Rows of `length` tokens for each domain of a composition, in its order; noise rows last.

    A domain whose text is short gives the rows it can, never one twice; `missing` counts the others. Random ids are
    drawn from those that both the tokenizer and the embedding (`vocab_size` rows) know.
    """
    vocab = min(vocab_size, tokenizer.vocab_size)
    build = _Build(texts=texts, tokenizer=tokenizer, length=length, seed=seed, vocab=vocab, fillers=fillers or {})
    blocks: list[RowBlock] = []
    missing: dict[str, int] = {}
    notes: list[str] = []
    for domain, wanted in composition:
        ids, note = _RULES[domain](build, domain, wanted)
        if len(ids):
            blocks.append(RowBlock(domain=domain, ids=ids))
        if len(ids) < wanted:
            missing[domain] = wanted - len(ids)
        notes += [note] if note else []
    if noise_rows:
        noise = np.full((noise_rows, length), NOISE_ID, dtype=np.int32)
        blocks.append(RowBlock(domain=domains.NOISE, ids=noise))
    return StandardRows(blocks=tuple(blocks), missing=missing, notes=tuple(notes))


def _running_rows(build: _Build, domain: str, wanted: int) -> tuple[np.ndarray, str]:
    """Consecutive rows of one running text; a domain with a filler goes on with that where its text ends."""
    text = build.texts.texts[domain]
    tokens = build.tokenizer.encode(web_text(text) if domain == domains.WEB else text)
    own = len(tokens) // build.length
    if own >= wanted or domain not in build.fillers:
        table = tokens[: own * build.length].reshape(own, build.length)
        return table[_pick(own, wanted, build.texts.spread)], ""
    parts, have = [tokens], len(tokens)
    for more in build.fillers[domain]():
        if have >= wanted * build.length:
            break
        parts.append(build.tokenizer.encode(more))
        have += len(parts[-1])
    rows = min(wanted, have // build.length)
    table = np.concatenate(parts)[: rows * build.length].reshape(rows, build.length)
    return (
        table,
        f"{domain}: {rows - own} of {rows} rows hold text of the Python standard library" if rows > own else "",
    )


def _document_rows(build: _Build, domain: str, wanted: int) -> tuple[np.ndarray, str]:
    """Rows of whole documents, BOS before and EOS after each: the first half without the leading BOS, the rest with it.

    A row starts with a document and ends where it is full. Where a text has too few documents for the rows wanted, the
    ends that rows cut off serve as further documents; such rows come first, where BOS is left out.
    """
    text, tokenizer = build.texts.texts[domain], build.tokenizer
    documents = wiki_articles(text) if domain == domains.WIKI else stories(text)
    bos = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
    limit = None if build.texts.spread else wanted
    encoded = (tokenizer.encode(document, bos=True, eos=True) for document in documents)
    groups, rest = _grouped(encoded, build.length, limit, len(bos))
    while len(groups) < wanted:
        pieces = (np.concatenate([bos, piece]) for piece in rest)
        more, rest = _grouped(pieces, build.length, wanted - len(groups), len(bos))
        if not more:
            break
        groups = more + groups
    groups = [groups[i] for i in _pick(len(groups), wanted, build.texts.spread)]
    starts = [len(bos) if row < len(groups) // 2 else 0 for row in range(len(groups))]
    rows = [group[start : start + build.length] for group, start in zip(groups, starts, strict=True)]
    return np.stack(rows) if rows else np.zeros((0, build.length), np.int32), ""


def _grouped(
    documents: Iterable[np.ndarray], length: int, limit: int | None, lead: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Consecutive documents joined until there is a row with or without BOS, at most `limit` times.

    Returns the groups, cut to `length + 1` tokens each, and what was cut off or left over, less the `lead` tokens that
    start a document.
    """
    groups: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    have = 0
    for document in documents:
        if len(groups) == limit:
            return groups, rest
        parts.append(document)
        have += len(document)
        if have > length:
            group = np.concatenate(parts)
            groups.append(group[: length + 1])
            rest += [group[length + 1 :]] if have > length + 1 else []
            parts, have = [], 0
    rest += [np.concatenate(parts)[lead:]] if parts else []
    return groups, rest


def _shuffled_rows(build: _Build, domain: str, wanted: int) -> tuple[np.ndarray, str]:
    """Rows of pieces of the multilingual text in random order, no piece twice; the last piece of a row may be cut."""
    tokens = build.tokenizer.encode(build.texts.texts[domains.MULTILINGUAL])
    piece = min(PIECE, max(1, build.length // 2))
    available = len(tokens) // piece
    table = tokens[: available * piece].reshape(available, piece)
    per_row = -(-build.length // piece)
    rows = min(wanted, available // per_row)
    order = stream(build.seed, domain).permutation(available)[: rows * per_row]
    return table[order].reshape(rows, per_row * piece)[:, : build.length], ""


def _random_rows(build: _Build, domain: str, wanted: int) -> tuple[np.ndarray, str]:
    """Rows of uniformly random ids."""
    return random_ids(wanted, build.length, build.vocab, build.seed), ""


def random_ids(rows: int, length: int, vocab: int, seed: int) -> np.ndarray:
    """Uniformly random ids `[rows, length]` int32 in `0 .. vocab-1`, from the seed's stream for random rows."""
    rng = stream(seed, domains.RANDOM)
    return rng.integers(0, vocab, size=(rows, length), dtype=np.int64).astype(np.int32)


def _pick(available: int, wanted: int, spread: bool) -> np.ndarray:
    """Indices of the rows to take: the first ones, or (to `spread`) the middles of as many equal stretches."""
    if wanted >= available or not spread:
        return np.arange(min(wanted, available))
    return (2 * np.arange(wanted) + 1) * available // (2 * wanted)


_RULES: Mapping[str, Callable[[_Build, str, int], tuple[np.ndarray, str]]] = {
    domains.WEB: _running_rows,
    domains.WIKI: _document_rows,
    domains.CODE: _running_rows,
    domains.TINY: _document_rows,
    domains.MULTILINGUAL: _running_rows,
    domains.SHUFFLED: _shuffled_rows,
    domains.RANDOM: _random_rows,
    domains.TECHNICAL: _running_rows,
}
