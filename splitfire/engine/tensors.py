"""Which tensors a checkpoint must hold, and how each of its matrices is stored: checked against headers, before anything is read.

Names are those of Hugging Face's Llama layout, which all supported families share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitfire.core.errors import ModelError
from splitfire.core.layout import DTYPE_BYTES
from splitfire.core.model_config import ModelConfig
from splitfire.core.model_dir import TensorEntry
from splitfire.core.quant_config import QuantConfig, Scheme
from splitfire.engine.formats.families import FAMILIES
from splitfire.engine.formats.held import ORDER_BYTES, form_of
from splitfire.engine.formats.stored import FLOATS, Part, StoredMatrix, meaning_on, plain_part, require_groups, require_part

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm.weight"
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))  # of a layer, by rows
OF_LINEAR_LAYERS = ("awq", "gptq")  # transposed: an embedding has no such form
# Written beside quantised matrices, for what is not done here: quantised activations, and a KV cache with calibrated scales.
UNUSED = frozenset(
    (
        *(f"{name}_scale" for name in ("input", "output", "activation", "q", "k", "v")),
        *(f"{name}_zero_point" for name in ("input", "output", "q", "k", "v")),
        "input_scale_ub",
    )
)


@dataclass(frozen=True, slots=True)
class CheckedTensors:
    """Of one checkpoint."""

    matrices: tuple[StoredMatrix, ...]
    vectors: Mapping[str, TensorEntry]  # norms and biases
    zeros: Mapping[str, TensorEntry]  # biases that the model does not have; they may be there if they are zero
    unused: tuple[str, ...]  # scales of activations and of the KV cache


def expected_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of every matrix, by its name without `.weight`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {EMBEDDING: (config.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        shapes[f"{at}self_attn.q_proj"] = (q_rows, hidden)
        shapes[f"{at}self_attn.k_proj"] = shapes[f"{at}self_attn.v_proj"] = (kv_rows, hidden)
        shapes[f"{at}self_attn.o_proj"] = (hidden, q_rows)
        shapes[f"{at}mlp.gate_proj"] = shapes[f"{at}mlp.up_proj"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj"] = (hidden, inner)
    return shapes


def expected_vectors(config: ModelConfig) -> dict[str, int]:
    """The length of every norm and bias."""
    lengths = {NORM: config.hidden_size}
    biased = {"q_proj": config.qkv_bias, "k_proj": config.qkv_bias, "v_proj": config.qkv_bias, "o_proj": config.o_bias}
    for name, (rows, _) in expected_matrices(config).items():
        if name not in (EMBEDDING, HEAD) and biased.get(name.rpartition(".")[2], config.mlp_bias):
            lengths[f"{name}.bias"] = rows
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        lengths[f"{at}input_layernorm.weight"] = lengths[f"{at}post_attention_layernorm.weight"] = config.hidden_size
        if config.qk_norm:
            lengths[f"{at}self_attn.q_norm.weight"] = lengths[f"{at}self_attn.k_norm.weight"] = config.head_dim
    return lengths


def check_tensors(config: ModelConfig, entries: Mapping[str, TensorEntry]) -> CheckedTensors:
    """ModelError naming the first tensor that is missing, extra, of another shape or of a dtype that cannot be loaded."""
    matrices = tuple(_stored(config, name, shape, entries) for name, shape in expected_matrices(config).items())
    vectors = expected_vectors(config)
    for name, length in vectors.items():
        require_part(name, Part(((length,),), FLOATS), entries.get(name), "config.json")
    used = {f"{matrix.name}.{part}" for matrix in matrices for part in matrix.parts} | vectors.keys()
    zeros, unused = {}, []
    for name, entry in entries.items():
        if name in used or name.endswith("rotary_emb.inv_freq") or (name == f"{HEAD}.weight" and config.tie_word_embeddings):
            continue
        module, _, part = name.rpartition(".")
        if config.quant is not None and part in UNUSED:
            unused.append(name)
        elif config.quant is not None and config.quant.method == "gptq" and part == "bias" and f"{module}.qweight" in used:
            zeros[name] = entry  # AutoGPTQ writes one for every matrix
        else:
            raise ModelError(f"{entry.file.name}: tensor {name} is not part of a {config.family} model")
    return CheckedTensors(matrices, {name: entries[name] for name in vectors}, zeros, tuple(unused))


def weight_bytes(config: ModelConfig, dtype: str, is_int8: bool) -> int:
    """What the weights take when they are loaded."""
    matrices = expected_matrices(config).values()
    plain = sum(expected_vectors(config).values()) * DTYPE_BYTES[dtype]
    if is_int8:
        return plain + sum(rows * (columns + DTYPE_BYTES["fp32"]) for rows, columns in matrices)
    return plain + sum(rows * columns for rows, columns in matrices) * DTYPE_BYTES[dtype]


def stored_weight_bytes(config: ModelConfig, dtype: str, checked: CheckedTensors) -> int:
    """What they take when quantised matrices keep the bits they are stored in."""
    fused: dict[str, list[StoredMatrix]] = {}
    for matrix in checked.matrices:
        names = next((names for names in FUSED if matrix.name.endswith(names)), ())
        layer = matrix.name.rpartition(".")[0]
        fused.setdefault(f"{layer}.{'|'.join(names)}" if names else matrix.name, []).append(matrix)
    total = sum(expected_vectors(config).values()) * DTYPE_BYTES[dtype]
    for parts in fused.values():
        forms = [form_of(part) for part in parts]
        first = forms[0]
        if first is None or len(set(forms)) > 1:
            total += sum(part.rows * part.columns for part in parts) * DTYPE_BYTES[dtype]
        else:
            total += sum(first.num_bytes(part.rows, part.columns) for part in parts)
            total += first.has_order * ORDER_BYTES * parts[0].columns
    return total


def weight_format(quant: QuantConfig | None, is_int8: bool) -> str:
    """What the weights went through; equal on workers that exchange KV. At most 32 characters."""
    stored = "plain" if quant is None else quant.method
    return stored if not is_int8 else "int8" if quant is None else f"{stored}+int8"


def _stored(config: ModelConfig, name: str, shape: tuple[int, int], entries: Mapping[str, TensorEntry]) -> StoredMatrix:
    weight = entries.get(f"{name}.weight")
    schemes = [] if config.quant is None else list(config.quant.schemes)
    if name == EMBEDDING:
        schemes = [scheme for scheme in schemes if scheme.layout not in OF_LINEAR_LAYERS]
    if not schemes or (weight is not None and weight.dtype in FLOATS):
        return _fitting(name, shape, None, plain_part(*shape), entries)
    found, problems = [], []
    for scheme in schemes:
        try:
            found.append(_fitting(name, shape, scheme, FAMILIES[scheme.layout].parts(scheme, *shape), entries))
        except ModelError as exc:
            problems.append(exc)
    if not found:
        raise problems[0]
    if len({meaning_on(matrix.scheme, *shape) for matrix in found if matrix.scheme is not None}) > 1:
        raise ModelError(f"tensor {name}: fits groups of the quantization_config that mean different numbers")
    return found[0]


def _fitting(
    name: str, shape: tuple[int, int], scheme: Scheme | None, parts: dict[str, Part], entries: Mapping[str, TensorEntry]
) -> StoredMatrix:
    """ModelError when the tensors of this name are not these parts."""
    asked_by = "config.json" if scheme is None else "quantization_config"
    found = {}
    for part_name, part in parts.items():
        entry = entries.get(f"{name}.{part_name}")
        require_part(f"{name}.{part_name}", part, entry, asked_by)
        if entry is not None:
            found[part_name] = entry
    if scheme is not None:
        require_groups(name, scheme, shape[1])
    return StoredMatrix(name, *shape, scheme, found)
