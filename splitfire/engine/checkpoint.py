"""Weights from a model directory: safetensors only, every tensor checked by name, shape and finiteness before use.

Names are those of Hugging Face's Llama layout, which all supported families share. Shards are read by the safetensors
library into memory of our own, so a file that changes afterwards changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfire.core.errors import ModelError
from splitfire.core.model_config import ModelConfig
from splitfire.core.model_dir import ModelDir, TensorEntry
from splitfire.engine.kernels.rope import QkNorm
from splitfire.engine.models.transformer import LayerWeights, Weights

LOADABLE = ("BF16", "F16", "F32")
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How weights are to be held."""

    dtype: torch.dtype
    device: torch.device
    allow_nonfinite: bool = False


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the checkpoint must hold."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * dim, config.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        matrices = {
            "self_attn.q_proj": ((q_rows, hidden), config.qkv_bias),
            "self_attn.k_proj": ((kv_rows, hidden), config.qkv_bias),
            "self_attn.v_proj": ((kv_rows, hidden), config.qkv_bias),
            "self_attn.o_proj": ((hidden, q_rows), config.o_bias),
            "mlp.gate_proj": ((inner, hidden), config.mlp_bias),
            "mlp.up_proj": ((inner, hidden), config.mlp_bias),
            "mlp.down_proj": ((hidden, inner), config.mlp_bias),
        }
        for name, (shape, has_bias) in matrices.items():
            shapes[f"{at}{name}.weight"] = shape
            if has_bias:
                shapes[f"{at}{name}.bias"] = shape[:1]
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (dim,)
    return shapes


def check_tensors(config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
    """ModelError naming the first tensor that is missing, extra, of another shape or of a dtype that cannot be loaded."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise ModelError(f"tensor {name} is missing; config.json asks for it")
        if entry.shape != shape:
            raise ModelError(f"{entry.file.name}: tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        if entry.dtype not in LOADABLE:
            raise ModelError(f"{entry.file.name}: tensor {name} is {entry.dtype}, accepted: {', '.join(LOADABLE)}")
    for name in entries:
        is_known_leftover = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)
        if name not in expected and not is_known_leftover:
            raise ModelError(f"{entries[name].file.name}: tensor {name} is not part of a {config.family} model")


def load_weights(model: ModelDir, options: LoadOptions, progress: Progress | None = None) -> Weights:
    """Reads, checks and fuses all weights. ModelError when anything is not as config.json says."""
    entries = model.tensors()
    check_tensors(model.config, entries)
    tensors = dict(_read_all(entries, expected_shapes(model.config), options, progress))
    return _assemble(model.config, tensors)


def _read_all(
    entries: dict[str, TensorEntry], wanted: dict[str, tuple[int, ...]], options: LoadOptions, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    total = sum(torch.Size(shape).numel() for shape in wanted.values())
    done = 0
    for file in dict.fromkeys(entries[name].file for name in wanted):
        try:
            with safe_open(str(file), framework="pt", device="cpu") as reader:
                for name in (n for n in wanted if entries[n].file == file):
                    tensor = reader.get_tensor(name).to(options.dtype, copy=True)
                    if not options.allow_nonfinite and not bool(torch.isfinite(tensor).all()):
                        raise ModelError(
                            f"{file.name}: tensor {name} has NaN or infinite values; --allow-nonfinite loads it anyway"
                        )
                    yield name, tensor.to(options.device)
                    done += tensor.numel()
                    if progress is not None:
                        progress(done, total)
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{file.name}: {exc}") from exc


def _assemble(config: ModelConfig, tensors: dict[str, Tensor]) -> Weights:
    embed = tensors["model.embed_tokens.weight"]
    layers = tuple(_layer(config, tensors, f"model.layers.{i}.") for i in range(config.num_layers))
    lm_head = embed if config.tie_word_embeddings else tensors["lm_head.weight"]
    return Weights(embed, layers, tensors["model.norm.weight"], lm_head)


def _layer(config: ModelConfig, tensors: dict[str, Tensor], at: str) -> LayerWeights:
    """Pops its tensors, so that fused copies do not double the memory."""

    def fuse(names: tuple[str, ...], kind: str) -> Tensor | None:
        parts = [tensors.pop(f"{at}{name}.{kind}", None) for name in names]
        present = [part for part in parts if part is not None]
        if not present:
            return None
        return present[0] if len(present) == 1 else torch.cat(present)

    def matrix(*names: str) -> Tensor:
        fused = fuse(names, "weight")
        assert fused is not None  # check_tensors has seen them all
        return fused

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    norm = None
    if config.qk_norm:
        norm = QkNorm(matrix("self_attn.q_norm"), matrix("self_attn.k_norm"), config.rms_norm_eps)
    return LayerWeights(
        input_norm=matrix("input_layernorm"),
        qkv=matrix(*qkv),
        qkv_bias=fuse(qkv, "bias"),
        qk_norm=norm,
        out=matrix("self_attn.o_proj"),
        out_bias=fuse(("self_attn.o_proj",), "bias"),
        post_norm=matrix("post_attention_layernorm"),
        gate_up=matrix(*gate_up),
        gate_up_bias=fuse(gate_up, "bias"),
        down=matrix("mlp.down_proj"),
        down_bias=fuse(("mlp.down_proj",), "bias"),
    )
