"""The model card: a head that the Hub reads, a table of what was measured, and how to load and to make the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from exl2jax.exl2.copying import CARD_FILE
from exl2jax.hub.record import CONTEXT, SizeRecord, read_record
from exl2jax.report.plots import LIGHT, Plot, Theme, label, render
from exl2jax.storage import write_bytes

CARD, PLOT = CARD_FILE, "kl.png"
NAMES = (CARD, PLOT)


def write_size_card(record: SizeRecord, directory: Path) -> None:
    """The card of one size in its directory."""
    write_bytes(directory / CARD, card_text([record]).encode())


def write_set_card(records: Sequence[SizeRecord], folder: Path) -> None:
    """The card of a set, with a plot where two sizes or more were evaluated."""
    records = sorted(records, key=lambda record: (record.bits, record.head_bits))
    if _plotted(records):
        write_bytes(folder / PLOT, render(_plot(records), LIGHT, "png"))
    write_bytes(folder / CARD, card_text(records, plot=_plotted(records), branches=True).encode())


def read_sizes(directories: Sequence[Path]) -> list[SizeRecord]:
    """The records in directories; those without one are left out."""
    return [record for directory in directories if (record := read_record(directory)) is not None]


def card_text(records: Sequence[SizeRecord], *, plot: bool = False, branches: bool = False) -> str:
    """The whole card; nothing stands in it that was not measured or computed for these files."""
    first = records[0]
    title = f"{first.name}, EXL2" if len(records) > 1 or branches else f"{first.name}, EXL2 at {first.bits:g} bits"
    parts = [
        f"---\n{_head(first)}\n---\n",
        f"# {title}\n",
        _origin(first),
        _table(records),
        f"![KL divergence against size]({PLOT})\n" if plot else "",
        _domain_table(records),
        _loading(first, branches=branches),
        _making(records),
    ]
    return "\n".join(part for part in parts if part)


def _head(record: SizeRecord) -> str:
    """The metadata in YAML: what the source's card says, and what was made of it."""
    from huggingface_hub import ModelCardData

    given: dict[str, Any] = dict(record.metadata)
    tags = given.pop("tags", None)
    tags = [str(tag) for tag in tags] if isinstance(tags, list) else []
    if record.base_model:
        given |= {"base_model": record.base_model, "base_model_relation": "quantized"}
    if record.quantized_by:
        given["quantized_by"] = record.quantized_by
    given["tags"] = [*(tag for tag in tags if tag != "exl2"), "exl2"]
    return ModelCardData(**given, ignore_metadata_errors=True).to_yaml().strip()


def _origin(record: SizeRecord) -> str:
    source = f"`{record.base_model}`" if record.base_model else record.name
    commit = f" at commit `{record.revision}`" if record.revision else ""
    return (
        f"{source}{commit}, quantized to EXL2 with exl2jax {record.versions['exl2jax']}. It loads in\n"
        "[ExLlamaV2](https://github.com/turboderp-org/exllamav2) and "
        "[TabbyAPI](https://github.com/theroyallab/tabbyAPI).\n"
    )


def _table(records: Sequence[SizeRecord]) -> str:
    evaluated = any(record.evaluation for record in records)
    header = ["bits per weight", "head", "GB", f"GB with {CONTEXT // 1024}k cache"]
    header += ["perplexity", "KL divergence", "top-1 agreement"] if evaluated else []
    rows = [[*_sizes(record), *(_figures(record) if evaluated else [])] for record in records]
    notes = [
        f"GB are 10^9 bytes of the weight files; the cache is computed for {CONTEXT} tokens of keys and values in half "
        "precision. A loader needs some working memory on top."
    ]
    if evaluated:
        first = next(record for record in records if record.evaluation)
        tokens, source = first.figure("tokens"), first.source_perplexity
        notes.append(
            f"Perplexity, KL divergence from the source (nats per token) and top-1 agreement were measured on {tokens} "
            f"tokens of {first.evaluated_on}; the source has a perplexity of {source:.2f} there."
        )
    else:
        notes.append("No quality was measured.")
    return _markdown(header, rows) + "\n" + " ".join(notes) + "\n"


def _sizes(record: SizeRecord) -> list[str]:
    return [f"{record.bpw:.2f}", str(record.head_bits), f"{record.bytes / 1e9:.3g}", f"{record.memory / 1e9:.3g}"]


def _figures(record: SizeRecord) -> list[str]:
    formats = {"perplexity": ".2f", "kl_divergence": ".4f", "top1_agreement": ".1%"}
    found = {name: record.figure(name) for name in formats}
    return ["not measured" if value is None else f"{value:{formats[name]}}" for name, value in found.items()]


def _domain_table(records: Sequence[SizeRecord]) -> str:
    domains = next((record.domains for record in records if record.domains), ())
    if not domains:
        return ""
    rows = []
    for record in records:
        values = [record.figure("kl_divergence", domain) for domain in domains]
        rows.append([f"{record.bpw:.2f}", *("not measured" if v is None else f"{v:.4f}" for v in values)])
    return "KL divergence by kind of text:\n\n" + _markdown(["bits per weight", *domains], rows)


def _loading(record: SizeRecord, *, branches: bool) -> str:
    folder = f"{record.name}-exl2"
    revision = f" --revision {record.bits:g}bpw" if branches else ""
    said = "Each size is a branch, named by its bits. " if branches else ""
    return f"""## Load it

{said}Download:

```
hf download USER/REPOSITORY{revision} --local-dir models/{folder}
```

ExLlamaV2:

```python
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator

config = ExLlamaV2Config("models/{folder}")
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, max_seq_len=8192, lazy=True)
model.load_autosplit(cache)
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=ExLlamaV2Tokenizer(config))
print(generator.generate(prompt="Once upon a time,", max_new_tokens=100))
```

TabbyAPI, in `config.yml`:

```yaml
model:
  model_dir: models
  model_name: {folder}
  max_seq_len: 8192
```
"""


def _making(records: Sequence[SizeRecord]) -> str:
    first = records[0]
    commands = "\n".join(record.command for record in records)
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    prints = _markdown(["what", "SHA-256"], [[k, f"`{v}`"] for k, v in first.fingerprints.items()])
    files = [[f"{r.bits:g}", n, f"`{v}`"] for r in records for n, v in r.files.items()]
    return f"""## Make the same bytes again

```
{commands}
```

Versions: {versions}. Seed: {first.seed}. The same versions on the same kind of machine
give the same bytes. What went in:

{prints}
What came out:

{_markdown(["bits", "file", "SHA-256"], files)}"""


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plotted(records: Sequence[SizeRecord]) -> bool:
    return sum(record.evaluation is not None for record in records) > 1


def _plot(records: Sequence[SizeRecord]) -> Plot:
    """KL divergence against size, each point with its bits."""
    points = [(r.bytes / 1e9, r.figure("kl_divergence") or 0.0, f"{r.bits:g}") for r in records if r.evaluation]

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        for x, y, bits in points:
            axes.annotate(f" {bits} bpw", (x, y), color=theme.ink, va="bottom")
        label(axes, "GB of weights", "KL divergence, nats per token", log=all(y > 0 for _, y, _ in points))

    rows = [(bits, f"{x:.3f}", f"{y:.4f}") for x, y, bits in points]
    return Plot(
        name="kl", title="KL divergence against size", alt="KL divergence against size", draw=draw,
        header=("bits", "GB", "KL"), rows=rows,
    )  # fmt: skip
