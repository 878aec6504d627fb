"""The pass that tunes a quantized model on text that neither its measurement nor its quantization saw.

What it changes goes to one file of tensors, which compilation takes in place of those of the passes before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from exl2jax.conversion.calibrate import PassRows
from exl2jax.conversion.checkpoint import FileCheckpoint
from exl2jax.conversion.context import Context
from exl2jax.conversion.scans import TokenRows, embedded, placed_rows
from exl2jax.models import LinearSpec, ModuleSpec, head_norm_spec, head_spec
from exl2jax.ops.packing import PackedLinear, read_groups, unpack_together
from exl2jax.qparams import ROW_MULTIPLE
from exl2jax.quantize.changes import groups_of_rows
from exl2jax.quantize.end_to_end import PIECE, Passage, QuantizedModel, StoredModule, TuningState
from exl2jax.quantize.store import tensor_file
from exl2jax.storage import read_checked_tensors, write_checked_tensors
from exl2jax.storage.digests import fingerprint
from exl2jax.stream.blocks import Block, cut, forward_block
from exl2jax.stream.scan import STATES, Form, HostCarry, scan
from exl2jax.stream.streams import device_budget

JUDGES = 8
"""Pieces kept apart, on which the changes are judged."""

EVERY = 20
"""Steps between two judgements."""

LEAST = 8
"""Fewest steps that are worth it."""

KEPT_BYTES = 8 << 30
"""Bytes of dequantized weights that stay in a host's memory; a device has a budget of its own."""

TOO_FEW = (
    "not tuned as a whole: beyond the rows that are quantized on, the calibration data holds {found} pieces of text "
    "({piece} tokens, or a shorter row), {needed} are needed; give more text or fewer rows"
)
IN_PIECES = "not tuned as a whole: the experts of {key} do not fit in memory together"


