"""Calibration rows for a model: its vocabulary and context bound them, and it may write some of them itself."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from exl2jax.calibration import CalibrationConfig, CalibrationRows, Sampler, Tokenizer, load_rows
from exl2jax.calibration.chat import read_chat_template
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.scans import TokenRows
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import CalibrationError
from exl2jax.models import HFModel, Model, ModelConfig
from exl2jax.storage import write_tensors
from exl2jax.storage.digests import fingerprint
from exl2jax.stream.progress import RunControl
from exl2jax.stream.sample import model_sampler, remembered

log = logging.getLogger(__name__)

IDENTITY = 64
"""First tokens of a row that tell it from others, whatever their length."""


class PassRows:
    """The calibration rows of a conversion's passes, built once each and written to its work directory."""

    def __init__(
        self,
        config: ConversionConfig,
        model: HFModel,
        tokenizer: Tokenizer,
        work: WorkDirectory,
        control: RunControl,
        *,
        sampling: bool = True,
    ) -> None:
        """Keep the sources of the rows; nothing is read yet.

        Without `sampling`, rows that the model would write hold their prompts only: enough to count with.
        """
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._work, self._control = work, control
        self._sampling = sampling
        self._built: dict[bool, CalibrationRows] = {}

    def build(self, *, measure: bool) -> CalibrationRows:
        """The rows of a pass. A job builds those of both passes first, so that bad input stops it early."""
        if measure not in self._built:
            rows = self._rows(self._config.calibration(measure=measure))
            for note in rows.notes:
                log.warning("calibration: %s", note)
            self._built[measure] = rows
        return self._built[measure]

    def unseen(self, count: int) -> TokenRows:
        """At most so many rows of the quantization's source that no other pass takes; none where it holds no more."""
        seen = self.build(measure=False)
        taken = [seen, *([] if self._config.measurement else [self.build(measure=True)])]
        more = self._at_most(len(seen.input_ids), count)
        known = {row[:IDENTITY].tobytes() for rows in taken for row in rows.input_ids}
        rows = TokenRows.of(more)
        fresh = [row[:IDENTITY].tobytes() not in known and row.min() >= 0 for row in more.input_ids]
        return TokenRows(*(values[np.asarray(fresh)][:count] for values in rows))

    def _at_most(self, least: int, more: int) -> CalibrationRows:
        """At most `least + more` rows of the quantization's source, which holds `least`; how many it holds is searched
        for, since a source only says that it has too few.
        """  # noqa: D205
        asked, found = self._config.calibration(measure=False), self.build(measure=False)
        low, high, tried = 0, more + 1, more
        while high - low > 1:
            try:
                found, low = self._rows(replace(asked, rows=least + tried)), tried
            except CalibrationError:
                high = tried
            tried = (low + high) // 2
        return found

    def write(self, *, measure: bool) -> CalibrationRows:
        """Write the rows of a pass to `cal_data.safetensors`; those of the measurement also under their own name."""
        rows = self.build(measure=measure)
        for path in (self._work.cal_data, *([self._work.measure_cal_data] if measure else [])):
            write_tensors(path, rows.tensors(), {"pass": "measure" if measure else "quantize", "sha256": rows.sha256})
        return rows

    def _rows(self, source: CalibrationConfig) -> CalibrationRows:
        """The rows of a source for this model."""
        return build_rows(
            source,
            self._model.config,
            self._tokenizer,
            lambda: self._model,
            self._control,
            memory=(self._work.self_rows, self._identity()) if self._sampling else None,
            sampler=None if self._sampling else _prompts_only,
            model_dir=self._config.in_dir,
        )

    def _identity(self) -> str:
        """The identity of the model, which its own text depends on besides the prompts."""
        model, config = self._model, self._config
        return fingerprint(
            {
                "config": model.config_digest,
                "weights": model.weights_digest(),
                "tokenizer": self._tokenizer.fingerprint,
                "rope": [config.rope_scale, config.rope_alpha],
            }
        )


def build_rows(
    source: CalibrationConfig,
    config: ModelConfig,
    tokenizer: Tokenizer,
    opened: Callable[[], Model],
    control: RunControl,
    *,
    memory: tuple[Path, str] | None = None,
    model_dir: Path | None = None,
    sampler: Sampler | None = None,
) -> CalibrationRows:
    """The calibration rows of a source for a model.

    `opened` returns the model itself; it is called only where the model writes text. `memory` is a folder to keep that
    text in, with the identity of the model (`remembered`). `model_dir` has the chat template for conversations, and
    `sampler` serves in place of the model's own. Raises the errors of `load_rows` and `model_sampler`.
    """

    def sample(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
        vocab = min(config.vocab_size, tokenizer.vocab_size)
        return model_sampler(opened(), vocab, control)(prompts, n_rows, length, seed)

    return load_rows(
        source,
        tokenizer,
        vocab_size=config.vocab_size,
        context=config.max_position,
        architecture=config.architecture,
        chat=None if model_dir is None else partial(read_chat_template, model_dir),
        sampler=sampler or (sample if memory is None else remembered(sample, *memory)),
    )


def _prompts_only(prompts: Sequence[Sequence[int]], n_rows: int, length: int, seed: int) -> np.ndarray:
    """Rows of the shape that a sampler gives, without running the model."""
    del seed
    ids = np.zeros((n_rows, length), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids
