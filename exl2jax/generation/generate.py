"""Writing a text: the prompt in chunks, then one token at a time over the cache of keys and values."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from exl2jax.errors import SettingsError
from exl2jax.generation.resident import ResidentModel
from exl2jax.generation.sampling import Sampling, pick
from exl2jax.generation.streamed import StreamedText
from exl2jax.models.kv_cache import turns
from exl2jax.stream.forward import head_logits
from exl2jax.stream.progress import StopFlag
from exl2jax.stream.stepping import Embeddings, empty_caches, step_tokens

CHUNK = 64
"""Tokens of a prompt that run together. Together with the steps of one token, two shapes are compiled."""

SPAN = 256
"""Room in the caches comes in multiples of this, so that texts of like length share what is compiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A text that a model wrote.

    `ended` says why it stops: `end` (the model's end token), `stop` (a stop text), `length`, `context` (the model takes
    no more) or `interrupted`. `prompt_seconds` are those until the first token's logits, compilation included.
    `seconds` are those of the tokens after it.
    """

    directory: Path
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    ended: str
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first one, by the second; None where there is only one."""
        return (len(self.ids) - 1) / self.seconds if len(self.ids) > 1 and self.seconds > 0 else None


def encode_prompt(resident: ResidentModel, text: str) -> list[int]:
    """Ids of a text with the special tokens that the tokenizer adds by default; never empty."""
    return resident.tokenizer.encode(text, template=True).tolist() or [resident.first_id]


def generate(
    resident: ResidentModel,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stops: Sequence[str] = (),
    show: Callable[[str], None] | None = None,
    stop: StopFlag | None = None,
) -> Generation:
    """Continue `prompt` until an end token, a stop text, or as many tokens as `sampling` allows.

    `show` gets the text piece by piece as it becomes certain. The same model, prompt and sampling give the same text.
    Raises `SettingsError` where the prompt leaves no room in the model's context.
    """
    if len(prompt) >= resident.context:
        raise SettingsError(
            f"{resident.directory}: the prompt has {len(prompt)} tokens and the model takes {resident.context}; "
            "shorten the prompt"
        )
    new = min(sampling.new_tokens, resident.context - len(prompt))
    chances = np.random.default_rng(sampling.seed).random(new)
    text = StreamedText(resident.tokenizer, prompt, stops, show or _ignore)
    ended = "context" if new < sampling.new_tokens else "length"
    row = [*prompt]
    begun = first = time.monotonic()
    for count, logits in enumerate(_logits(resident, row, len(prompt) + new)):
        first = time.monotonic() if count == 0 else first
        token = pick(logits, sampling, chances[count])
        if token in resident.ends:
            ended = "end"
            break
        row.append(token)
        if text.add(token):
            ended = "stop"
            break
        if count + 1 == new:
            break
        if stop is not None and stop.asked:
            ended = "interrupted"
            break
    text.close()
    return Generation(
        directory=resident.directory,
        text=text.text,
        ids=tuple(row[len(prompt) :]),
        prompt_tokens=len(prompt),
        ended=ended,
        prompt_seconds=first - begun,
        seconds=time.monotonic() - first,
    )


def _logits(resident: ResidentModel, row: list[int], length: int) -> Iterator[np.ndarray]:
    """Logits `[V]` after the last token of `row`, which the caller appends to; the row will have `length` tokens.

    The prompt runs in chunks. The last one is filled up with tokens that nobody looks at: the cache keeps their keys
    only until the real tokens of these positions overwrite them.
    """
    config, decoder = resident.model.config, resident.decoder
    room = -(-(length + CHUNK) // SPAN) * SPAN
    tables, caches = turns(config, length, room), empty_caches(config, 1, room)
    embeddings = Embeddings(resident.table, _positions(resident, length, room))
    vocab, done = min(config.vocab_size, resident.tokenizer.vocab_size), 0
    while True:
        fresh = row[done : done + (CHUNK if len(row) - done > 1 else 1)]
        ids = np.zeros((1, CHUNK if len(fresh) > 1 else 1), np.int32)
        ids[0, : len(fresh)] = fresh
        hidden = step_tokens(decoder, resident.walk, jnp.asarray(embeddings.at(ids, done)), caches, done, tables)
        done += len(fresh)
        if done == len(row):
            last = hidden[:, len(fresh) - 1 : len(fresh)]
            yield np.asarray(head_logits(decoder, resident.head, last))[0, 0, :vocab]


def _positions(resident: ResidentModel, length: int, room: int) -> np.ndarray | None:
    known = resident.model.positions(length)
    return None if known is None else np.pad(known, ((0, room - length), (0, 0)))


def _ignore(_: str) -> None:
    """Show nothing."""