def rows_to_tune(steps: int, length: int) -> int:
    """Rows of so many tokens that hold the pieces of a tuning of `steps` steps."""
    return math.ceil((steps + JUDGES) / max(length // PIECE, 1))


def text_to_tune(context: Context, rows: PassRows) -> TokenRows:
    """Rows that no other pass takes: as many as the tuning needs, or fewer where the text holds no more."""
    length = rows.build(measure=False).input_ids.shape[1]
    return rows.unseen(rows_to_tune(context.recipe.tuned_steps, length))


def kept_weights(context: Context) -> int:
    """Bytes of the dequantized weights that a tuning holds: all of them where they fit, else the largest module's."""
    budget, modules = device_budget(context.config.device_memory), [2 * spec.weights for spec in context.specs]
    return sum(modules) if sum(modules) <= (KEPT_BYTES if budget is None else budget) else max(modules)


def obstacle(context: Context, rows: TokenRows) -> str:
    """Why a model cannot be tuned on these rows; empty where it can."""
    split = next((spec for spec in context.specs if len(cut(spec)) > 1), None)
    if split is not None:
        return IN_PIECES.format(key=split.key)
    found = len(_pieces(rows).input_ids)
    needed = LEAST + JUDGES
    return "" if found >= needed else TOO_FEW.format(found=found, needed=needed, piece=PIECE)


def tune_pass(context: Context, rows: TokenRows) -> dict[str, Any]:
    """Write the tuned tensors to the work directory: the record of it, with the divergence on the judging pieces."""
    judges, train = _texts(context, _pieces(rows))
    steps, model = min(context.recipe.tuned_steps, len(train)), _model(context)
    start = model.start()
    form = _form(start)

    def step(state: TuningState, index: int) -> tuple[TuningState, str]:
        state, loss = model.step(state, train[index], steps)
        line = f"step {index + 1}: divergence {loss:.4f}"
        if (index + 1) % EVERY and index + 1 < steps:
            return state, line
        state, found = model.judged(state, judges)
        return state, f"{line}, {found:.4f} on text kept apart (before {float(state.before):.4f})"

    state, _ = scan(
        step,
        lambda: form.keep(model.judged(start, judges)[0]),
        range(steps),
        form=form,
        load=int,
        describe=lambda _, line: line,
        checkpoint=FileCheckpoint(
            work=context.work,
            stage="tune",
            job=fingerprint(context.inputs),
            write=lambda _: None,
            read=lambda count: [""] * count,
        ),
        interval=context.config.checkpoint_interval,
        stage="tune",
        control=context.control,
        unit="steps",
    )
    write_checked_tensors(context.work.tuned, model.tensors(state.best))
    tokens = int(sum(piece.mask.sum() for piece in train[:steps]))
    return {"steps": steps, "before": float(state.before), "after": float(state.least), "tokens": tokens}


def _form(like: TuningState) -> Form[TuningState]:
    """How a tuning's state goes to a checkpoint: a name for every leaf, in order."""
    structure = jax.tree.structure(like)

    def place(kept: HostCarry) -> TuningState:
        return jax.tree.unflatten(structure, [kept[name][0] for name in sorted(kept)])

    def keep(state: TuningState) -> HostCarry:
        leaves = jax.tree.leaves(jax.device_get(state))
        return {f"{i:06}": np.asarray(leaf)[None] for i, leaf in enumerate(leaves)}

    return Form(place, keep, lambda state: state)


def _pieces(rows: TokenRows) -> TokenRows:
    """Rows in pieces of `PIECE` tokens, or of the whole row if that is shorter; those of padding alone are left out."""
    length = min(PIECE, rows.input_ids.shape[1])
    count = rows.input_ids.shape[1] // length
    ids, mask = (x[:, : count * length].reshape(-1, length) for x in rows)
    used = mask.sum(axis=1) > length // 2
    return TokenRows(ids[used], mask[used])


def _texts(context: Context, pieces: TokenRows) -> tuple[list[Passage], list[Passage]]:
    """The pieces to judge by and those to train on, drawn from the job's seed, with their full-precision states."""
    order = np.random.default_rng([context.config.seed, 0x74756E65]).permutation(len(pieces.input_ids))
    picked = TokenRows(*(x[order[: context.recipe.tuned_steps + JUDGES]] for x in pieces))
    placed = placed_rows(context, picked)
    first = embedded(context, picked)[STATES]
    states = placed.place(first.copy())
    for spec in context.specs:
        states, _ = forward_block(context.decoder, Block.of(context.model, spec), states)
    mask = np.asarray(picked.mask, np.float32)
    values = (first, mask, states.array())
    every = [Passage(*(x[i : i + 1] for x in values)) for i in range(len(mask))]
    return every[:JUDGES], every[JUDGES:]


def _model(context: Context) -> QuantizedModel:
    """The quantized model in the work directory; its weights stay in memory where they fit."""
    head, norm = head_spec(context.model.config), head_norm_spec(context.model.config)
    full = context.model.head_params()
    full["lm_head"] = jax.device_put(full["lm_head"])  # once: each step would take it up again
    kernels = _kernels({head.name: _packed(context, head)}, (head,))
    all_fit = kept_weights(context) == 2 * sum(spec.weights for spec in context.specs)
    kept, whole = dict[str, StoredModule](), set[str]()

    def load(spec: ModuleSpec) -> StoredModule:
        if spec.key not in kept:
            if not all_fit:
                kept.clear()  # the last module only
            kept[spec.key] = _stored(context, spec, again=spec.key in whole)
            whole.add(spec.key)
        return kept[spec.key]

    return QuantizedModel(
        decoder=context.decoder,
        specs=context.specs,
        load=load,
        head={**full, "lm_head": {**full["lm_head"], "kernel": kernels[head.name]}},
        full_head=full,
        head_norm=norm,
        bits=context.config.bits,
    )


def _stored(context: Context, spec: ModuleSpec, *, again: bool) -> StoredModule:
    """A module from the tensors that the quantization left, its kernels on the device; `again`: not the first time."""
    params = dict(context.model.plain_params(spec))
    maxima, of_row = dict[str, np.ndarray](), dict[str, np.ndarray]()
    linears = {x.name: _packed(context, x, again=again) for x in spec.linears}
    kernels = _kernels(linears, spec.linears)
    for x in spec.linears:
        packed = linears[x.name]
        params[x.name] = {"kernel": kernels[x.name]}
        if packed.bias is not None:
            params[x.name]["bias"] = packed.bias[: x.columns].astype(np.float32)
        maxima[x.name] = np.zeros(x.rows // ROW_MULTIPLE, np.float16)
        maxima[x.name][: len(packed.q_scale_max)] = packed.q_scale_max
        of_row[x.name] = groups_of_rows(read_groups(packed))[packed.q_invperm]
    return StoredModule(params, maxima, of_row)


def _packed(context: Context, spec: LinearSpec, *, again: bool = False) -> PackedLinear:
    tensors = read_checked_tensors(tensor_file(context.work.out_tensor, spec.key), again=again)[0]
    return PackedLinear.of(tensors.__getitem__, spec.key, tensors.get(f"{spec.key}.bias"))


def _kernels(linears: Mapping[str, PackedLinear], specs: Sequence[LinearSpec]) -> dict[str, jax.Array]:
    """The dequantized kernels `[K, N]` float16 by name, on the device."""
    found = unpack_together(linears)
    for x in specs:
        if x.columns != found[x.name].shape[1]:
            found[x.name] = found[x.name][:, : x.columns]
    return found
