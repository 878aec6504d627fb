"""The table and the plot of the comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOMAINS = ("web", "code")

Record = dict[str, Any]  # what `frontier.py` keeps of a format: figures, or `failure` and why


def table(records: Sequence[Record]) -> str:
    """The records as Markdown; a format that did not run says why."""
    figures = [f"{figure} {name}" for figure in ("KL", "ppl", "top-1") for name in DOMAINS]
    heads = ["format", "bits per decoder weight", "MB in all", *figures, "CPU s", "holds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(_line(record, len(heads)) for record in records)])


def _line(record: Record, columns: int) -> str:
    if "failure" in record:
        cells = [record["label"], *["–"] * (columns - 2), f"not run: {_plain(record['failure'])}"]
        return f"| {' | '.join(cells)} |"
    found = [record["domains"][name] for name in DOMAINS]
    cells = [record["label"], f"{record['bpw']:.3f}", f"{record['file_bytes'] / 1e6:.1f}"]
    cells += [f"{d['kl']:.4f} ± {d['kl_error']:.4f}" for d in found]
    cells += [f"{d['perplexity']:.2f}" for d in found] + [f"{d['top1']:.3f}" for d in found]
    cells += [" + ".join(f"{seconds:.0f}" for seconds in record["cpu_seconds"]) or "–", _plain(record.get("note", ""))]
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that can stand in a cell."""
    return " ".join(text.replace("|", "/").split())


def plot(records: Sequence[Record], path: Path) -> None:
    """KL divergence against bits per decoder weight and against bytes of the file, a line per family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    judged = [record for record in records if "failure" not in record]
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, domain in zip(axes, DOMAINS, strict=True):
        for axis, (name, label, scale) in zip(row, _AXES, strict=True):
            for family in dict.fromkeys(record["family"] for record in judged):
                points = sorted(
                    (r[name] / scale, r["domains"][domain]["kl"], r["domains"][domain]["kl_error"])
                    for r in judged
                    if r["family"] == family
                )
                size, kl, error = zip(*points, strict=True)
                axis.errorbar(size, kl, error, marker="o", markersize=4, capsize=2, label=family)
            axis.set(title=f"{domain} rows", xlabel=label, yscale="log", ylabel="KL to full precision, nats per token")
            axis.grid(alpha=0.3, which="both")
    if judged:
        axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


_AXES = (("bpw", "bits per decoder weight", 1.0), ("file_bytes", "MB of all weights", 1e6))
