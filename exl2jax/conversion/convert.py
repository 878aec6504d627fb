"""The whole conversion: stages in order, each resumable, over one work directory."""

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from itertools import dropwhile
from pathlib import Path

import numpy as np

from exl2jax.allocate.allocate import require_reachable
from exl2jax.allocate.strategy import Strategy
from exl2jax.calibration import CalibrationRows
from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.context import Context
from exl2jax.conversion.gradient_passes import backward_pass, forward_pass, output_pass, perturb_pass, trace_pass
from exl2jax.conversion.passes import accuracy_pass, price_pass, quantize_pass, read_reports
from exl2jax.conversion.preflight import chosen_qparams, require_space
from exl2jax.conversion.refusals import early_notes, early_refusals, require_shards
from exl2jax.conversion.result import ConversionResult
from exl2jax.conversion.scans import TokenRows
from exl2jax.conversion.settings import settings_record
from exl2jax.conversion.strategy import choose_strategy, limited_measurement, usable_pricing
from exl2jax.conversion.summary import quantization_config, strategy_record, summarize
from exl2jax.conversion.tune_pass import obstacle, text_to_tune, tune_pass
from exl2jax.conversion.work_directory import JobState
from exl2jax.errors import JobError, StorageError
from exl2jax.exl2.compile import compile_model, copy_source_files
from exl2jax.measure.measurement import Measurement, read_measurement
from exl2jax.quantize.diagnostics import calibration_shortage
from exl2jax.storage import make_directory, read_checked_tensors, remove, write_checked_tensors
from exl2jax.storage.digests import digest
from exl2jax.stream.devices import spread
from exl2jax.stream.progress import RunControl

log = logging.getLogger(__name__)

type Stage = Callable[[JobState], JobState]

MEASURING_PASSES = {
    "forward": forward_pass,
    "backward": backward_pass,
    "perturb": perturb_pass,
    "price": price_pass,
    "measure": accuracy_pass,
}
"""Passes of the measurement in order; a recipe takes some of them."""

OUTPUT_PASSES = {"trace": trace_pass, "outputs": output_pass}
"""Passes that come before the quantization where errors are fed to later columns."""


def convert(config: ConversionConfig, control: RunControl | None = None) -> ConversionResult:
    """Convert a Hugging Face model to EXL2, or resume the conversion in `config.out_dir`.

    Raises the errors of `exl2jax.errors`; `Interrupted` when `control.stop` was asked, with everything saved.
    """
    context = Context.open(config, control or RunControl())
    for error in early_refusals(context):
        raise error
    if config.measurement is None and config.output_measurement is None:
        require_reachable(context.specs, config.bits, context.recipe.pricing, context.recipe.table, config.limits)
    for note in early_notes(context):
        log.warning("%s", note)
    with spread(config.devices), context.work.locked():
        if config.no_resume:
            context.work.clear()
        return _Conversion(context).run()


