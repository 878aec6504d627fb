"""What the user asked for: one frozen record with the stock converter's settings and defaults."""

from dataclasses import dataclass, replace
from pathlib import Path

from exl2jax.allocate.limits import Limits
from exl2jax.calibration import CalibrationConfig, Examples
from exl2jax.errors import SettingsError
from exl2jax.qparams import FORMAT_BITS
from exl2jax.stock_tables import head_qparams
from exl2jax.variants import Choice, choose
from exl2jax.variants.recipe import DEFAULT_PRESET, Recipe, find_recipe

DEFAULT_SOLVER = "exact"
MOE_CALIBRATIONS = ("routed", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """Settings of a conversion; names and defaults are those of the stock flags.

    `cal_dataset` is the name of a source, texts or token rows themselves, or a `CalibrationConfig` with everything
    that can be said about a source (its rows, length, seed and pass stay unsaid: they are settings here); None takes
    the built-in set. `dataset_rows` and `measurement_rows` of None take what the source calls
    for (115 and 19 rows of the built-in set, 100 and 16 of others), and so do lengths of None (that of ready rows, else
    2048 tokens, at most the model's context). `preset` is a recipe or the name of one (`best`, `fast`, `stock`);
    `with_accuracies` measures stock's accuracies whatever the recipe; `allocation` is the solver of the stock recipe,
    `exact` or `annealing`; `moe_calibration` says which tokens an expert is calibrated on: those `routed` to it, or
    `all`; `pins` (`PATTERN=BITS` over the keys of linears) and `exclude_bits` limit the widths to choose from;
    `checkpoint_interval` is in seconds, 0 checkpoints after every module; `devices` is how many to use, all for None;
    `device_memory` is how many GB of a device the hidden states may take, None for a share of its free memory.
    Raises `SettingsError` on contradictions.
    """

    in_dir: Path
    out_dir: Path
    compile_full: Path | None = None
    cal_dataset: str | Path | Examples | CalibrationConfig | None = None
    bits: float = 4.125
    shard_size: float = 8192
    rope_scale: float | None = None
    rope_alpha: float | None = None
    head_bits: int = 6
    output_measurement: Path | None = None
    measurement: Path | None = None
    dataset_rows: int | None = None
    measurement_rows: int | None = None
    length: int | None = None
    measurement_length: int | None = None
    no_resume: bool = False
    seed: int = 0
    preset: str | Recipe = DEFAULT_PRESET
    with_accuracies: bool = False
    allocation: str = DEFAULT_SOLVER
    pins: tuple[str, ...] = ()
    exclude_bits: tuple[int, ...] = ()
    checkpoint_interval: float = 180.0
    moe_calibration: str = "routed"
    devices: int | None = None
    device_memory: float | None = None

    def __post_init__(self) -> None:
        """Check every setting that can be checked without reading a file."""
        low, high = FORMAT_BITS[0], FORMAT_BITS[-1]
        if not low <= self.bits <= high:
            raise SettingsError(f"-b/--bits is {self.bits}; it must lie between {low} and {high}")
        head_qparams(self.head_bits)
        _ = self.limits
        self._check_allocation()
        if self.recipe.tuning is not None and self.dataset_rows is not None and self.dataset_rows < 2:
            raise SettingsError(f"-r/--dataset_rows is {self.dataset_rows}; tuning holds rows out and needs at least 2")
        if self.output_measurement is not None and self.compile_full is not None:
            raise SettingsError("-om/--output_measurement stops before there is anything for -cf/--compile_full")
        if self.output_measurement is not None and self.measurement is not None:
            raise SettingsError("-om/--output_measurement makes a measurement; -m/--measurement already is one")
        if self.moe_calibration not in MOE_CALIBRATIONS:
            choices = ", ".join(MOE_CALIBRATIONS)
            raise SettingsError(f"--moe-calibration is {self.moe_calibration!r}; it must be one of {choices}")
        for flag, value in (("-rs/--rope_scale", self.rope_scale), ("-ra/--rope_alpha", self.rope_alpha)):
            if value is not None and not 0 < value < float("inf"):
                raise SettingsError(f"{flag} is {value}; it must be positive")
        for flag, value in (("-l/--length", self.length), ("-ml/--measurement_length", self.measurement_length)):
            if value is not None and value < 2:
                raise SettingsError(f"{flag} is {value}; a row needs at least 2 tokens")
        if self.shard_size < 0 or self.checkpoint_interval < 0:
            raise SettingsError("-ss/--shard_size and --checkpoint-interval must not be negative")
        if self.device_memory is not None and not self.device_memory >= 0:
            raise SettingsError(f"--device-memory is {self.device_memory}; it must not be negative")
        self._check_directories()
        for measure in (True, False):
            self.calibration(measure=measure)

    @property
    def recipe(self) -> Recipe:
        """The algorithm's choices: those that the preset's name stands for, or the recipe given in its place."""
        recipe = find_recipe(self.preset) if isinstance(self.preset, str) else self.preset
        return replace(recipe, accuracies=True) if self.with_accuracies else recipe

    @property
    def solver(self) -> Choice:
        """The solver that the recipe or `allocation` names."""
        return self.recipe.chosen("solver") or choose("solver", self.allocation)

    def _check_allocation(self) -> None:
        """Refuse a solver with what it cannot do, and choices that the measurement has made already."""
        if self.recipe.chosen("solver") is not None and self.allocation != DEFAULT_SOLVER:
            raise SettingsError("--allocation and the variant solver are one choice; give one of them")
        if self.recipe.objective is not None and self.solver.name == "annealing":
            raise SettingsError("--allocation annealing picks an objective of its own; take exact with an objective")
        # By a measurement that holds accuracies only, rows are chosen whatever the recipe.
        free = self.recipe.pricing != "accuracy" and self.recipe.table is None and self.measurement is None
        if free and self.solver.name != DEFAULT_SOLVER:
            raise SettingsError(
                f"--allocation {self.solver.name} chooses among rows of candidates, which {self.recipe.name} has none "
                "of; take --preset stock or --candidates stock"
            )
        if self.measurement is not None and self.recipe.pricing == "accuracy" and self.recipe.table is not None:
            raise SettingsError("-m/--measurement holds its own candidates; leave --candidates out, or measure anew")

    @property
    def limits(self) -> Limits:
        """What `pins` and `exclude_bits` say."""
        return Limits.parse(self.pins, self.exclude_bits)

    def _check_directories(self) -> None:
        source = self.in_dir.resolve()
        for flag, path in (("-o/--out_dir", self.out_dir), ("-cf/--compile_full", self.compile_full)):
            if path is not None and path.resolve() == source:
                raise SettingsError(f"{flag} is the source model's own directory; choose another")
        if self.compile_full is not None and self.compile_full.resolve() == self.out_dir.resolve():
            raise SettingsError("-cf/--compile_full and -o/--out_dir must be different directories")

    @property
    def routed_only(self) -> bool:
        """Whether experts are calibrated on the tokens routed to them only."""
        return self.moe_calibration == "routed"

    def calibration(self, *, measure: bool) -> CalibrationConfig:
        """The calibration rows of a pass."""
        return replace(
            self._source(),
            rows=self.measurement_rows if measure else self.dataset_rows,
            length=self.measurement_length if measure else self.length,
            seed=self.seed,
            measure=measure,
        )

    @property
    def cal_name(self) -> str:
        """What the job file and messages call the calibration source."""
        return self._source().name

    def _source(self) -> CalibrationConfig:
        given = self.cal_dataset
        if not isinstance(given, CalibrationConfig):
            return CalibrationConfig() if given is None else CalibrationConfig(source=given)
        if given.rows is not None or given.length is not None or given.seed or given.measure:
            raise SettingsError(
                "cal_dataset: its rows, length, seed and measure are not for it to say; set dataset_rows, "
                "measurement_rows, length, measurement_length and seed of the ConversionConfig"
            )
        return given
