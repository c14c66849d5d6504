"""Quantised checkpoints load as the numbers their makers meant, and generate what transformers does with those numbers."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from splitfire.core.model_dir import ModelDir
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.kernels import linear as kernels_linear
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, Matrix, dequantise, quantise_rows
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import Transformer, Weights
from splitfire.engine.tensors import check_tensors, stored_weight_bytes
from tests.checkpoints import VOCAB, assert_greedy, edit_config, family_configs, save_checkpoint
from tests.engines import answers_of, drain, load_model, make_engine, make_spec, tokens_of
from tests.quantised import (
    Encode,
    Encoded,
    awq,
    awq_config,
    compressed,
    fp8_blocks,
    fp8_config,
    gptq,
    gptq_config,
    quantise_checkpoint,
)
from tests.worker.test_loading import tensors_of

CPU = torch.device("cpu")
INT, FLOAT = {"type": "int"}, {"type": "float", "num_bits": 8}

# name -> encoder and quantization_config
FORMATS: dict[str, tuple[Encode, dict[str, Any]]] = {
    "float-quantized tensor": compressed("float-quantized", **FLOAT, strategy="tensor"),
    "float-quantized channel": compressed("float-quantized", **FLOAT, strategy="channel"),
    "float-quantized block": compressed("float-quantized", **FLOAT, strategy="block", block_structure=[48, 40]),
    "naive-quantized float": compressed("naive-quantized", **FLOAT, strategy="tensor"),
    "int-quantized channel": compressed("int-quantized", **INT, num_bits=8, strategy="channel"),
    "int-quantized tensor": compressed("int-quantized", **INT, num_bits=8, strategy="tensor"),
    "int-quantized channel asymmetric": compressed("int-quantized", **INT, num_bits=8, strategy="channel", symmetric=False),
    "int-quantized group": compressed("int-quantized", **INT, num_bits=8, strategy="group", group_size=16),
    "pack-quantized int4 group": compressed("pack-quantized", **INT, num_bits=4, strategy="group", group_size=32),
    "pack-quantized int4 group asymmetric": compressed(
        "pack-quantized", **INT, num_bits=4, strategy="group", group_size=32, symmetric=False
    ),
    "pack-quantized int4 channel asymmetric": compressed("pack-quantized", **INT, num_bits=4, strategy="channel", symmetric=False),
    "pack-quantized int8 channel": compressed("pack-quantized", **INT, num_bits=8, strategy="channel"),
    "pack-quantized int8 group asymmetric": compressed(
        "pack-quantized", **INT, num_bits=8, strategy="group", group_size=16, symmetric=False
    ),
    "fp8 blocks": (fp8_blocks((32, 32)), fp8_config(weight_block_size=[32, 32])),
    "fp8 blocks cut short": (fp8_blocks((48, 40)), fp8_config(weight_block_size=[48, 40])),
    "fp8 tensor": (fp8_blocks((1000, 1000), "weight_scale"), fp8_config(activation_scheme="static")),
    "fbgemm_fp8": (fp8_blocks((1, 1000), "weight_scale"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "awq": (awq(32), awq_config(32)),
    "gptq": (gptq(4, 32, is_v1=True), gptq_config(4, 32)),
    "gptq without index": (gptq(4, 32, is_v1=True, with_index=False), gptq_config(4, 32, checkpoint_format="gptq")),
    "gptq desc_act": (gptq(4, 32, is_v1=True, is_shuffled=True), gptq_config(4, 32, desc_act=True)),
    "gptq_v2": (gptq(4, 16, is_v1=False), gptq_config(4, 16, checkpoint_format="gptq_v2")),
    "gptq int8 one group": (gptq(8, 1000, is_v1=True), gptq_config(8, -1)),
}
UNEVEN = ("float-quantized block", "fp8 blocks cut short")  # blocks of 40 columns: no kernel has such tiles
AS_STORED = ("int-quantized channel", "int-quantized tensor", "pack-quantized int8 channel")  # int8 with one scale a row


@dataclass(frozen=True, slots=True)
class Plain:
    """A checkpoint to quantise copies of."""

    path: Path
    model: PreTrainedModel

    def quantised(self, path: Path, encode: Encode, config: dict[str, Any]) -> PreTrainedModel:
        """At `path`; the model of the numbers it then stands for."""
        shutil.copytree(self.path, path, dirs_exist_ok=True)
        return quantise_checkpoint(path, copy.deepcopy(self.model), encode, config)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    path, config = tmp_path_factory.mktemp("plain"), family_configs()["llama"]
    config.num_hidden_layers = 2
    return Plain(path, save_checkpoint(config, path))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """With columns for tiles of 4 bits."""
    path, config = tmp_path_factory.mktemp("wide"), family_configs()["llama"]
    config.num_hidden_layers, config.hidden_size, config.head_dim, config.intermediate_size = 1, 128, 32, 256
    return Plain(path, save_checkpoint(config, path))


@pytest.fixture(autouse=True)
def tiles_of_64_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that matrices of 96 rows take two, the second one cut short."""
    monkeypatch.setattr(kernels_linear, "TILE_ELEMENTS", 1)


