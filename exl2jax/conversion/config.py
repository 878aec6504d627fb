"""The settings of a conversion, one frozen record: each is declared here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exl2jax.allocate.limits import Limits
from exl2jax.calibration import CalibrationConfig, Examples
from exl2jax.calibration.source import KNOWN
from exl2jax.conversion.declaration import Decides, check_all, declare
from exl2jax.errors import SettingsError
from exl2jax.ops import Products
from exl2jax.qparams import FORMAT_BITS
from exl2jax.stock_tables import HEAD
from exl2jax.stream.devices import natural_products
from exl2jax.variants import Choice, choose
from exl2jax.variants.recipe import DEFAULT_PRESET, PRESETS, Recipe, find_recipe, parse_choices

DEFAULT_SOLVER = "exact"
MEASUREMENT, QUANTIZATION, OUTPUT, RUN = Decides
PRESET_NAMES = f"{', '.join(PRESETS)} (stock: ExLlamaV2's own algorithm)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """Settings of a conversion; names and defaults are those of the stock converter where it has the setting.

    Every field documents itself in its declaration. `cal_dataset` also takes texts or token rows themselves, and
    `preset` also takes a `Recipe`. Raises `SettingsError` for values out of range and for contradictions.
    """

    out_dir: Path = field(
        metadata=declare("Work directory; an existing job in it is resumed.", RUN, short="o", recorded=False)
    )
    in_dir: Path = field(
        metadata=declare(
            "Source model: a directory, or ORG/NAME[@REVISION]; not needed to resume.",
            MEASUREMENT,
            short="i",
            by_content=True,
        )
    )
    no_resume: bool = field(
        default=False, metadata=declare("Start over, clearing the job.", RUN, short="nr", recorded=False)
    )
    compile_full: Path | None = field(
        default=None, metadata=declare("Directory for the complete EXL2 model.", OUTPUT, short="cf")
    )
    cal_dataset: str | Path | Examples | None = field(
        default=None,
        metadata=declare(
            f"Calibration source: {KNOWN}; mixed as A:60,B:40.",
            MEASUREMENT,
            short="c",
            unset="standard",
            by_content=True,
        ),
    )
    cal_columns: tuple[str, ...] = field(
        default=(), metadata=declare("Column of Parquet, field of JSON.", MEASUREMENT, long="cal-column")
    )
    cal_dir: Path | None = field(
        default=None, metadata=declare("Folder with local copies of the named sets.", MEASUREMENT, long="cal-dir")
    )
    cal_split: str = field(
        default="train",
        metadata=declare(
            "Split of the named sets: train or validation.",
            MEASUREMENT,
            long="cal-split",
            choices=("train", "validation"),
        ),
    )
    cal_noise_rows: int | None = field(
        default=None,
        metadata=declare(
            "Rows of noise in embedding space, beside the standard set.",
            MEASUREMENT,
            long="cal-noise-rows",
            unset="by the architecture",
            low=0,
        ),
    )
    cal_fill: bool | None = field(
        default=None,
        metadata=declare(
            "Let the model write the rows that the texts of a standard set cannot fill.",
            MEASUREMENT,
            long="cal-fill",
            unset="for the built-in set",
        ),
    )
    bits: float = field(
        default=4.125,
        metadata=declare("Target bits per weight.", QUANTIZATION, short="b", low=FORMAT_BITS[0], high=FORMAT_BITS[-1]),
    )
    head_bits: int = field(
        default=6,
        metadata=declare("Bits of the head: 2, 3, 4, 5, 6 or 8.", QUANTIZATION, short="hb", choices=tuple(HEAD)),
    )
    shard_size: float = field(
        default=8192, metadata=declare("Largest shard in MB; 0 for one file.", OUTPUT, short="ss", low=0)
    )
    rope_scale: float | None = field(
        default=None,
        metadata=declare("Rotary position scale.", MEASUREMENT, short="rs", unset="the model's", above=0),
    )
    rope_alpha: float | None = field(
        default=None, metadata=declare("Rotary NTK alpha.", MEASUREMENT, short="ra", unset="the model's", above=0)
    )
    output_measurement: Path | None = field(
        default=None, metadata=declare("Only measure, and write the file here.", OUTPUT, short="om")
    )
    measurement: Path | None = field(
        default=None,
        metadata=declare("Use this measurement file, ours or stock's.", QUANTIZATION, short="m", by_content=True),
    )
    dataset_rows: int | None = field(
        default=None,
        metadata=declare("Calibration rows.", QUANTIZATION, short="r", unset="115 built-in, else 100", low=1),
    )
    measurement_rows: int | None = field(
        default=None,
        metadata=declare("Measurement rows.", MEASUREMENT, short="mr", unset="19 built-in, else 16", low=1),
    )
    length: int | None = field(
        default=None,
        metadata=declare("Tokens of a calibration row.", QUANTIZATION, short="l", unset="2048", low=2),
    )
    measurement_length: int | None = field(
        default=None,
        metadata=declare("Tokens of a measurement row.", MEASUREMENT, short="ml", unset="2048", low=2),
    )
    seed: int = field(default=0, metadata=declare("Seed of every random choice.", MEASUREMENT, low=0))
    preset: str | Recipe = field(
        default=DEFAULT_PRESET,
        metadata=declare(f"The algorithm: {PRESET_NAMES}.", MEASUREMENT, by_content=True),
    )
    variants: tuple[str, ...] = field(
        default=(),
        metadata=declare(
            "A choice in place of the preset's: FIELD=VALUE of the recipe, or KIND=NAME or "
            "KIND=NAME:SETTING=VALUE,... of a registered variant.",
            MEASUREMENT,
            long="variant",
            by_content=True,
        ),
    )
    pins: tuple[str, ...] = field(
        default=(),
        metadata=declare("PATTERN=BITS: one width for the linears named so.", QUANTIZATION, long="pin"),
    )
    exclude_bits: tuple[int, ...] = field(
        default=(), metadata=declare("A width that nothing may have.", QUANTIZATION, long="exclude-bits")
    )
    moe_calibration: str = field(
        default="routed",
        metadata=declare(
            "Tokens to calibrate an expert on: routed, or all.",
            MEASUREMENT,
            long="moe-calibration",
            choices=("routed", "all"),
        ),
    )
    products: str | None = field(
        default=None,
        metadata=declare(
            "Products of the passes over hidden states: float32 or bfloat16.",
            MEASUREMENT,
            unset="what the processor is made for",
            choices=tuple(Products),
            by_content=True,
        ),
    )
    checkpoint_interval: float = field(
        default=180,
        metadata=declare("Least seconds between checkpoints; 0: every module.", RUN, long="checkpoint-interval", low=0),
    )
    devices: int | None = field(
        default=None,
        metadata=declare("Devices to spread rows and linears over.", RUN, unset="all", low=1, recorded=False),
    )

    device_memory: float | None = field(
        default=None,
        metadata=declare(
            "GB of a device for hidden states.",
            RUN,
            long="device-memory",
            unset="half of what is free",
            low=0,
            recorded=False,
        ),
    )

    def __post_init__(self) -> None:
        """Check every setting that can be checked without reading a file."""
        check_all(self)
        _ = self.limits
        self._check_source()
        self._check_recipe()
        if self.output_measurement is not None and self.compile_full is not None:
            raise SettingsError("`output_measurement` stops before there is anything for `compile_full`")
        if self.output_measurement is not None and self.measurement is not None:
            raise SettingsError("`output_measurement` makes a measurement; `measurement` already is one")
        self._check_directories()

    @property
    def precision(self) -> Products:
        """The products of the passes over hidden states; where they are not given, those of the machine."""
        return natural_products() if self.products is None else Products(self.products)

    @property
    def recipe(self) -> Recipe:
        """The algorithm's choices: the preset, or the recipe given in its place, with `variants` laid over it."""
        recipe = find_recipe(self.preset) if isinstance(self.preset, str) else self.preset
        return recipe.with_choices(parse_choices(self.variants)) if self.variants else recipe

    @property
    def solver(self) -> Choice:
        """The solver of the row-wise allocation."""
        return self.recipe.chosen("solver") or choose("solver", DEFAULT_SOLVER)

    @property
    def limits(self) -> Limits:
        """The limits on widths that `pins` and `exclude_bits` set."""
        return Limits.parse(self.pins, self.exclude_bits)

    @property
    def routed_only(self) -> bool:
        """Whether experts are calibrated on the tokens routed to them only."""
        return self.moe_calibration == "routed"

    @property
    def cal_name(self) -> str:
        """The name of the calibration source, with every choice about it that differs from the default."""
        return self.calibration(measure=False).name

    def calibration(self, *, measure: bool) -> CalibrationConfig:
        """The calibration rows of a pass."""
        plain = CalibrationConfig()
        return CalibrationConfig(
            source=plain.source if self.cal_dataset is None else self.cal_dataset,
            rows=self.measurement_rows if measure else self.dataset_rows,
            length=self.measurement_length if measure else self.length,
            seed=self.seed,
            measure=measure,
            columns=self.cal_columns,
            cal_dir=self.cal_dir,
            split=self.cal_split,
            noise_rows=self.cal_noise_rows,
            fill_with_self=self.cal_fill,
        )

    def _check_source(self) -> None:
        """Refuse a calibration source that is a record of settings."""
        if isinstance(self.cal_dataset, CalibrationConfig):
            raise SettingsError(
                "`cal_dataset` is the source alone; give the rest as `cal_columns`, `cal_dir`, `cal_split`, "
                "`cal_noise_rows`, `cal_fill`, `dataset_rows`, `length` and `seed`"
            )

    def _check_recipe(self) -> None:
        """Refuse a recipe that does not fit the other settings."""
        recipe, solver = self.recipe, self.solver
        if recipe.tuning is not None and self.dataset_rows is not None and self.dataset_rows < 2:
            raise SettingsError(f"`dataset_rows` is {self.dataset_rows}; tuning holds rows out and needs at least 2")
        if recipe.objective is not None and solver.name == "annealing":
            raise SettingsError("`variants`: annealing picks an objective of its own; take the solver exact with one")
        # By a measurement that holds accuracies only, rows are chosen whatever the recipe.
        by_linear = recipe.pricing != "accuracy" and recipe.table is None and self.measurement is None
        if by_linear and solver.name != DEFAULT_SOLVER:
            raise SettingsError(
                f"`variants`: the solver {solver.name} chooses among rows of candidates, and {recipe.name} has none; "
                "take `preset` stock or candidates=stock"
            )
        if self.measurement is not None and recipe.pricing == "accuracy" and recipe.table is not None:
            raise SettingsError("`measurement` holds its own candidates; leave the variant candidates out, or measure")

    def _check_directories(self) -> None:
        """Refuse directories that would overwrite each other."""
        source = self.in_dir.resolve()
        directories: Sequence[tuple[str, Path | None]] = (
            ("out_dir", self.out_dir),
            ("compile_full", self.compile_full),
        )
        for name, path in directories:
            if path is not None and path.resolve() == source:
                raise SettingsError(f"`{name}` is the source model's own directory; choose another")
        if self.compile_full is not None and self.compile_full.resolve() == self.out_dir.resolve():
            raise SettingsError("`compile_full` and `out_dir` must be different directories")
