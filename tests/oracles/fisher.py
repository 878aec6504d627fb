"""A Llama model's log likelihood in float64 with one number added to one linear's output, and what follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.oracles.llama import attend, linear, log_softmax, rms_norm


class Probe(NamedTuple):
    """`amount` added to output `column` of linear `name` of module `module` at token `token`."""

    module: int
    name: str
    token: int
    column: int
    amount: float


@dataclass(frozen=True)
class Llama:
    """A whole model: `(kind, params)` of its modules in order, the head's params, and what else a forward needs."""

    modules: Sequence[tuple[str, Mapping[str, Any]]]
    head: Mapping[str, Any]
    heads: int
    kv_heads: int
    eps: float
    frequencies: np.ndarray

    def log_probabilities(self, h: np.ndarray, probe: Probe | None = None) -> np.ndarray:
        """Of the next token after each of the tokens of one row, whose embeddings are `h [T, D]`."""
        h = np.asarray(h, np.float64)
        for index, (kind, params) in enumerate(self.modules):
            mine = probe if probe is not None and probe.module == index else None
            h = h + self._module(kind, params, rms_norm(h, params["norm"]["weight"], self.eps), mine)
        return log_softmax(linear(self.head["lm_head"], rms_norm(h, self.head["norm"]["weight"], self.eps)))

    def _module(self, kind: str, params: Mapping[str, Any], x: np.ndarray, probe: Probe | None) -> np.ndarray:
        def output(name: str, x: np.ndarray) -> np.ndarray:
            y = linear(params[name], x)
            if probe is not None and probe.name == name:
                y[probe.token, probe.column] += probe.amount
            return y

        if kind == "mlp":
            gate = output("gate_proj", x)
            return output("down_proj", gate / (1 + np.exp(-gate)) * output("up_proj", x))
        q, k, v = (output(name, x) for name in ("q_proj", "k_proj", "v_proj"))
        return output("o_proj", attend(q, k, v, self.heads, self.kv_heads, self.frequencies, 1.0))


def slope(model: Llama, h: np.ndarray, labels: np.ndarray, mask: np.ndarray, probe: Probe) -> float:
    """Central difference of the log likelihood of `labels [T]`, those under `mask [T]`, in the direction of a probe."""

    def likelihood(amount: float) -> float:
        log_p = model.log_probabilities(h, probe._replace(amount=amount))
        return float(sum(m * log_p[t, label] for t, (label, m) in enumerate(zip(labels, mask, strict=True))))

    return (likelihood(probe.amount) - likelihood(-probe.amount)) / (2 * probe.amount)
