"""config.json and generation_config.json as frozen objects, for dense Llama 2/3, Mistral, Qwen2/2.5 and Qwen3.

Reads both spellings of the rope settings (`rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`).
Whatever this version cannot run exactly is refused by name, never approximated. Pure: no tensors, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitfire.core import limits
from splitfire.core.json_fields import JsonFields
from splitfire.core.quant_config import QuantConfig, parse_quant_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the numbers a type does not use keep their defaults."""

    rope_type: str
    theta: float
    factor: float = 1.0
    original_positions: int = 0  # the length the model was trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder-only transformer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # per layer: how many of the last tokens are seen, itself included; None: all
    rope: RopeConfig
    max_positions: int
    stored_dtype: str  # bf16, fp16 or fp32
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    quant: QuantConfig | None = None  # how the checkpoint's matrices are stored; None: in bf16, fp16 or fp32


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets for what it leaves unset."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def parse_config(values: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """config.json as a ModelConfig; end-of-sequence ids of generation_config.json are added."""
    read = JsonFields("config.json", values)
    if values.get("auto_map"):
        raise read.fail("auto_map", "custom code is never loaded; use a checkpoint whose architecture is built in")
    family = read.string("model_type")
    if family not in FAMILIES:
        raise read.fail("model_type", f"is {family!r}, accepted: {', '.join(FAMILIES)}")
    for unsupported, off in (("num_local_experts", None), ("num_experts", None), ("partial_rotary_factor", 1.0)):
        if values.get(unsupported, off) not in (None, off):
            raise read.fail(unsupported, f"is {values[unsupported]!r}, not supported by this version")
    if read.string("hidden_act", "silu") not in ("silu", "swish"):
        raise read.fail("hidden_act", f"is {values['hidden_act']!r}, accepted: silu")

    hidden = read.integer("hidden_size", 1, limits.MAX_HIDDEN_SIZE)
    heads = read.integer("num_attention_heads", 1, hidden)
    kv_heads = read.integer("num_key_value_heads", 1, limits.MAX_HIDDEN_SIZE, default=heads)
    if heads % kv_heads:
        raise read.fail("num_key_value_heads", f"is {kv_heads}, which does not divide num_attention_heads = {heads}")
    if values.get("head_dim") is None and hidden % heads:
        raise read.fail("num_attention_heads", f"is {heads}, which does not divide hidden_size = {hidden}")
    head_dim = read.integer("head_dim", 2, 1024, default=hidden // heads)
    if head_dim % 8:
        raise read.fail("head_dim", f"is {head_dim}, accepted: a multiple of 8")
    num_layers = read.integer("num_hidden_layers", 1, limits.MAX_LAYERS)
    vocab = read.integer("vocab_size", 1, limits.MAX_VOCAB_SIZE)
    positions = read.integer("max_position_embeddings", 1, limits.MAX_POSITIONS)
    attention_bias = read.boolean("attention_bias", family == "qwen2")
    eos = read.token_ids("eos_token_id", vocab)
    bos = read.token_ids("bos_token_id", vocab)
    if generation is not None:
        eos = tuple(dict.fromkeys((*eos, *JsonFields("generation_config.json", generation).token_ids("eos_token_id", vocab))))
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=read.integer("intermediate_size", 1, 8 * limits.MAX_HIDDEN_SIZE),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=read.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        tie_word_embeddings=read.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=read.boolean("mlp_bias", False),
        qk_norm=family == "qwen3",
        windows=_windows(read, family, num_layers),
        rope=_rope(read, positions),
        max_positions=positions,
        stored_dtype=_stored_dtype(read),
        eos_token_ids=eos,
        bos_token_id=bos[0] if bos else None,
        quant=parse_quant_config(read),
    )


def parse_generation_defaults(values: Mapping[str, object] | None) -> GenerationDefaults:
    """generation_config.json's sampling defaults; out of range ones are refused by name (B102)."""
    if values is None:
        return GenerationDefaults()
    read = JsonFields("generation_config.json", values)
    sampled = read.boolean("do_sample", True)
    temperature = read.number("temperature", 0.0, limits.MAX_TEMPERATURE, default=1.0)
    return GenerationDefaults(
        temperature=temperature if sampled else 1.0,
        top_p=read.number("top_p", 1e-9, 1.0, default=1.0) if sampled else 1.0,
        top_k=max(0, read.integer("top_k", -1, limits.MAX_VOCAB_SIZE, default=0)) if sampled else 0,
        min_p=read.number("min_p", 0.0, 1.0, default=0.0),
        repetition_penalty=read.number("repetition_penalty", 1e-3, limits.MAX_REPETITION_PENALTY, default=1.0),
    )


def _stored_dtype(read: JsonFields) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    stored = read.values.get("dtype") or read.values.get("torch_dtype") or "float32"
    if not isinstance(stored, str) or stored not in names:
        raise read.fail("dtype", f"is {stored!r}, accepted: {', '.join(names)}")
    return names[stored]


def _windows(read: JsonFields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows per layer, as the families spell them."""
    window = None
    if read.values.get("sliding_window") is not None:
        window = read.integer("sliding_window", 1, limits.MAX_POSITIONS)
    if family in ("qwen2", "qwen3") and not read.boolean("use_sliding_window", False):
        window = None
    if window is None or family == "llama":
        return (None,) * num_layers
    kinds = read.values.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise read.fail("layer_types", f"accepted: {num_layers} entries of full_attention or sliding_attention")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "mistral":
        return (window,) * num_layers
    first = read.integer("max_window_layers", 0, limits.MAX_LAYERS, default=28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _rope(read: JsonFields, positions: int) -> RopeConfig:
    parameters = read.mapping("rope_parameters")
    scaling = parameters if parameters is not None else read.mapping("rope_scaling")
    theta_from = parameters if parameters is not None and "rope_theta" in parameters else read.values
    theta = JsonFields("config.json", theta_from).number("rope_theta", 1.0, 1e12, default=10000.0)
    if scaling is None:
        return RopeConfig("default", theta)
    inner = JsonFields("config.json: rope_scaling", scaling)
    rope_type = inner.string("rope_type", inner.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise inner.fail("rope_type", f"is {rope_type!r}, accepted: {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor") not in (None, 1.0):
        raise inner.fail("partial_rotary_factor", f"is {scaling['partial_rotary_factor']!r}, not supported by this version")
    if rope_type == "default":
        return RopeConfig("default", theta)
    original = inner.integer("original_max_position_embeddings", 1, limits.MAX_POSITIONS, default=positions)
    return RopeConfig(
        rope_type,
        theta,
        factor=inner.number("factor", 1.0, 1e6),
        original_positions=original if rope_type in ("llama3", "yarn") else positions,
        low_freq_factor=inner.number("low_freq_factor", 1e-6, 1e6, default=1.0),
        high_freq_factor=inner.number("high_freq_factor", 1e-6, 1e6, default=4.0),
        beta_fast=inner.number("beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=inner.number("beta_slow", 1e-6, 1e6, default=1.0),
        attention_factor=inner.optional_number("attention_factor", 1e-6, 1e6),
        mscale=inner.optional_number("mscale", 0.0, 1e6),
        mscale_all_dim=inner.optional_number("mscale_all_dim", 0.0, 1e6),
        truncate=inner.boolean("truncate", True),
    )
