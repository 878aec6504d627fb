"""The context of a conversion: everything that its stages share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exl2jax.calibration import Tokenizer, load_tokenizer
from exl2jax.conversion.checkpoint import FileCheckpoint
from exl2jax.conversion.config import ConversionConfig
from exl2jax.conversion.inputs import job_inputs
from exl2jax.conversion.work_directory import WorkDirectory
from exl2jax.errors import SettingsError
from exl2jax.models import Decoder, HFModel, LinearSpec, ModuleSpec, build_decoder, module_specs, open_model
from exl2jax.models.transform import transformed
from exl2jax.qparams import require_quantizable_rows
from exl2jax.storage.digests import fingerprint
from exl2jax.stream.blocks import Block, HeadBlock
from exl2jax.stream.progress import RunControl
from exl2jax.stream.scan import Carry, Form, HostCarry, scan
from exl2jax.variants.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The source, the settings and the work directory of a conversion; `inputs` is everything the bytes depend on."""

    config: ConversionConfig
    recipe: Recipe
    model: HFModel
    decoder: Decoder
    specs: tuple[ModuleSpec, ...]
    tokenizer: Tokenizer
    work: WorkDirectory
    control: RunControl
    inputs: dict[str, Any]

    @classmethod
    def open(cls, config: ConversionConfig, control: RunControl) -> "Context":
        """Open the source model and check all that can be checked before anything is computed."""
        model = _open_source(config)
        tokenizer = load_tokenizer(config.in_dir)
        return cls(
            config=config,
            recipe=config.recipe,
            model=model,
            decoder=build_decoder(model.config),
            specs=module_specs(model.config),
            tokenizer=tokenizer,
            work=WorkDirectory(config.out_dir),
            control=control,
            inputs=job_inputs(config, model, tokenizer),
        )

    @property
    def fast_decoder(self) -> Decoder:
        """The decoder of the passes over all calibration rows, with the products that the settings ask for."""
        return build_decoder(self.model.config, self.config.precision)

    def load(self, spec: ModuleSpec | LinearSpec) -> Block | HeadBlock:
        """The block of a module, or of the head, with its weights; a large mixture reads its experts later."""
        if isinstance(spec, LinearSpec):
            return HeadBlock.of(self.model, spec)
        return Block.of(self.model, spec)

    def scan[O](
        self,
        stage: str,
        step: Callable[[Carry, Any], tuple[Carry, O]],
        start: Callable[[], HostCarry],
        specs: Sequence[ModuleSpec | LinearSpec],
        *,
        form: Form[Carry],
        describe: Callable[[Any, O], str],
        write: Callable[[list[O]], None],
        read: Callable[[int], list[O]],
    ) -> tuple[Carry, list[O]]:
        """A checkpointed pass over blocks in this work directory; `write` and `read` keep its outputs."""
        checkpoint = FileCheckpoint(work=self.work, stage=stage, job=fingerprint(self.inputs), write=write, read=read)
        return scan(
            step,
            start,
            specs,
            form=form,
            load=self.load,
            describe=describe,
            checkpoint=checkpoint,
            interval=self.config.checkpoint_interval,
            stage=stage,
            control=self.control,
        )


def _open_source(config: ConversionConfig) -> HFModel:
    model = open_model(config.in_dir, rope_scale=config.rope_scale, rope_alpha=config.rope_alpha)
    if not isinstance(model, HFModel):
        raise SettingsError(f"{config.in_dir}: this is an EXL2 directory already; give the original model")
    for spec in module_specs(model.config):
        for linear in spec.linears:
            require_quantizable_rows(linear.rows, f"{config.in_dir}: {linear.key}")
    require_quantizable_rows(model.config.hidden_size, f"{config.in_dir}: lm_head")
    model.check_headers()
    return transformed(model, config.recipe.transform)
