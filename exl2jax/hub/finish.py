"""The end of a conversion: figures on held-out text where they are wanted, records and cards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.sizes import SizeOutcome
from exl2jax.evaluation import Evaluation
from exl2jax.hub.card import write_set_card, write_size_card
from exl2jax.hub.record import SizeRecord, evaluate_sizes, record_size, write_record


@dataclass(frozen=True, kw_only=True, slots=True)
class CardWishes:
    """The user's wishes for cards; `evaluate` of None evaluates sets and not single sizes."""

    card: bool = True
    evaluate: bool | None = None
    base_model: str | None = None
    quantized_by: str | None = None

    def over(self, earlier: Mapping[str, Any]) -> "CardWishes":
        """These wishes, with those of an earlier command wherever these leave the default."""
        own = {name: value for name, value in asdict(self).items() if value != getattr(CardWishes(), name)}
        return CardWishes(**{**earlier, **own})


def finish_size(config: ConversionConfig, result: ConversionResult, wishes: CardWishes) -> Evaluation | None:
    """The record and the card of a finished directory, and its figures where they are wanted; nothing without one."""
    if config.compile_full is None or config.output_measurement is not None:
        return None
    found = evaluate_sizes(config.in_dir, [config.compile_full])[0] if wishes.evaluate else None
    if wishes.card:
        _write(_record(config, result, found, wishes), config.compile_full)
    return None if found is None else found[0]


def finish_set(
    base: ConversionConfig, outcomes: Sequence[SizeOutcome], wishes: CardWishes
) -> Mapping[Path, Evaluation]:
    """Cards of the sizes with their figures, and the card of the set in the work directory; returns the figures."""
    made = [each for each in outcomes if each.config is not None and each.config.compile_full is not None]
    folders = [each.config.compile_full for each in made if each.config and each.config.compile_full]
    found: list[tuple[Evaluation, float]] = []
    if wishes.evaluate is not False and folders:
        found = evaluate_sizes(base.in_dir, folders)
    figures = dict(zip(folders, found, strict=False))
    if wishes.card and folders:
        records = []
        for each, folder in zip(made, folders, strict=True):
            assert each.config is not None and each.result is not None
            records.append(_record(each.config, each.result, figures.get(folder), wishes))
            _write(records[-1], folder)
        write_set_card(records, base.out_dir)
    return {folder: evaluation for folder, (evaluation, _) in figures.items()}


def _record(
    config: ConversionConfig, result: ConversionResult, found: tuple[Evaluation, float] | None, wishes: CardWishes
) -> SizeRecord:
    return record_size(config, result, found, base_model=wishes.base_model, quantized_by=wishes.quantized_by)


def _write(record: SizeRecord, folder: Path) -> None:
    write_record(record, folder)
    write_size_card(record, folder)
