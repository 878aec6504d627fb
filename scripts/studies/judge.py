"""The judgement of a directory: its predictions on held-out rows against those of the source, by domain."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from exl2jax.evaluation.logits import final_states
from exl2jax.models import build_decoder, open_model
from exl2jax.stream.scoring import perplexity, score


class Judge:
    """The held-out rows `ids [R, T]`, the slice of each domain, and the source's predictions, made once when needed."""

    def __init__(self, model: Path, ids: np.ndarray, domains: Mapping[str, slice]) -> None:
        """Keep the rows; nothing is run yet."""
        self.model, self.ids, self.domains = model, ids, domains

    @cached_property
    def _reference(self) -> tuple[Any, np.ndarray]:
        full = open_model(self.model)
        return full.head_params(), final_states(full, self.ids)

    def domains_of(self, directory: Path) -> dict[str, dict[str, float]]:
        """Perplexity, KL divergence with its standard error over rows, and agreement of either kind of directory."""
        model = open_model(directory)
        states = final_states(model, self.ids)
        scores = score(build_decoder(model.config), model.head_params(), states, self.ids, self._reference)
        assert scores.kl is not None and scores.agree is not None  # a reference was given
        found = {}
        for name, part in self.domains.items():
            by_row = scores.kl[part].mean(axis=1, dtype=np.float64)
            found[name] = {
                "perplexity": perplexity(scores.nll[part]),
                "kl": float(by_row.mean()),
                "kl_error": float(by_row.std(ddof=1) / np.sqrt(len(by_row))),
                "top1": float(scores.agree[part].mean()),
            }
        return found


def halves(path: Path | str) -> tuple[np.ndarray, dict[str, slice]]:
    """The held-out rows, and the slice of each domain: web in the first half, code in the second."""
    ids = load_file(path)["input_ids"].astype(np.int32)
    return ids, {"web": slice(0, len(ids) // 2), "code": slice(len(ids) // 2, None)}
