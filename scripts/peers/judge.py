"""The judgement that every format gets: our evaluation of a directory on the held-out rows."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from exl2jax.evaluation.logits import final_states
from exl2jax.models import build_decoder, open_model
from exl2jax.stream.scoring import perplexity, score


class Judge:
    """The source's predictions on the held-out rows, made once: web in the first half, code in the second."""

    def __init__(self, model: Path, heldout: Path) -> None:
        """Run the source."""
        self.ids = load_file(heldout)["input_ids"].astype(np.int32)
        half = len(self.ids) // 2
        self.domains = {"web": slice(0, half), "code": slice(half, None)}
        full = open_model(model)
        self.reference = (full.head_params(), final_states(full, self.ids))

    def domains_of(self, directory: Path) -> dict[str, dict[str, float]]:
        """By domain: KL from the source with its standard error over rows, perplexity, agreement on the first token."""
        model = open_model(directory)
        states = final_states(model, self.ids)
        scores = score(build_decoder(model.config), model.head_params(), states, self.ids, self.reference)
        assert scores.kl is not None and scores.agree is not None  # a reference was given
        found: dict[str, Any] = {}
        for name, part in self.domains.items():
            by_row = scores.kl[part].mean(axis=1, dtype=np.float64)
            found[name] = {
                "kl": float(by_row.mean()),
                "kl_error": float(by_row.std(ddof=1) / np.sqrt(len(by_row))),
                "perplexity": perplexity(scores.nll[part]),
                "top1": float(scores.agree[part].mean()),
            }
        return found
