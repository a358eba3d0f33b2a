"""A model as one GGUF file: metadata, vocabulary, tensors, written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor

from lathe.common.errors import InvalidArgument
from lathe.engine.export.gguf_arch import architecture_of, arrange, context_of, describe, rope_tensors
from lathe.engine.export.gguf_vocab import Vocabulary, vocabulary
from lathe.engine.export.merge import MergedModel
from lathe.engine.export.source import Lineage, Source, TensorInfo
from lathe.engine.spec import DecoderSpec
from lathe.text.errors import TemplateError
from lathe.text.tokenizer import Tokenizer

_LARGEST_F16 = 65504.0


class GgufType(StrEnum):
    """How matrices are stored; vectors are always float32."""

    F16 = "f16"
    Q8_0 = "q8_0"

    @property
    def bytes_a_weight(self) -> float:
        """Of a matrix: Q8_0 has a scale of two bytes for each 32 numbers of one."""
        return 2.0 if self is GgufType.F16 else 34 / 32


def check_exportable(source: Source) -> int:
    """The context that the file will have. Raises InvalidArgument for a model or a tokenizer that cannot be written,
    before anything is."""
    spec = DecoderSpec.from_config(source.config())
    architecture = architecture_of(spec)
    vocabulary((source.base / "tokenizer.json").read_bytes(), spec.vocab_size)
    return context_of(spec, architecture)


def write_gguf(
    file: Path,
    model: MergedModel,
    tokenizer: Tokenizer,
    source: Source,
    kind: GgufType,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Raises InvalidArgument for what cannot be written."""
    spec = DecoderSpec.from_config(model.config)
    architecture = architecture_of(spec)
    arch = gguf.MODEL_ARCH[architecture.name]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _describe(writer, source.lineage, kind)
        describe(writer, spec, architecture)
        _vocabulary(
            writer, vocabulary((source.base / "tokenizer.json").read_bytes(), spec.vocab_size), tokenizer
        )
        names = gguf.get_tensor_name_map(arch, spec.layers)
        plan = [(info, _name(names, info.name), _type(info, kind)) for info in model.infos() if _kept(info)]
        ropes = rope_tensors(spec)
        for name, tensor in ropes.items():
            _announce(writer, name, tuple(tensor.shape), gguf.GGMLQuantizationType.F32)
        for info, name, type_ in plan:
            _announce(writer, name, info.shape, type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in ropes.values():
            writer.write_tensor_data(tensor.numpy())
        for done, (info, _, type_) in enumerate(plan):
            if progress is not None:
                progress(info.name, done, len(plan))
            tensor = arrange(info.name, model.read(info.name), architecture, spec)
            writer.write_tensor_data(_stored(info.name, tensor, type_))
    finally:
        writer.close()


def _describe(writer: gguf.GGUFWriter, lineage: Lineage, kind: GgufType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(lineage.model or lineage.base_model or "model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    if lineage.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, lineage.base_model)
    if lineage.licence:
        writer.add_license(lineage.licence.lower())


def _vocabulary(writer: gguf.GGUFWriter, found: Vocabulary, tokenizer: Tokenizer) -> None:
    writer.add_tokenizer_model(found.kind)
    if found.pre:
        writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.merges:
        writer.add_token_merges(found.merges)
    writer.add_add_space_prefix(found.add_space_prefix)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    # Templates write the token that tokenizer_config names; any other that ends a turn goes in beside it.
    ends = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    ends += [id_ for id_ in tokenizer.eos_ids if id_ != tokenizer.eos_id]
    if ends:
        writer.add_eos_token_id(ends[0])
        if len(ends) > 1:
            writer.add_eot_token_id(ends[-1])
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    try:
        writer.add_chat_template(tokenizer.template.source)
    except TemplateError:
        return  # a model without one completes text


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself begins a plain text with the token that begins texts."""
    ids = tokenizer.encode("a", add_special_tokens=True)
    return bool(ids) and ids[0] == tokenizer.bos_id


def _kept(info: TensorInfo) -> bool:
    """Older folders carry the rotary frequencies, which llama.cpp computes."""
    return not info.name.endswith("rotary_emb.inv_freq")


def _name(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InvalidArgument(f"llama.cpp has no name for the tensor {name}; export safetensors instead.")
    return found


def _type(info: TensorInfo, kind: GgufType) -> gguf.GGMLQuantizationType:
    types = gguf.GGMLQuantizationType
    if len(info.shape) < 2:
        return types.F32
    # Q8_0 goes by blocks of 32 numbers of a row; llama.cpp's own quantizer falls back in the same way.
    whole = kind is GgufType.Q8_0 and info.shape[-1] % 32 == 0
    return types.Q8_0 if whole else types.F16


def _announce(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], type_: gguf.GGMLQuantizationType
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[type_]
    writer.add_tensor_info(
        name, shape, numpy.dtype(numpy.float32), math.prod(shape) // block * size, raw_dtype=type_
    )


def _stored(name: str, tensor: Tensor, type_: gguf.GGMLQuantizationType) -> Any:
    if type_ is gguf.GGMLQuantizationType.F32:
        return tensor.contiguous().numpy()
    if type_ is gguf.GGMLQuantizationType.F16:
        largest = float(tensor.abs().max())
        if largest > _LARGEST_F16:
            raise InvalidArgument(
                f"Tensor {name} holds {largest:.3g}, more than f16 can; export safetensors instead."
            )
        return tensor.to(torch.float16).contiguous().numpy()
    return gguf.quants.quantize(tensor.contiguous().numpy(), type_)
