"""The whole conversion: stages in order, each resumable, over one work directory."""

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from exl2jax.calibration import CalibrationRows, load_rows, load_tokenizer
from exl2jax.errors import JobError, MeasurementError, NumericalError, SettingsError, StorageError
from exl2jax.models import Decoder, HFModel, LinearSpec, ModuleSpec, build_decoder, head_spec, module_specs, open_model
from exl2jax.pipeline.allocate import Strategy, allocate
from exl2jax.pipeline.compile import compile_model, copy_source_files
from exl2jax.pipeline.config import ConversionConfig
from exl2jax.pipeline.job import FileCheckpoint, JobState, WorkDirectory, fingerprint
from exl2jax.pipeline.measure import STATES, Block, measure_step
from exl2jax.pipeline.measurement import Candidate, Measurement, read_measurement
from exl2jax.pipeline.progress import Control
from exl2jax.pipeline.quantize import REFERENCE, HeadBlock, ModuleReport, QuantizeStep
from exl2jax.pipeline.result import ConversionResult, perplexity_warnings
from exl2jax.pipeline.scan import Carry, scan
from exl2jax.pipeline.stream import embed
from exl2jax.qparams import require_quantizable_rows
from exl2jax.storage import make_directory, read_json, write_json, write_tensors
from exl2jax.version import VERSION

log = logging.getLogger(__name__)

CHECK_ROWS = 16
"""Rows of the final check where `measurement_rows` says nothing; stock's default."""


def convert(config: ConversionConfig, control: Control | None = None) -> ConversionResult:
    """Convert a Hugging Face model to EXL2, or go on with the conversion that `config.out_dir` holds.

    Raises the errors of `exl2jax.errors`; `Interrupted` when `control.stop` was asked, with everything saved.
    """
    control = control or Control()
    work = WorkDirectory(config.out_dir)
    conversion = _Conversion(config, _open_source(config), work, control)
    with work.locked():
        if config.no_resume:
            work.clear()
        return conversion.run()


def _open_source(config: ConversionConfig) -> HFModel:
    model = open_model(config.in_dir, rope_scale=config.rope_scale, rope_alpha=config.rope_alpha)
    if not isinstance(model, HFModel):
        raise SettingsError(f"{config.in_dir}: this is an EXL2 directory already; give the original model")
    for spec in module_specs(model.config):
        for linear in spec.linears:
            require_quantizable_rows(linear.rows, f"{config.in_dir}: {linear.key}")
    require_quantizable_rows(model.config.hidden_size, f"{config.in_dir}: lm_head")
    model.check_headers()
    return model