class _Conversion:
    """One run over a work directory."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.config = context.config
        self.work = context.work
        self.rows = PassRows(context.config, context.model, context.tokenizer, context.work, context.control)
        self.saved = JobState(inputs=context.inputs, settings=settings_record(context.config), stage="")

    def run(self) -> ConversionResult:
        """Every stage that is not done yet."""
        stages = self._stages()
        state = self.work.resume(replace(self.saved, stage=next(iter(stages))))
        self._check_calibration(state, stages)
        following = [*stages, "compile"][1:]
        for (name, stage), after in zip(stages.items(), following, strict=True):
            if state.stage == name:
                state = self._timed(state, name, stage).advanced(after)
                self._save(state)  # a resume after a failure of the next steps repeats nothing
        if self.config.output_measurement is not None:
            return self._deliver_measurement(state)
        return self._finish(state)

    def _check_calibration(self, state: JobState, stages: Iterable[str]) -> None:
        """Build the rows of every remaining pass, so that bad input is refused before any weight is read."""
        coming = list(dropwhile(lambda name: name != state.stage, stages))
        passes = sorted({name in MEASURING_PASSES for name in coming}, reverse=True)
        built = {"measure" if measure else "quantize": self.rows.build(measure=measure) for measure in passes}
        require_space(self.context, built)
        if "tune" in coming and (reason := obstacle(self.context, self._unseen)):
            log.warning("%s", reason)

    def _stages(self) -> dict[str, Stage]:
        """The stages before compilation, in order."""
        recipe, config = self.context.recipe, self.config
        stages: dict[str, Stage] = {}
        if config.measurement is None:
            measuring = [name for name in MEASURING_PASSES if name in recipe.passes]
            stages = {name: partial(self._with_rows, MEASURING_PASSES[name], measure=True) for name in measuring}
        if config.output_measurement is None:
            outputs = {n: partial(self._with_rows, run, measure=False) for n, run in OUTPUT_PASSES.items()}
            every: dict[str, Stage] = {**outputs, "quantize": self._quantize, "tune": self._tune}
            stages |= {name: every[name] for name in recipe.quantizing_passes}
        return stages

    def _timed(self, state: JobState, name: str, stage: Stage) -> JobState:
        """Run a stage and add its seconds, those of interrupted runs included."""
        start = time.monotonic()
        before = state.records.get("seconds", {})

        def timed(state: JobState) -> JobState:
            spent = {**before, name: round(before.get(name, 0.0) + time.monotonic() - start, 3)}
            return replace(state, records={**state.records, "seconds": spent})

        self._save(state)
        try:
            state = timed(stage(state))
        except BaseException:
            with suppress(StorageError):  # the error that stopped the stage matters more
                self._save(timed(self.saved))
            raise
        left = self.work.left_by(name)
        state = state if left is None else state.advanced(name, sha256=self._digests(state) | {left.name: digest(left)})
        self._save(state)
        return state

    def _save(self, state: JobState) -> None:
        self.work.save(state)
        self.saved = state

    def _digests(self, state: JobState) -> dict[str, str]:
        """Digests of the files that the stages so far left, by name."""
        return state.records.get("sha256", {})

    def _require_unchanged(self, path: Path, state: JobState) -> None:
        """Refuse a result that changed after its stage wrote it."""
        if self._digests(state).get(path.name) != digest(path):
            advice = "start over with `no_resume`, or take it as `measurement` into another `out_dir`"
            raise JobError(f"{path}: changed since this job wrote it; {advice}")

    def _with_rows(
        self, run: Callable[[Context, CalibrationRows], None], state: JobState, *, measure: bool
    ) -> JobState:
        """Run a pass on its calibration rows."""
        rows = self.rows.write(measure=measure)
        state = self._with_calibration(state, "measure" if measure else "quantize", rows)
        run(self.context, rows)
        return state

    def _quantize(self, state: JobState) -> JobState:
        if self.config.measurement is None:
            self._require_unchanged(self.work.measurement, state)
        strategy, measurement = self._allocate()
        require_shards(self.context, chosen_qparams(self.context, strategy))
        run = partial(quantize_pass, strategy=strategy, token_weights=self._token_weights(measurement))
        state = self._with_rows(run, state, measure=False)
        return replace(state, records={**state.records, "strategy": strategy_record(strategy, measurement.method)})

    @cached_property
    def _unseen(self) -> TokenRows:
        """The rows that the model is tuned on."""
        return text_to_tune(self.context, self.rows)

    def _tune(self, state: JobState) -> JobState:
        self._require_unchanged(self.work.reports, state)
        if reason := obstacle(self.context, self._unseen):
            write_checked_tensors(self.work.tuned, {})
            return replace(state, records={**state.records, "tuned": {"reason": reason}})
        return replace(state, records={**state.records, "tuned": tune_pass(self.context, self._unseen)})

    def _changed(self, state: JobState) -> dict[str, np.ndarray]:
        """The tensors that the tuning of the whole model changed, by name."""
        if "tuned" not in state.records:
            return {}
        self._require_unchanged(self.work.tuned, state)
        return read_checked_tensors(self.work.tuned)[0]

    def _token_weights(self, measurement: Measurement) -> dict[str, np.ndarray]:
        """The weights of tokens that Hessians take, by key of a linear, where the recipe asks for them."""
        power = self.context.recipe.weigh_hessians
        if not power:
            return {}
        weights = {} if measurement.sensitivity is None else measurement.sensitivity.token_weights
        if not weights:
            log.warning("quantization: the measurement has no weights of tokens, so that all of them count alike")
        return {key: weight**power for key, weight in weights.items()}

    def _allocate(self) -> tuple[Strategy, Measurement]:
        """The allocation, with its measurement."""
        measurement = limited_measurement(self.context, self.config.measurement or self.work.measurement)
        strategy = choose_strategy(self.context, measurement, usable_pricing(self.context, measurement))
        figure = "sum of errors" if strategy.pricing == "accuracy" else "expected KL"
        log.info("allocation: %.4f bits per weight, %s %.4f", strategy.bpw, figure, strategy.objective)
        return strategy, measurement

    def _deliver_measurement(self, state: JobState) -> ConversionResult:
        target = self.config.output_measurement
        assert target is not None  # run() checked
        target = target / "measurement.json" if target.is_dir() else target
        make_directory(target.parent, "`output_measurement`")
        read_measurement(self.work.measurement, self.context.specs).write(target, self.context.specs)
        return ConversionResult(
            output=str(target),
            bits=self.config.bits,
            preset=self.context.recipe.name,
            calibration=state.records.get("calibration"),
            seconds=state.records.get("seconds"),
        )

    def _finish(self, state: JobState) -> ConversionResult:
        target = self.config.compile_full or self.work.path
        self._require_unchanged(self.work.reports, state)
        start = time.monotonic()
        remove(self.work.outputs)  # the job file says that the quantization is done
        reports = read_reports(self.context)
        shards = compile_model(
            self.context.model,
            self.work.out_tensor,
            target,
            shard_mb=self.config.shard_size,
            own_norms={key for report in reports for key in report.own_norms},
            changed=self._changed(state),
            own_files=self.work.files if target == self.work.path else (),
        )
        if self.config.compile_full is not None:
            section = quantization_config(self.config, state)
            copy_source_files(self.context.model, target, section, tokenizer=self.context.tokenizer.written)
        seconds = {**state.records.get("seconds", {}), "compile": round(time.monotonic() - start, 3)}
        state = state.advanced("finished", seconds=seconds)
        result = summarize(self.context, state, target, shards, reports)
        self.work.save(state.advanced("finished", summary=result.to_json()))
        return result

    def _with_calibration(self, state: JobState, name: str, rows: CalibrationRows) -> JobState:
        """The state with the pass's calibration on record; a resume under other rows is refused."""
        known = state.records.get("calibration", {})
        tokens = rows.input_ids.size if rows.attention_mask is None else int(rows.attention_mask.sum())
        shortage = calibration_shortage([linear for spec in self.context.specs for linear in spec.linears], tokens)
        record = rows.record()
        record["notes"] = [*record["notes"], *(f"{name} pass {line}" for line in shortage)]
        if name in known and known[name]["sha256"] != rows.sha256:
            raise JobError(
                f"{self.work.job_file}: the calibration data changed since the {name} pass began; "
                "start over with `no_resume`"
            )
        state = replace(state, records={**state.records, "calibration": {**known, name: record}})
        self._save(state)
        return state