def load(path: Path, dtype: torch.dtype = torch.float32, is_int8: bool = False) -> Weights:
    return load_weights(ModelDir(path), LoadOptions(dtype, CPU, is_int8=is_int8))


def matrices_of(weights: Weights) -> dict[str, Matrix]:
    found = {"embed": weights.embed, "lm_head": weights.lm_head}
    for i, layer in enumerate(weights.layers):
        found |= {f"{i}.qkv": layer.qkv, f"{i}.out": layer.out, f"{i}.gate_up": layer.gate_up, f"{i}.down": layer.down}
    return found


def numbers_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The same matrices, of transformers' model."""
    state = model.state_dict()
    found = {"embed": state["model.embed_tokens.weight"], "lm_head": state["lm_head.weight"]}
    for i in range(model.config.num_hidden_layers):
        at = f"model.layers.{i}."
        found[f"{i}.qkv"] = torch.cat([state[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"])
        found[f"{i}.out"] = state[f"{at}self_attn.o_proj.weight"]
        found[f"{i}.gate_up"] = torch.cat([state[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up")])
        found[f"{i}.down"] = state[f"{at}mlp.down_proj.weight"]
    return found


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def generate_and_compare(path: Path, oracle: PreTrainedModel, is_int8: bool = False) -> None:
    engine = make_engine(load_model(path, is_int8=is_int8), block_size=16, chunk_tokens=48)
    draw = random.Random(0)
    specs = [make_spec([draw.randrange(VOCAB) for _ in range(length)], 8, block_size=16) for length in (3, 33, 120)]
    answers = answers_of(engine, specs)
    for spec in specs:
        assert_greedy(oracle, spec.prompt, answers[spec.seq_id])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_quantised_checkpoint_means_what_its_maker_meant(name: str, plain: Plain, tmp_path: Path) -> None:
    oracle = plain.quantised(tmp_path, *FORMATS[name])
    expected = numbers_of(oracle)
    for matrix, loaded in matrices_of(load(tmp_path)).items():
        assert isinstance(loaded, Tensor) and torch.equal(loaded, expected[matrix]), matrix
    for matrix, loaded in matrices_of(load(tmp_path, torch.bfloat16)).items():
        assert isinstance(loaded, Tensor) and torch.equal(loaded, expected[matrix].bfloat16()), matrix
    for matrix, loaded in matrices_of(load(tmp_path, is_int8=True)).items():
        assert isinstance(loaded, Int8Matrix)
        if name in AS_STORED and matrix not in ("embed", "lm_head"):
            assert torch.equal(loaded.elements * loaded.scales[:, None], expected[matrix]), f"{matrix} was rounded again"
        else:
            again = quantise_rows(expected[matrix])
            assert torch.equal(loaded.elements, again.elements) and torch.equal(loaded.scales, again.scales), matrix
    generate_and_compare(tmp_path, oracle)


def load_stored(path: Path, *, allow_nonfinite: bool = False) -> Weights:
    """With matrices that keep their bits; their memory is what was said."""
    model = ModelDir(path)
    weights = load_weights(model, LoadOptions(torch.float32, CPU, allow_nonfinite, keeps_stored=True))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights)}
    assert sum(held.values()) == stored_weight_bytes(model.config, "fp32", check_tensors(model.config, model.tensors()))
    return weights


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_quantised_checkpoint_keeps_its_bits_and_its_meaning(name: str, wide: Plain, tmp_path: Path) -> None:
    expected = numbers_of(wide.quantised(tmp_path, *FORMATS[name]))
    for at, loaded in matrices_of(load_stored(tmp_path)).items():
        if at in ("embed", "lm_head") or name in UNEVEN:
            assert isinstance(loaded, Tensor) and torch.equal(loaded, expected[at]), at
        else:
            assert isinstance(loaded, GroupedMatrix) and torch.equal(dequantise(loaded, slice(None)), expected[at]), at
            assert (loaded.order is not None) == (name == "gptq desc_act")


def test_products_of_stored_matrices_generate_what_their_numbers_do(wide: Plain, tmp_path: Path) -> None:
    for name in ("gptq desc_act", "fp8 blocks", "int-quantized channel asymmetric"):
        oracle = wide.quantised(tmp_path / name, *FORMATS[name])
        weights, config = load_stored(tmp_path / name), ModelDir(tmp_path / name).config
        model = Transformer(config, weights, rope_table(config.rope, config.head_dim, config.max_positions, CPU))
        engine, spec = make_engine(model), make_spec(range(100, 140), 8)
        engine.add(spec)
        assert_greedy(oracle, spec.prompt, tokens_of(drain(engine), spec))


def test_fused_matrices_of_several_forms_become_plain(wide: Plain, tmp_path: Path) -> None:
    """q in 4 bits, k and v in 8: what is not fused keeps its bits, and memory is counted so."""
    four, config = FORMATS["pack-quantized int4 group"]
    eight, more = FORMATS["float-quantized channel"]
    groups = {"a": {**config["config_groups"]["group_0"], "format": "pack-quantized"}}
    groups["b"] = {**more["config_groups"]["group_0"], "format": "float-quantized"}
    mixed = {**config, "format": "mixed-precision", "config_groups": groups}
    oracle = wide.quantised(tmp_path, lambda weight: (four if weight.shape[0] > 64 else eight)(weight), mixed)
    loaded, expected = matrices_of(load_stored(tmp_path)), numbers_of(oracle)
    qkv, out = loaded["0.qkv"], loaded["0.out"]
    assert isinstance(qkv, Tensor) and torch.equal(qkv, expected["0.qkv"])
    assert isinstance(out, GroupedMatrix) and out.is_int4


def test_zero_points_that_are_all_in_the_middle_are_left_out(wide: Plain, tmp_path: Path) -> None:
    """As symmetric GPTQ has them: 8, which version 1 stores as 7."""
    wide.quantised(tmp_path, *FORMATS["gptq"])

    def centre(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name].fill_(0x77777777)

    change_tensors(tmp_path, centre)
    weights = load_weights(ModelDir(tmp_path), LoadOptions(torch.float32, CPU, keeps_stored=True))
    plain = matrices_of(load(tmp_path))
    for name, matrix in matrices_of(weights).items():
        if isinstance(matrix, GroupedMatrix):
            assert matrix.zeros is None and torch.equal(dequantise(matrix, slice(None)), plain[name])  # type: ignore[arg-type]
    assert isinstance(weights.layers[0].down, GroupedMatrix)


def test_what_only_tensors_can_say_is_loaded_plainly(wide: Plain, tmp_path: Path) -> None:
    """Groups of unequal size, and numbers that are none."""
    at = "model.layers.0.mlp.down_proj."
    wide.quantised(tmp_path / "uneven", *FORMATS["gptq"])
    change_tensors(tmp_path / "uneven", lambda tensors: tensors[f"{at}g_idx"].__setitem__(0, 1))
    wide.quantised(tmp_path / "nan", *FORMATS["fp8 tensor"])
    change_tensors(tmp_path / "nan", lambda tensors: tensors[f"{at}weight"].view(torch.uint8)[3].__setitem__(5, 0x7F))
    for name in ("uneven", "nan"):
        options = LoadOptions(torch.float32, CPU, allow_nonfinite=True)
        plain, stored = (load_weights(ModelDir(tmp_path / name), replace(options, keeps_stored=k)).layers[0] for k in (False, True))
        assert isinstance(stored.down, Tensor) and isinstance(plain.down, Tensor) and isinstance(stored.out, GroupedMatrix)
        torch.testing.assert_close(stored.down, plain.down, rtol=0, atol=0, equal_nan=True)
        assert bool(stored.down.isnan().any()) == (name == "nan")


def test_biases_and_norms_of_the_heads_stay_what_they_are(tmp_path: Path) -> None:
    """qwen2: biases, tied embeddings; qwen3: norms of queries and keys."""
    for name, family in (("gptq", "qwen2"), ("pack-quantized int4 group", "qwen3"), ("fp8 blocks", "qwen2")):
        path = tmp_path / family / name
        oracle = quantise_checkpoint(path, save_checkpoint(family_configs()[family], path), *FORMATS[name])
        generate_and_compare(path, oracle)


def test_awq_reads_as_another_reader_reads_it(plain: Plain, tmp_path: Path) -> None:
    plain.quantised(tmp_path, *FORMATS["awq"])
    tensors, converter = load_file(tmp_path / "model.safetensors"), AutoAWQConverter(group_size=32)
    at = "model.layers.1.mlp.down_proj."
    elements, scales, zeros = converter._convert_gemm_module(
        tensors[f"{at}qweight"], tensors[f"{at}scales"], tensors[f"{at}qzeros"]
    )
    assert zeros is not None
    numbers = (elements.float() - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)
    loaded = load(tmp_path).layers[1].down
    assert isinstance(loaded, Tensor) and torch.equal(loaded, numbers)


def test_columns_in_an_order_of_their_own_find_their_scale(plain: Plain, tmp_path: Path) -> None:
    """compressed-tensors with actorder group: what was quantised are the columns sorted by group, and stored as they came."""
    encode, config = compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=16, symmetric=False)

    def shuffled(weight: Tensor) -> Encoded:
        groups = torch.arange(weight.shape[1]) // 16
        index = groups[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))]
        by_group = index.argsort(stable=True)
        encoded = encode(weight[:, by_group].contiguous())
        back = by_group.argsort()
        words = encoded.tensors["weight_packed"]
        nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1)[:, back]
        packed = sum(nibbles.unflatten(1, (-1, 8))[:, :, i].long() << (4 * i) for i in range(8))
        assert isinstance(packed, Tensor)
        stored = {**encoded.tensors, "weight_packed": packed.to(torch.uint32).view(torch.int32), "weight_g_idx": index.int()}
        return Encoded(stored, encoded.numbers[:, back])

    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    oracle = plain.quantised(tmp_path, shuffled, config)
    loaded = matrices_of(load(tmp_path))
    assert all(torch.equal(loaded[name], numbers) for name, numbers in numbers_of(oracle).items())  # type: ignore[arg-type]


