"""Small quantised checkpoints, written element by element from the formats' definitions, and what they stand for.

Nothing here is shared with splitfire/engine/formats/: AWQ, GPTQ and fp8 are encoded with loops and Python integers, compressed-tensors by
its own library, whose decoder says what the numbers are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints import edit_config


@dataclass(frozen=True, slots=True)
class Encoded:
    """One matrix: its tensors by the last word of their names, and the fp32 numbers they stand for."""

    tensors: dict[str, Tensor]
    numbers: Tensor


Encode = Callable[[Tensor], Encoded]  # [out, in] fp32


def quantise_checkpoint(path: Path, model: PreTrainedModel, encode: Encode, config: dict[str, Any]) -> PreTrainedModel:
    """Every `..._proj` of the checkpoint at `path` is stored anew, and in `model` replaced by the numbers it now stands for."""
    tensors = load_file(path / "model.safetensors")
    parameters = dict(model.named_parameters())
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        encoded = encode(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in encoded.tensors.items()}
        with torch.no_grad():
            parameters[name].copy_(encoded.numbers)
    save_file(tensors, path / "model.safetensors")
    edit_config(path, quantization_config=config)
    return model


# -- compressed-tensors


def compressed(stored: str, **weights: Any) -> tuple[Encode, dict[str, Any]]:
    """In the format `stored`, with these QuantizationArgs; and the quantization_config that belongs to it."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(stored)

    def encode(weight: Tensor) -> Encoded:
        low, high = _extremes(weight, args)
        scales, zeros = calculate_qparams(low, high, args)
        tensors = compressor.compress({"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}, scheme)
        return Encoded(tensors, compressor.decompress(tensors, scheme)["weight"])

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None, "output_activations": None}
    return encode, {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    if args.strategy == "tensor":
        return weight.min().view(1), weight.max().view(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size or 0))
        return groups.amin(-1), groups.amax(-1)
    assert args.block_structure is not None
    rows, columns = args.block_structure
    blocks = [list(strip.split(columns, 1)) for strip in weight.split(rows)]
    return tuple(torch.tensor([[float(f(b)) for b in strip] for strip in blocks]) for f in (torch.min, torch.max))  # type: ignore[return-value]


# -- fp8 with the scales of blocks, DeepSeek's way


def fp8_blocks(block: tuple[int, int], scale_name: str = "weight_scale_inv") -> Encode:
    """Blocks at the ends are cut short; scales are bf16, as Qwen's are."""

    def encode(weight: Tensor) -> Encoded:
        elements, numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        scales = []
        for top in range(0, weight.shape[0], block[0]):
            for left in range(0, weight.shape[1], block[1]):
                here = (slice(top, top + block[0]), slice(left, left + block[1]))
                scale = (weight[here].abs().max() / 448).bfloat16()
                elements[here] = (weight[here] / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
                numbers[here] = elements[here].float() * scale.float()
                scales.append(scale)
        grid = torch.stack(scales).view(-(-weight.shape[0] // block[0]), -1)
        return Encoded({"weight": elements, scale_name: grid}, numbers)

    return encode


def fp8_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"], **more}


# -- AWQ and GPTQ: integers of 4 or 8 bits in words of 32


def put(words: np.ndarray, at: tuple[int, int], place: int, bits: int, number: int) -> None:
    assert 0 <= number < 1 << bits
    words[at] |= np.uint32(number << (place * bits))


def awq(group: int) -> Encode:
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of a word, from its lowest bits up

    def encode(weight: Tensor) -> Encoded:
        w = weight.numpy().T  # [in, out]
        groups = [k // group for k in range(w.shape[0])]
        scales, zeros, q, numbers = _affine(w, groups, bits=4)
        qweight = np.zeros((w.shape[0], w.shape[1] // 8), np.uint32)
        qzeros = np.zeros((len(scales), w.shape[1] // 8), np.uint32)
        for word in range(w.shape[1] // 8):
            for place, column in enumerate(order):
                for k in range(w.shape[0]):
                    put(qweight, (k, word), place, 4, int(q[k, word * 8 + column]))
                for g in range(len(scales)):
                    put(qzeros, (g, word), place, 4, int(zeros[g, word * 8 + column]))
        return Encoded({"qweight": _int32(qweight), "qzeros": _int32(qzeros), "scales": torch.tensor(scales)}, numbers)

    return encode


def awq_config(group: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def gptq(bits: int, group: int, *, is_v1: bool, is_shuffled: bool = False, with_index: bool = True) -> Encode:
    def encode(weight: Tensor) -> Encoded:
        w = weight.numpy().T.copy()  # [in, out]
        w[:group, 0] = np.abs(w[:group, 0])  # its zero point is 0, which version 1 stores as -1
        groups = [k // group for k in range(w.shape[0])]
        if is_shuffled:
            random.Random(w.shape[0]).shuffle(groups)
        scales, zeros, q, numbers = _affine(w, groups, bits)
        per_word = 32 // bits
        qweight = np.zeros((w.shape[0] // per_word, w.shape[1]), np.uint32)
        qzeros = np.zeros((len(scales), w.shape[1] // per_word), np.uint32)
        for n in range(w.shape[1]):
            for k in range(w.shape[0]):
                put(qweight, (k // per_word, n), k % per_word, bits, int(q[k, n]))
            for g in range(len(scales)):
                put(qzeros, (g, n // per_word), n % per_word, bits, (int(zeros[g, n]) - is_v1) % (1 << bits))
        tensors = {"qweight": _int32(qweight), "qzeros": _int32(qzeros), "scales": torch.tensor(scales)}
        if with_index:
            tensors["g_idx"] = torch.tensor(groups, dtype=torch.int32)
        return Encoded(tensors, numbers)

    return encode


def gptq_config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": False, **more}


def _affine(w: np.ndarray, groups: list[int], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tensor]:
    """w [in, out] -> scales [groups, out] fp16, zero points, elements [in, out], and the numbers [out, in]."""
    largest = 2**bits - 1
    scales = np.zeros((max(groups) + 1, w.shape[1]), np.float16)
    zeros = np.zeros(scales.shape, np.int64)
    for g in range(len(scales)):
        members = w[[k for k, group in enumerate(groups) if group == g]]
        low, high = np.minimum(members.min(0), 0), np.maximum(members.max(0), 0)
        scales[g] = (high - low) / largest
        zeros[g] = np.clip(np.round(-low / scales[g].astype(np.float32)), 0, largest)
    wide = scales.astype(np.float32)[groups]
    q = np.clip(np.round(w / wide) + zeros[groups], 0, largest).astype(np.int64)
    return scales, zeros, q, torch.tensor(((q - zeros[groups]) * wide).T.astype(np.float32))


def _int32(words: np.ndarray) -> Tensor:
    return torch.tensor(words.view(np.int32))
