"""Multiple-choice and completion suites through lm-evaluation-harness (optional extra), this package as its model.

`Scorer` answers the harness's questions and knows nothing of it; `harness_model` dresses it in the harness's class.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exl2jax.calibration import load_tokenizer
from exl2jax.errors import SettingsError
from exl2jax.evaluation.logits import final_states
from exl2jax.generation import ResidentModel, Sampling, generate, load_resident
from exl2jax.models import build_decoder, open_model
from exl2jax.stream.chunks import row_spans
from exl2jax.stream.forward import head_logits

MISSING = "lm-evaluation-harness is not installed; get it with: pip install 'exl2jax[harness]'"
BUCKET = 32
"""Rows are padded to multiples of this: few compilations, little waste."""
MAX_NEW_TOKENS = 64


class Scorer:
    """Likelihoods and greedy continuations of a Hugging Face or EXL2 directory, from text."""

    def __init__(self, directory: Path) -> None:
        """Open the directory; weights are read pass by pass."""
        self.directory = directory
        self.model = open_model(directory)
        self.tokenizer = load_tokenizer(directory)
        self.context = self.model.config.max_position
        self._resident: ResidentModel | None = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """`log p(continuation | context)` in nats and whether greedy decoding would give it, for each pair."""
        return self._score_ids([self._split(*pair) for pair in pairs])

    def score_whole(self, texts: Sequence[str]) -> list[float]:
        """`log p(text)` of each text, every token once, windows of the model's context following each other."""
        owners, windows = [], []
        for owner, text in enumerate(texts):
            ids = self.tokenizer.encode(text).tolist()
            step = self.context - 1
            for start in range(0, len(ids), step):
                before = [ids[start - 1] if start else self._first()]
                owners.append(owner)
                windows.append((before, ids[start : start + step]))
        totals = [0.0] * len(texts)
        for owner, (value, _) in zip(owners, self._score_ids(windows), strict=True):
            totals[owner] += value
        return totals

    def complete(self, prompt: str, stops: Sequence[str], new_tokens: int) -> str:
        """Greedy continuation until a stop text, an end token or `new_tokens`."""
        resident = self._resident = self._resident or load_resident(self.directory, self.tokenizer)
        ids = [self._first(), *self.tokenizer.encode(prompt).tolist()]
        kept = ids[-max(1, self.context - new_tokens) :]
        return generate(resident, kept, Sampling(new_tokens=new_tokens), stops=stops).text

    def _first(self) -> int:
        """The token before a text without a context: the beginning of text, or else its end, or else token 0."""
        known = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        return next((i for i in known if i is not None), 0)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both parts; white space at the border belongs to the continuation, as the harness has it."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        whole = self.tokenizer.encode(bare + continuation).tolist()
        count = len(self.tokenizer.encode(bare))
        return whole[:count] or [self._first()], whole[count:]

    def _score_ids(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score pairs of ids, those of one padded length together."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = [(context + continuation)[-(self.context + 1) :] for context, continuation in pairs]
        lengths = [-(-len(row) // BUCKET) * BUCKET for row in rows]
        for length in sorted(set(lengths)):
            members = [i for i, n in enumerate(lengths) if n == length]
            ids = np.zeros((len(members), length), np.int32)
            for place, i in enumerate(members):
                ids[place, : len(rows[i])] = rows[i]
            for i, log_p, row in zip(members, self._log_probabilities(ids), ids, strict=True):
                count = len(pairs[i][1])
                at = np.arange(len(rows[i]) - count, len(rows[i]))
                wanted, chances = row[at], log_p[at - 1]
                greedy = bool((np.argmax(chances, axis=-1) == wanted).all())
                out[i] = float(np.sum(chances[np.arange(count), wanted], dtype=np.float64)), greedy
        return out

    def _log_probabilities(self, ids: np.ndarray) -> Iterable[np.ndarray]:
        """Log probabilities `[T, vocab]` of each row's next tokens, float64, a chunk of rows at a time."""
        states, params = final_states(self.model, ids), self.model.head_params()
        decoder = build_decoder(self.model.config)
        for span in row_spans(*states.shape):
            logits = np.asarray(head_logits(decoder, params, span.of(states)), np.float64)
            peak = logits.max(axis=-1, keepdims=True)
            log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))
            yield from log_p[: span.real]


def harness_model(directory: Path) -> Any:
    """The directory as a model of lm-evaluation-harness (`lm_eval.api.model.LM`)."""
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise SettingsError(MISSING) from e
    scorer = Scorer(directory)

    class JaxLM(LM):
        """The three requests of the harness, answered by the directory."""

        @property
        def tokenizer_name(self) -> str:
            """The name by which the harness keeps cached prompts apart."""
            return str(directory)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """`(log p, greedy)` of each `(context, continuation)`."""
            return scorer.score([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """`log p` of each text."""
            return scorer.score_whole([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Greedy continuation of each prompt."""
            return [_generate(scorer, *request.args) for request in requests]

    return JaxLM()


def _generate(scorer: Scorer, prompt: str, settings: dict[str, Any]) -> str:
    if settings.get("do_sample") or settings.get("temperature"):
        raise SettingsError("lm-evaluation-harness: this task draws at random; only greedy tasks run here")
    stops = settings.get("until") or []
    limit = int(settings.get("max_gen_toks") or MAX_NEW_TOKENS)
    return scorer.complete(prompt, [stops] if isinstance(stops, str) else list(stops), limit)


def run_tasks(directory: Path, tasks: Sequence[Any], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Figures of each task (a name the harness knows, a task's YAML file or a task object) on a directory."""
    model = harness_model(directory)
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    found = simple_evaluate(model=model, tasks=list(tasks), limit=limit, bootstrap_iters=0, verbosity=None)
    if found is None:  # pragma: no cover  (the harness says so for ranks above 0, which there are none of)
        raise SettingsError("lm-evaluation-harness gave no result")
    return {
        task: {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in found.get("results", {}).items()
    }