def test_matrices_of_one_checkpoint_may_be_stored_in_several_ways(plain: Plain, tmp_path: Path) -> None:
    """Mixed precision, and layers that were left alone: what the tensors say counts, not a pattern of names."""
    four, config = FORMATS["pack-quantized int4 group"]
    eight, more = compressed("float-quantized", type="float", num_bits=8, strategy="channel")

    def encode(weight: Tensor) -> Encoded:
        if weight.shape == (64, 96):
            return Encoded({"weight": weight}, weight)
        return four(weight) if weight.shape[0] == 96 else eight(weight)

    groups = {"a": {**config["config_groups"]["group_0"], "format": "pack-quantized"}}
    groups["b"] = {**more["config_groups"]["group_0"], "format": "float-quantized"}
    mixed = {**config, "format": "mixed-precision", "config_groups": groups, "ignore": ["re:(a+)+$"]}
    oracle = plain.quantised(tmp_path, encode, mixed)
    loaded = matrices_of(load(tmp_path))
    assert all(torch.equal(loaded[name], numbers) for name, numbers in numbers_of(oracle).items())  # type: ignore[arg-type]


def test_a_quantised_head_and_embedding(plain: Plain, tmp_path: Path) -> None:
    encode, config = FORMATS["int-quantized channel"]
    oracle = plain.quantised(tmp_path, *FORMATS["int-quantized channel"])
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("lm_head", "model.embed_tokens"):
        encoded = encode(tensors.pop(f"{name}.weight"))
        tensors |= {f"{name}.{part}": tensor for part, tensor in encoded.tensors.items()}
        with torch.no_grad():
            dict(oracle.named_parameters())[f"{name}.weight"].copy_(encoded.numbers)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config={**config, "ignore": []})
    generate_and_compare(tmp_path, oracle)
    generate_and_compare(tmp_path, oracle, is_int8=True)


