"""Models that people bring to a converter and that are not quite sound, with the required outcome of each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exl2jax.testing.odd_builders import (
    EMBEDDING,
    HEAD,
    HIDDEN,
    INDEX,
    LAYERS,
    VOCABULARY,
    WEIGHTS,
    adapter_beside,
    adapter_only,
    added_tokens,
    base,
    broken_link,
    configured,
    edited,
    head_norms,
    index_without_shards,
    linked_files,
    packed_weights,
    pointer,
    random_head,
    second_copy,
    sentence_piece,
    slow_tokenizer,
    stale_index,
    stored_layers,
    unknown_windows,
)


@dataclass(frozen=True, kw_only=True)
class OddInput:
    """An odd input and its outcome in the words of the documentation; `said` are words of the refusal or the warning.

    `said` is empty where the input is converted without a message.
    """

    brought: str
    happens: str
    build: Callable[[Path], object]
    refused: bool = False
    said: tuple[str, ...] = ()


TRIED = {
    "tied_but_stored_head": OddInput(
        brought="`tie_word_embeddings` is true, and a head is stored that differs from the embedding",
        happens="the stored head is used, with a warning",
        build=edited(lambda t: t | {HEAD: random_head()}, tie=True),
        said=("lm_head.weight is stored and differs from the embedding",),
    ),
    "tied_equal_head": OddInput(
        brought="`tie_word_embeddings` is true, and the stored head equals the embedding",
        happens="the head is tied, without a word",
        build=edited(lambda t: t | {HEAD: t[EMBEDDING].copy()}, tie=True),
    ),
    "head_of_zeros": OddInput(
        brought="a stored head that is zero throughout",
        happens="refused, with the two ways out",
        build=edited(lambda t: t | {HEAD: np.zeros((VOCABULARY, HIDDEN), np.float16)}, tie=True),
        refused=True,
        said=("lm_head.weight is zero throughout", "tie_word_embeddings"),
    ),
    "head_of_another_shape": OddInput(
        brought="`tie_word_embeddings` is true, and the stored head has another number of rows",
        happens="refused by name",
        build=edited(lambda t: t | {HEAD: random_head()[:-32].copy()}, tie=True),
        refused=True,
        said=("lm_head.weight is F16 [288, 64]", "delete the tensor"),
    ),
    "slow_tokenizer": OddInput(
        brought="`vocab.json` and `merges.txt`, no `tokenizer.json`",
        happens="the result gets a `tokenizer.json` that was checked to encode alike, with a warning",
        build=slow_tokenizer,
        said=("the source has no tokenizer.json",),
    ),
    "sentence_piece": OddInput(
        brought="`tokenizer.model` alone, and the package that reads it is not installed",
        happens="refused with the package's name",
        build=sentence_piece,
        refused=True,
        said=("tokenizer.model", "pip install sentencepiece"),
    ),
    "stale_index": OddInput(
        brought="a whole `model.safetensors` beside other shards and their index",
        happens="refused, naming both",
        build=stale_index,
        refused=True,
        said=("model.safetensors: stands beside model-00001-of-00002.safetensors", INDEX),
    ),
    "index_without_shards": OddInput(
        brought="a whole `model.safetensors` and an index of shards that are gone",
        happens="the whole file is converted, with a warning",
        build=index_without_shards,
        said=(f"{INDEX} is stale",),
    ),
    "linked_files": OddInput(
        brought="tokenizer and weights are links into a store outside of the directory",
        happens="links are followed; a warning names those whose content goes into the result",
        build=linked_files,
        said=("links out of the model's directory are followed", "tokenizer.json ->"),
    ),
    "broken_link": OddInput(
        brought="a file that belongs into the result is a link to nothing",
        happens="refused by name",
        build=broken_link,
        refused=True,
        said=("generation_config.json (a link to", "restore or remove it"),
    ),
    "left_over_quantization": OddInput(
        brought="plain float weights with the `quantization_config` of a quantizer",
        happens="the key is ignored, with a warning",
        build=configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        said=("quantization_config (bitsandbytes) is ignored",),
    ),
    "empty_quantization": OddInput(
        brought="`quantization_config` is `{}`",
        happens="converted like a model without the key",
        build=configured(quantization_config={}),
    ),
    "packed_weights": OddInput(
        brought="weights that another quantizer has packed",
        happens="refused, naming key and file",
        build=packed_weights,
        refused=True,
        said=("config.json: the model is already quantized (gptq)", "quantization_config"),
    ),
    "more_layers_than_config": OddInput(
        brought="more layers stored than the config says",
        happens="converted as the config says, with a warning that counts the unread tensors",
        build=stored_layers,
        said=("18 stored tensors are read by nothing", "config.json says 2 layers, the files hold 4"),
    ),
    "fewer_layers_than_config": OddInput(
        brought="fewer layers stored than the config says",
        happens="refused with both numbers",
        build=configured(num_hidden_layers=LAYERS + 1),
        refused=True,
        said=("is missing from the weights", "config.json says 3 layers, the files hold 2"),
    ),
    "norms_nothing_reads": OddInput(
        brought="norms of queries and keys in an architecture without them",
        happens="converted without them, with a warning and an example",
        build=edited(head_norms),
        said=("4 stored tensors are read by nothing, such as model.layers.0.self_attn.k_norm.weight",),
    ),
    "rotary_tables": OddInput(
        brought="rotary tables (`inv_freq`), as older savers wrote them",
        happens="converted without a word: they are known to be unused",
        build=edited(lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}),
    ),
    "adapter_beside": OddInput(
        brought="an adapter beside its base model",
        happens="the base is converted, with a warning; the adapter is not copied",
        build=adapter_beside,
        said=("adapter_model.safetensors: the adapter beside the model is not merged",),
    ),
    "windows_nothing_knows": OddInput(
        brought="sliding layers in the config of an architecture without windows",
        happens="refused by name",
        build=unknown_windows,
        refused=True,
        said=("layer_types do not follow the pattern", "LlamaForCausalLM"),
    ),
}
"""Inputs that were tried on this program first."""

TRACKERS = {
    "git_lfs_pointer": OddInput(
        brought="a clone without its large files: text in place of the weights",
        happens="refused with the command that fetches them",
        build=pointer,
        refused=True,
        said=("model.safetensors", "Git LFS pointer", "git lfs pull"),
    ),
    "consolidated_copy": OddInput(
        brought="`consolidated.safetensors` beside shards without an index",
        happens="the shards are converted, with a warning",
        build=second_copy,
        said=("a second copy of the weights is ignored: consolidated.safetensors",),
    ),
    "resized_vocabulary": OddInput(
        brought="the embedding was resized, `vocab_size` was not",
        happens="refused with the number to set",
        build=configured(vocab_size=VOCABULARY - 20),
        refused=True,
        said=("model.embed_tokens.weight has shape [320, 64]", "set vocab_size to 320"),
    ),
    "added_tokens": OddInput(
        brought="the tokenizer has more tokens than the embedding has rows",
        happens="converted, with a warning that a loader stops at such a token",
        build=added_tokens,
        said=("the tokenizer knows 324 ids, the embedding has 320 rows",),
    ),
    "empty_placeholders": OddInput(
        brought="empty tensors, as a sharded trainer saves them",
        happens="refused with the cause",
        build=edited(lambda t: {n: v[:0].copy() if "_proj" in n else v for n, v in t.items()}),
        refused=True,
        said=("has shape [0, 64]", "empty placeholder", "gather the weights"),
    ),
    "compiled_prefix": OddInput(
        brought="names that begin with `_orig_mod.`, saved from a compiled model",
        happens="refused with the prefix to remove",
        build=edited(lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}),
        refused=True,
        said=("is missing from the weights", "'_orig_mod.'", "remove it"),
    ),
    "untied_without_head": OddInput(
        brought="`tie_word_embeddings` is false, and no head is stored",
        happens="refused with the two ways out",
        build=edited(lambda t: {n: v for n, v in t.items() if n != HEAD}),
        refused=True,
        said=("lm_head.weight is missing and the embeddings are not tied", "set tie_word_embeddings to true"),
    ),
    "eight_bit_weights": OddInput(
        brought="int8 weights, saved from a model that was loaded in 8 bits",
        happens="refused with the cause",
        build=edited(lambda t: {n: v.astype(np.int8) if "_proj" in n else v for n, v in t.items()}),
        refused=True,
        said=("is I8", "load_in_8bit"),
    ),
    "adapter_only": OddInput(
        brought="an adapter without its base model",
        happens="refused: merge it first",
        build=adapter_only,
        refused=True,
        said=("adapter_model.safetensors", "only an adapter; merge it into its base model first"),
    ),
    "pickled_weights": OddInput(
        brought="`pytorch_model.bin` only",
        happens="refused: convert it to safetensors first",
        build=lambda path: (base(path) / WEIGHTS).rename(path / "pytorch_model.bin"),
        refused=True,
        said=("pytorch_model.bin", "convert the model to safetensors first"),
    ),
    "gguf_only": OddInput(
        brought="a GGUF file only",
        happens="refused: take the original model",
        build=lambda path: (base(path) / WEIGHTS).rename(path / "model-q4.gguf"),
        refused=True,
        said=("model-q4.gguf", "take the original model"),
    ),
}
"""Inputs that users of other converters reported to their makers."""

ODD = TRIED | TRACKERS