class _Conversion:
    """One run over a work directory; holds what the stages share."""

    def __init__(self, config: ConversionConfig, model: HFModel, work: WorkDirectory, control: Control) -> None:
        self.config = config
        self.model = model
        self.work = work
        self.control = control
        self.specs: tuple[ModuleSpec, ...] = module_specs(model.config)
        self.decoder: Decoder = build_decoder(model.config)
        self.tokenizer = load_tokenizer(config.in_dir)
        self.inputs = self._inputs()
        self.saved = JobState(inputs=self.inputs, in_dir=str(config.in_dir.resolve()), stage="measure")

    def run(self) -> ConversionResult:
        """Every stage that is not done yet."""
        config = self.config
        first = "quantize" if config.measurement else "measure"
        state = self.work.resume(JobState(inputs=self.inputs, in_dir=str(config.in_dir.resolve()), stage=first))
        if state.stage == "measure":
            state = self._timed(state, "measure", self._measure)
        if config.output_measurement is not None:
            return self._deliver_measurement(state)
        if state.stage == "quantize":
            state = self._timed(state, "quantize", self._quantize)
        return self._finish(state)

    def _timed(self, state: JobState, name: str, stage: Any) -> JobState:
        """Run a stage and add its seconds, those of interrupted runs included."""
        begun = time.monotonic()
        before = state.records.get("seconds", {})

        def timed(state: JobState) -> JobState:
            spent = {**before, name: round(before.get(name, 0.0) + time.monotonic() - begun, 3)}
            return replace(state, records={**state.records, "seconds": spent})

        self._save(state)
        try:
            state = timed(stage(state))
        except BaseException:
            with suppress(StorageError):  # what stopped the stage is the news
                self._save(timed(self.saved))
            raise
        self._save(state)
        return state

    def _save(self, state: JobState) -> None:
        self.work.save(state)
        self.saved = state

    def _measure(self, state: JobState) -> JobState:
        rows = self._calibrate(measure=True)
        state = self._with_calibration(state, "measure", rows)
        specs, path = self.specs, self.work.measurement

        def write(outputs: Sequence[tuple[Candidate, ...]]) -> None:
            keys = [spec.key for spec in specs]
            Measurement(modules=dict(zip(keys, outputs, strict=False))).write(path, specs)

        def read(count: int) -> list[tuple[Candidate, ...]]:
            return list(read_measurement(path, specs, partial=count).modules.values())

        _, outputs = scan(
            partial(measure_step, decoder=self.decoder, mask=rows.attention_mask),
            lambda: {STATES: embed(self.model, rows.input_ids, self.config.seed)},
            specs,
            load=self._load,
            describe=lambda spec, found: f"{spec.key}: error {found[0].error:.4f} to {found[-1].error:.4f}",
            checkpoint=FileCheckpoint(work=self.work, stage="measure", job=self._job_id(), write=write, read=read),
            interval=self.config.checkpoint_interval,
            stage="measure",
            control=self.control,
        )
        write(outputs)
        return state.advanced("quantize", measurement_sha256=_digest(path))

    def _quantize(self, state: JobState) -> JobState:
        strategy = self._allocate(state)
        rows = self._calibrate(measure=False)
        state = self._with_calibration(state, "quantize", rows)
        make_directory(self.work.out_tensor, "the work directory")
        step = QuantizeStep(
            decoder=self.decoder,
            strategy=strategy.qparams,
            head_bits=self.config.head_bits,
            input_ids=rows.input_ids,
            mask=rows.attention_mask,
            out_tensor=self.work.out_tensor,
        )
        _, reports = scan(
            step,
            partial(self._start_quantize, rows),
            (*self.specs, head_spec(self.model.config)),
            load=self._load,
            describe=lambda spec, report: _describe(report, strategy),
            checkpoint=self._report_checkpoint(),
            interval=self.config.checkpoint_interval,
            stage="quantize",
            control=self.control,
        )
        self._write_reports(reports)
        if not math.isfinite(reports[-1].perplexity or math.nan):
            raise NumericalError("lm_head: the calibration perplexity of the quantized model is not finite")
        return state.advanced("compile", strategy=_strategy_record(strategy), reports_sha256=_digest(self.work.reports))

    def _start_quantize(self, rows: CalibrationRows) -> Carry:
        states = embed(self.model, rows.input_ids, self.config.seed)
        count = self.config.measurement_rows or CHECK_ROWS
        return {STATES: states, REFERENCE: states[:count].copy()}

    def _report_checkpoint(self) -> FileCheckpoint[ModuleReport]:
        return FileCheckpoint(
            work=self.work, stage="quantize", job=self._job_id(), write=self._write_reports, read=self._read_reports
        )

    def _write_reports(self, reports: Sequence[ModuleReport]) -> None:
        write_json(self.work.reports, [report.to_json() for report in reports])

    def _read_reports(self, count: int | None = None) -> list[ModuleReport]:
        records = read_json(self.work.reports, JobError, "the quantization report")
        try:
            return [ModuleReport.from_json(record) for record in records[:count]]
        except (TypeError, KeyError) as e:
            raise JobError(f"{self.work.reports}: not a quantization report ({e}); start over with -nr") from e

    def _allocate(self, state: JobState) -> Strategy:
        path = self.config.measurement or self.work.measurement
        if self.config.measurement is None:
            _require_unchanged(path, state, "measurement_sha256")
        measurement = read_measurement(path, self.specs)
        strategy = allocate(
            measurement, self.specs, self.config.bits, solver=self.config.allocation, seed=self.config.seed
        )
        log.info(
            "allocation: %.4f bits per weight, max error %.4f (%s)", strategy.bpw, strategy.max_error, strategy.solver
        )
        return strategy

    def _deliver_measurement(self, state: JobState) -> ConversionResult:
        target = self.config.output_measurement
        assert target is not None  # run() checked
        target = target / "measurement.json" if target.is_dir() else target
        make_directory(target.parent, "-om/--output_measurement")
        read_measurement(self.work.measurement, self.specs).write(target, self.specs)
        return ConversionResult(
            output=str(target),
            bits=self.config.bits,
            calibration=state.records.get("calibration"),
            seconds=state.records.get("seconds"),
        )

    def _finish(self, state: JobState) -> ConversionResult:
        target = self.config.compile_full or self.work.path
        _require_unchanged(self.work.reports, state, "reports_sha256")
        begun = time.monotonic()
        shards = compile_model(self.model, self.work.out_tensor, target, shard_mb=self.config.shard_size)
        if self.config.compile_full is not None:
            copy_source_files(self.model, target, self._quantization_config(state))
        seconds = {**state.records.get("seconds", {}), "compile": round(time.monotonic() - begun, 3)}
        result = self._result(state, target, shards, seconds)
        self.work.save(state.advanced("finished", seconds=seconds, summary=result.to_json()))
        return result

    def _result(
        self, state: JobState, target: Path, shards: Sequence[Path], seconds: Mapping[str, float]
    ) -> ConversionResult:
        reports = self._read_reports()
        modules = [r for r in reports if r.rfn_error is not None]
        head = reports[-1]
        weights = sum(spec.weights for spec in self.specs)
        notes = [n for c in state.records.get("calibration", {}).values() for n in c.get("notes", [])]
        damped = [f"{r.key}: damping raised {r.attempts - 1} times" for r in reports if r.attempts > 1]
        return ConversionResult(
            output=str(target),
            bits=self.config.bits,
            bpw=sum(r.bits for r in modules) / weights,
            head_bits=self.config.head_bits,
            size=sum(path.stat().st_size for path in shards),
            source_size=sum(path.stat().st_size for path in self.model.files.files),
            perplexity=head.perplexity,
            perplexity_full=head.perplexity_full,
            rfn_error={r.key: r.rfn_error for r in modules if r.rfn_error is not None},
            allocation=state.records.get("strategy"),
            calibration=state.records.get("calibration"),
            seconds=seconds,
            warnings=(*perplexity_warnings(head.perplexity or math.nan), *damped, *notes),
        )

    def _quantization_config(self, state: JobState) -> dict[str, Any]:
        calibration = state.records["calibration"]["quantize"]
        return {
            "quant_method": "exl2",
            "version": "0.3.2",
            "bits": self.config.bits,
            "head_bits": self.config.head_bits,
            "calibration": {
                "rows": calibration["rows"],
                "length": calibration["length"],
                "dataset": self.config.cal_dataset or "(default)",
            },
            "converter": f"exl2jax {VERSION}",
        }

    def _calibrate(self, *, measure: bool) -> CalibrationRows:
        """Build the rows of a pass and leave them in the work directory."""
        model = self.model.config
        rows = load_rows(
            self.config.calibration(measure=measure),
            self.tokenizer,
            vocab_size=model.vocab_size,
            context=model.max_position,
        )
        for note in rows.notes:
            log.warning("calibration: %s", note)
        write_tensors(self.work.cal_data, rows.tensors(), {"pass": "measure" if measure else "quantize"})
        return rows

    def _with_calibration(self, state: JobState, name: str, rows: CalibrationRows) -> JobState:
        """The state with the pass's calibration on record; a resume under other rows is refused."""
        known = state.records.get("calibration", {})
        if name in known and known[name]["sha256"] != rows.sha256:
            raise JobError(f"{self.work.job_file}: the calibration data changed since the {name} pass began; use -nr")
        state = replace(state, records={**state.records, "calibration": {**known, name: rows.record()}})
        self._save(state)
        return state

    def _load(self, spec: ModuleSpec | LinearSpec) -> Any:
        if isinstance(spec, LinearSpec):
            return HeadBlock(spec, self.model.head_params())
        return Block(spec, self.model.module_params(spec))

    def _job_id(self) -> str:
        return fingerprint(self.inputs)

    def _inputs(self) -> dict[str, Any]:
        """Everything that decides the bytes of the result."""
        config = self.config
        settings = ("cal_dataset", "rope_scale", "rope_alpha", "measurement_rows", "measurement_length", "seed")
        later = ("bits", "head_bits", "dataset_rows", "length", "allocation")
        chosen = settings if config.output_measurement else settings + later
        inputs: dict[str, Any] = {
            "package version": VERSION,
            "model config": self.model.config_digest,
            "model weights": self.model.weights_digest(),
            "tokenizer": self.tokenizer.fingerprint,
            **{name: getattr(config, name) for name in chosen},
        }
        if config.measurement is not None:
            inputs["measurement file"] = _digest(config.measurement)
        return inputs


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise MeasurementError(f"{path}: the measurement file cannot be read ({e})") from e


def _require_unchanged(path: Path, state: JobState, name: str) -> None:
    """Refuse to go on with a stage's result that is not the one the stage left."""
    if state.records.get(name) != _digest(path):
        raise JobError(
            f"{path}: changed since this job wrote it; start over with -nr, or take it with -m into another -o"
        )


def _describe(report: ModuleReport, strategy: Strategy) -> str:
    if report.rfn_error is None:
        full = f"full precision {report.perplexity_full:.3f}"
        return f"{report.key}: calibration perplexity {report.perplexity:.3f} ({full})"
    widths = ", ".join(f"{n} {'/'.join(map(str, q.bits))}" for n, q in strategy.qparams[report.key].items())
    return f"{report.key}: rfn_error {report.rfn_error:.5f} ({widths})"


def _strategy_record(strategy: Strategy) -> dict[str, Any]:
    return {
        "solver": strategy.solver,
        "bpw": strategy.bpw,
        "norm": strategy.norm,
        "objective": strategy.objective,
        "max_error": strategy.max_error,
        "gap": strategy.gap,
        "modules": {k: {n: q.to_json() for n, q in v.items()} for k, v in strategy.qparams.items()},
    }