def test_scales_of_activations_and_kv_are_left_alone_and_named(plain: Plain, tmp_path: Path) -> None:
    oracle = plain.quantised(tmp_path, *FORMATS["float-quantized tensor"])

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.input_scale"] = torch.tensor([0.5])
        tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
        tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor([0.5])

    change_tensors(tmp_path, add)
    model = ModelDir(tmp_path)
    assert len(check_tensors(model.config, model.tensors()).unused) == 3
    assert torch.equal(matrices_of(load(tmp_path))["0.down"], numbers_of(oracle)["0.down"])  # type: ignore[arg-type]


def test_biases_of_zero_that_autogptq_adds_are_left_out(plain: Plain, tmp_path: Path) -> None:
    oracle = plain.quantised(tmp_path, *FORMATS["gptq"])
    name = "model.layers.0.self_attn.o_proj.bias"
    change_tensors(tmp_path, lambda t: t.update({name: torch.zeros(64, dtype=torch.float16)}))
    generate_and_compare(tmp_path, oracle)


def test_a_checkpoint_in_shards_whose_scales_are_in_another_one(plain: Plain, tmp_path: Path) -> None:
    oracle = plain.quantised(tmp_path, *FORMATS["gptq"])
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("scales")}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(scales, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {**dict.fromkeys(tensors, "a.safetensors"), **dict.fromkeys(scales, "b.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(names).replace(chr(39), chr(34))}}}')
    assert torch.equal(matrices_of(load(tmp_path))["1.qkv"], numbers_of(oracle)["1.qkv"])  # type: ignore[arg-type]
