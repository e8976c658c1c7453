"""The file that llama.cpp reads: blocks of the trained integers, and the network's metadata.

Without a tokenizer, as of networks trained on bytes, llama.cpp runs the file by token ids.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fogzo.export import gguf_tokenizer, holds
from fogzo.export.gguf_blocks import BlockType, block_type
from fogzo.export.source import Source
from fogzo.export.verify import ReadBack, answer

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"

_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_LLAMA_CPP_ALONE = ("Q1_0", "Q2_0")
# What llama.cpp calls a file most of whose matrices are of a type.
_FILE_TYPES = {
    **{"Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q2_K": 10, "Q3_K": 11},
    **{"TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41},
}


def write(source: Source, folder: Path) -> None:
    """Write model.gguf."""
    import gguf

    config: Any = source.model.config
    vocabulary = None
    if source.tokenizer is not None:
        vocabulary = gguf_tokenizer.vocabulary(source.tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    types = {name: _block_type(source, name) for name in source.layers}
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    commonest = Counter(kind.name for kind in types.values()).most_common(1)
    _add_metadata(writer, config, _FILE_TYPES[commonest[0][0]] if commonest else 0)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        gguf_tokenizer.add(writer, vocabulary)

    def add(name: str, values: NDArray[np.generic], shape: tuple[int, ...], type_id: int) -> None:
        stem, _, suffix = name.rpartition(".")
        # As int8, because gguf-py would look the type of uint8 up, and does not know all.
        raw = np.ascontiguousarray(values).view(np.int8)
        found = f"{names.get_name(stem)}.{suffix}"
        writer.add_tensor(found, raw, shape, cast(gguf.GGMLQuantizationType, type_id))

    ties = source.ties()
    for name, layer in source.layers.items():
        if name not in ties:
            kind, weight = types[name], layer.weight
            rows = _permuted(weight.integers.cpu(), name, config)
            scales = _permuted(weight.row_scale().cpu(), name, config)
            # A group may be several blocks.
            per_group = max(1, (weight.group_size or 0) // kind.size)
            scales = scales.repeat_interleave(per_group, 1)
            packed = kind.pack(rows.numpy(), scales.numpy())
            add(f"{name}.weight", packed, tuple(rows.shape), kind.type_id)
    others = source.other_tensors()
    for name, tensor in others.items():
        if name == "lm_head.weight" and tensor is others.get("model.embed_tokens.weight"):
            continue
        if tensor.dim() == 1:
            tensor = tensor.float()  # as llama.cpp has its vectors
        tensor = _permuted(tensor.cpu(), name.rpartition(".")[0], config).contiguous()
        add(name, tensor.view(torch.int8).numpy(), tuple(tensor.shape), _FLOATS[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_back(source: Source, folder: Path) -> ReadBack | None:
    """What transformers makes of it, which asks gguf-py; None of types that it cannot read yet."""
    import gguf  # noqa: F401  # transformers would ask for it in a longer way

    if source.tokenizer is not None:
        gguf_tokenizer.check(source.tokenizer, folder, FILE)
    if any(_block_type(source, name).name in _LLAMA_CPP_ALONE for name in source.layers):
        return None
    own: Any = source.model
    config = type(own.config).from_pretrained(folder, gguf_file=FILE)
    # The tensors are in the file, but no entry of it tells transformers to look for them.
    config.attention_bias, config.mlp_bias = own.config.attention_bias, own.config.mlp_bias
    model = type(own).from_pretrained(folder, gguf_file=FILE, config=config, dtype=own.dtype)
    weights = {name: model.get_submodule(name).weight for name in source.layers}
    return ReadBack("transformers with gguf-py", weights, lambda example: answer(model, example))


def _add_metadata(writer: "GGUFWriter", config: Any, file_type: int) -> None:
    writer.add_name("fogzo")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _block_type(source: Source, name: str) -> BlockType:
    weight = source.layers[name].weight
    levels = range(weight.low, weight.high + 1, weight.stride)
    return block_type(holds.stored(source, name, "gguf").name, levels)


def _permuted(rows: Tensor, layer: str, config: Any) -> Tensor:
    """Rows of queries and keys in llama.cpp's order, where the halves of a head alternate."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(layer.rpartition(".")[2])
    if count is None:
        return rows
    return rows.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
