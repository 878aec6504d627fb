"""Write `docs/architectures.md` from the architecture registry.

    .venv/bin/python -m scripts.architectures

Run from the root of the repository. A test fails when the file is not what this script writes.
"""

from collections.abc import Iterator
from pathlib import Path

from exl2jax.models.architectures import ARCHITECTURES
from exl2jax.models.architectures_dense import DENSE
from exl2jax.models.architectures_sparse import PARALLEL, SPARSE
from exl2jax.models.architectures_vision import VISION
from exl2jax.models.registry import Architecture
from exl2jax.models.rope import KINDS, SYNONYMS

TARGET = Path("docs/architectures.md")

INTRODUCTION = """# Architectures

<!-- Written by scripts/architectures.py from exl2jax/models/architectures.py; do not edit. -->

What can be converted is what stock ExLlamaV2 0.3.2 can load: {count} architectures. Anything else is refused by name,
since the runtime would take it for a Llama without a word.

For each of them a tiny random model with all its options on is committed as a recipe (`exl2jax/testing`):

- **Logits.** The float32 logits of our forward pass agree with those of the reference named below, of `transformers`
  5.23.0 on torch 2.13.0, within 1e-3 at three lengths, one of them beyond the window or the trained context where there
  is one (`tests/models/test_parity.py`; `make parity` computes the references anew). Where `transformers` has no such
  model, the reference is one that it has, with the change named.
- **Conversion.** The same model is converted to 4 bits per weight; the result verifies, holds exactly the tensors that
  the runtime looks up, copies what is not quantized to the bit, and its predictions stay close to the source's
  (`tests/models/test_architectures.py`).

- **The way back.** What `exl2jax dequantize` writes of the result has the source's tensor names and shapes, and is the
  same model to half precision (`tests/models/test_architectures.py`). Each architecture that `transformers` has itself
  loads complete there, and its logits are ours of the EXL2 directory within 1e-3 (`make parity`).

`LlamaForCausalLM` is proven on a trained model as well, the demo model SmolLM2-135M.
"""

SOURCES = """
## What sources may look like

Weights in float16, bfloat16, float32, or FP8 (`float8_e4m3fn` with block scales); one `safetensors` file or shards.
`pytorch_model.bin` is refused with advice. Linears may have any width that is a multiple of 32 on the input side, heads
any even size, vocabularies any size. Rotary scalings: {kinds}; `type` or `rope_type`, `rope_theta` or
`rope_parameters`. The written `config.json` is the source's to the letter where the runtime can read it; keys that the
runtime would miss are added in its own spelling, none is taken away, unless `type` and `rope_type` stand side by side,
which the runtime refuses.

A config that holds a multiplier, a cap or a bias switch that its architecture does not know is refused: the runtime
applies such keys to every model. So is a value that the runtime takes for granted, and a bias in the weights that the
config does not announce. Where config and tensors disagree otherwise, the tensors decide with a warning, or the model
is refused: a stored head that differs from the embedding is the head, whatever `tie_word_embeddings` says, and tensors
that nothing reads are counted. [reliability.md](reliability.md) lists what people bring, and what happens.

## Where the runtime differs from the trained model

We quantize the model as it was trained. Stock ExLlamaV2 0.3.2 departs from that in places, beyond what a conversion can
mend:

- It has no windows in `MistralForCausalLM`, `MixtralForCausalLM`, `Phi3ForCausalLM`, `Starcoder2ForCausalLM`, Qwen2 and
  Qwen3: rows longer than the window see more than they were trained to.
- It turns the full-attention layers of `Cohere2ForCausalLM`, which have no positions.
- It does not clip queries, keys and values in `DbrxForCausalLM`.
- It subtracts the mean in the query and key norms of `Qwen3ForCausalLM` and `Qwen3MoeForCausalLM`.
- It knows no `dynamic` scaling, and of `yarn` only factor and trained length.

## Mixtures of experts

Routers stay as they are. Each expert's linears are quantized by the Hessian of the tokens routed to it, or of all
tokens with `--moe-calibration all`; an expert that no token reached gets the identity. The summary names experts that
saw less than a tenth of an even share. Each expert runs on every token, in one batched product with the others, before
the router's weights pick what counts.

The experts of a layer are in memory together where 4 GiB hold them with all that belongs to them: weights, Hessians,
factors, quantized copies (`EXPERT_BYTES` in `stream/blocks.py`). Otherwise every pass takes them in pieces: a few are
read, worked on and let go before the next are read. A layer's output is a sum over its experts, and so are gradients
and the states of candidates, so the result is the same but for the order of these sums. Pieces are not tuned, which the
summary says, and the preset `stock` holds the outputs of all candidates meanwhile.
"""


def render() -> str:
    """The text of the file."""
    sections = [
        ("Dense models", DENSE),
        ("Mixtures of experts", SPARSE),
        ("Attention and MLP side by side", PARALLEL),
        ("Vision-language models", VISION),
    ]
    kinds = ", ".join(f"`{kind}`" for kind in (*KINDS, *SYNONYMS))
    parts = [INTRODUCTION.format(count=len(ARCHITECTURES))]
    parts += [f"\n## {title}\n\n" + "\n".join(_table(entries)) + "\n" for title, entries in sections]
    return "".join([*parts, SOURCES.format(kinds=kinds)])


def _table(entries: tuple[Architecture, ...]) -> Iterator[str]:
    yield "| architecture | logits compared with | what sets it apart from Llama |"
    yield "|---|---|---|"
    for arch in entries:
        yield f"| `{arch.name}` | {arch.proof} | {'; '.join(_traits(arch)) or 'nothing'} |"


def _traits(arch: Architecture) -> Iterator[str]:
    """The entry's switches in words."""
    if arch.prefix or arch.copied:
        yield "language model quantized, " + ", ".join(f"`{name}`" for name in arch.copied) + " copied"
    if arch.qkv_bias is True:
        yield "biases on " + ("every linear" if arch.mlp_bias is True else "q, k, v")
    if arch.norm == "layer":
        yield "LayerNorm" + (" with bias" if arch.norm_bias else "")
    if arch.norm_offset:
        yield "norm weights around zero"
    if arch.norms.attention_post:
        yield "norms after attention and MLP"
    if arch.head_norm:
        yield "q and k normalised" + (f" where `{arch.head_norm_switch}`" if arch.head_norm_switch is not True else "")
    if arch.fused:
        yield "fused " + ", ".join(f"`{fused.source}`" for fused in arch.fused) + " written split"
    if arch.mlp[0] is None:
        yield "MLP without a gate"
    if arch.router:
        yield f"experts behind `{arch.router}`"
    if arch.parallel:
        yield "parallel blocks"
    if arch.multi_query:
        yield "one key/value head"
    if arch.positions:
        yield "learned positions"
    if arch.rotary == "pairs":
        yield "neighbouring pairs turn"
    if arch.window != "none":
        yield WINDOWS[arch.window].format(n=arch.pattern)
    if arch.local_theta:
        yield f"`{arch.local_theta}` in sliding layers"
    if arch.nope:
        yield "no positions in the others"
    if arch.scaled_embeddings:
        yield "embeddings times the root of the hidden size"
    if arch.scales or arch.clip_key:
        yield ", ".join(f"`{key}`" for key in (*arch.scales, *filter(None, [arch.clip_key])))


WINDOWS = {
    "all": "sliding window",
    "switched": "sliding window if `use_sliding_window`",
    "upper": "sliding window in layers from `max_window_layers`",
    "pattern": "sliding window, one layer in {n} without",
}


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"{TARGET}: {len(ARCHITECTURES)} architectures")
