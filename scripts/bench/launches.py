"""Count what a compiled program launches on a GPU, from XLA's text of it."""

import re
from collections.abc import Iterator
from typing import NamedTuple

NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "after-all", "partition-id"}
"""Instructions that start nothing on the device."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?([a-z][a-z\-]*)\((?=[%)\w\s/{-])")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Launches(NamedTuple):
    """Launches of one run of a program, and its loops whose length only the run knows; each counts as one round."""

    total: int
    unknown_loops: int = 0


def launches(text: str) -> Launches:
    """The launches of a program: a loop of known length counts every round, a conditional its longest branch."""
    bodies, entry = _computations(text)
    return _of(bodies, entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith("  "):
            bodies[name].append(line)
    return bodies, entry


def _of(bodies: dict[str, list[str]], name: str) -> Launches:
    total, unknown = 0, 0
    for line in bodies[name]:
        found = _INSTRUCTION.match(line)
        kind = found[1] if found else ""
        if kind in NOTHING or not kind:
            continue
        if kind in ("while", "conditional", "call"):
            times = _TRIPS.search(line) if kind == "while" else None
            inner = [_of(bodies, called) for called in _called(line, kind, counted=times is not None)]
            trips = int(times[1]) if times else 1
            pieces = inner if kind == "while" else inner[:1] if kind == "call" else [max(inner, default=Launches(0))]
            total += trips * sum(piece.total for piece in pieces)
            unknown += sum(piece.unknown_loops for piece in pieces) + (kind == "while" and times is None)
        else:
            total += 1
    return Launches(total, unknown)


def _called(line: str, kind: str, counted: bool) -> Iterator[str]:
    """The computations that an instruction runs; XLA does not ask the condition of a loop whose rounds it `counted`."""
    if kind == "while":
        yield from re.findall(r"body=%?([\w.\-]+)" if counted else r"(?:condition|body)=%?([\w.\-]+)", line)
    elif kind == "call":
        yield from re.findall(r"to_apply=%?([\w.\-]+)", line)
    else:
        for names in re.findall(r"branch_computations=\{([^}]*)\}", line):
            yield from re.findall(r"[\w.\-]+", names)
        yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
