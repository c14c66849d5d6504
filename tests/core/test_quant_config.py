"""B104: what a quantization_config says is understood exactly or refused by name; nothing in it runs, nothing in it crashes."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfire.core import limits
from splitfire.core.errors import ModelError
from splitfire.core.json_fields import JsonFields
from splitfire.core.quant_config import Grid, QuantConfig, Scheme, parse_quant_config

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
    "config_groups": {"group_0": GROUP}, "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
}  # fmt: skip
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.1}


def parse(config: object) -> QuantConfig | None:
    return parse_quant_config(JsonFields("config.json", {"quantization_config": config}))


def refusal(config: object) -> str:
    with pytest.raises(ModelError) as caught:
        parse(config)
    line = str(caught.value)
    assert line.startswith("config.json: quantization_config") and "\n" not in line
    return line.removeprefix("config.json: ")


def with_weights(stored: str = "pack-quantized", **changes: object) -> dict[str, Any]:
    config = copy.deepcopy(COMPRESSED)
    config["format"] = stored
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


def only(config: object) -> Scheme:
    parsed = parse(config)
    assert parsed is not None and len(parsed.schemes) == 1
    return parsed.schemes[0]


def test_no_config_is_no_config() -> None:
    assert parse(None) is None
    assert parse_quant_config(JsonFields("config.json", {})) is None


def test_an_unknown_method_is_refused_by_name() -> None:
    accepted = "accepted: compressed-tensors, fp8, fbgemm_fp8, awq, gptq"
    assert refusal({"quant_method": "bitsandbytes"}) == f"quantization_config.quant_method: is 'bitsandbytes', {accepted}"
    assert refusal({"load_in_4bit": True}) == f"quantization_config.quant_method: is None, {accepted}"


def test_what_the_makers_write_is_understood() -> None:
    assert only(AWQ) == Scheme("awq", 4, Grid(1, 128), has_zeros=True, scale_name="scales")
    assert only({**AWQ, "version": "GEMM", "group_size": -1}).grid == Grid(1, None)
    gptq = Scheme("gptq", 4, Grid(1, 128), has_zeros=True, scale_name="scales", zero_offset=1)
    assert only(GPTQ) == gptq == only({**GPTQ, "checkpoint_format": "gptq"})
    assert only({**GPTQ, "checkpoint_format": "gptq_v2"}).zero_offset == 0
    assert only({**GPTQ, "desc_act": True}).is_reordered
    assert only(COMPRESSED) == Scheme("packed", 4, Grid(1, 128))
    assert only(with_weights(actorder="group")).is_reordered
    assert not only(with_weights(actorder="weight")).is_reordered
    channel = with_weights("int-quantized", num_bits=8, strategy="channel", group_size=None, symmetric=False)
    assert only(channel) == Scheme("int8", 8, Grid(1, None), has_zeros=True)
    block = with_weights("float-quantized", num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 64])
    assert only(block) == Scheme("fp8", 8, Grid(128, 64))
    assert only({"quant_method": "fbgemm_fp8"}) == Scheme("fp8", 8, Grid(1, None))


def test_fp8_scales_go_by_two_names() -> None:
    parsed = parse(FP8)
    assert parsed is not None
    assert [(s.grid, s.scale_name) for s in parsed.schemes] == [
        (Grid(128, 128), "weight_scale_inv"), (Grid(128, 128), "weight_scale")
    ]  # fmt: skip
    whole = parse({"quant_method": "fp8", "activation_scheme": "static"})
    assert whole is not None and {s.grid for s in whole.schemes} == {Grid(None, None), Grid(1, None)}


def test_a_strategy_that_is_not_said_follows_from_the_group_size() -> None:
    """As compressed-tensors has it."""
    for size, grid in ((None, Grid(None, None)), (-1, Grid(1, None)), (64, Grid(1, 64))):
        assert only(with_weights(strategy=None, group_size=size)).grid == grid


def test_a_checkpoint_that_quantises_kv_or_activations_only_has_plain_weights() -> None:
    config = {**COMPRESSED, "format": "dense", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert parse(config) == QuantConfig("compressed-tensors", ())
    assert parse({**COMPRESSED, "config_groups": {"a": {**GROUP, "weights": None}}}) == QuantConfig("compressed-tensors", ())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "quantization_config: is [], accepted: an object or null"),
        ({**AWQ, "bits": 8}, "bits: is 8, accepted: 4"),
        ({**AWQ, "bits": True}, "bits: is True, accepted: 4"),
        ({**AWQ, "bits": "4"}, "bits: is '4', accepted: 4"),
        ({**AWQ, "version": "gemv"}, "version: is 'gemv', accepted: gemm"),
        ({**AWQ, "version": None, "checkpoint_format": "llm-awq"}, "checkpoint_format: is 'llm-awq', accepted: gemm"),
        ({**AWQ, "zero_point": False}, "zero_point: is False, accepted: true"),
        ({**AWQ, "group_size": 0}, "group_size: is 0, accepted: an integer from 1 to"),
        ({**AWQ, "group_size": -2}, "group_size: is -2"),
        ({**GPTQ, "bits": 3}, "bits: is 3, accepted: 4, 8"),
        ({**GPTQ, "bits": None}, "bits: is None, accepted: 4, 8"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: is 'marlin', accepted: gptq, gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format: is True, accepted: false"),
        ({**GPTQ, "desc_act": "yes"}, "desc_act: is 'yes', accepted: true or false"),
        ({**GPTQ, "group_size": 10**9}, "group_size: is 1000000000"),
        ({**FP8, "fmt": "e5m2"}, "fmt: is 'e5m2', accepted: e4m3"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size: is [128], accepted: two integers"),
        ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size: is [128, 0]"),
        ({**FP8, "weight_block_size": [128, True]}, "weight_block_size: is [128, True]"),
        ({**FP8, "weight_block_size": 128}, "weight_block_size: is 128"),
        ({**COMPRESSED, "format": "nvfp4-pack-quantized"}, "format: is 'nvfp4-pack-quantized', accepted: float-quantized"),
        ({**COMPRESSED, "format": "marlin-24"}, "format: is 'marlin-24'"),
        ({**COMPRESSED, "config_groups": None}, "config_groups: accepted: an object"),
        ({**COMPRESSED, "config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16: is ['Linear'], accepted: an object or null"),
        ({**COMPRESSED, "config_groups": {str(i): GROUP for i in range(65)}}, "config_groups: accepted: an object of at most 64"),
        ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format: is 'sparse-24-bitmask', accepted"),
        ({**COMPRESSED, "transform_config": {"config_groups": {"v": {}}}}, "transform_config: transforms"),
        ({**COMPRESSED, "config_groups": {"a": {**GROUP, "format": "mxfp4-pack-quantized"}}}, "config_groups.a.format: is 'mxfp4"),
        ({**COMPRESSED, "config_groups": {"a": {**GROUP, "format": "mixed-precision"}}}, "config_groups.a.format: accepted in a group"),
        (with_weights(num_bits=3), "config_groups.group_0.weights.num_bits: is 3, accepted: 4, 8"),
        (with_weights(type="float"), "weights.type: is 'float', accepted: int"),
        (with_weights("float-quantized"), "weights.type: is 'int', accepted: float"),
        (with_weights("float-quantized", type="float"), "weights.num_bits: is 4, accepted: 8"),
        (with_weights("float-quantized", type="float", num_bits=8, symmetric=False), "weights.symmetric: is False"),
        (with_weights(dynamic=True), "weights.dynamic: is True, accepted for weights: false"),
        (with_weights(strategy="tensor_group"), "weights.strategy: is 'tensor_group', accepted: tensor, channel, group, block"),
        (with_weights(group_size=0), "weights.group_size: is 0"),
        (with_weights(group_size="x"), "weights.group_size: is 'x'"),
        (with_weights(strategy="block", block_structure="128x128"), "weights.block_structure: is '128x128'"),
        (with_weights(strategy="tensor", group_size=None, symmetric=False), "weights.strategy: accepted for asymmetric packed"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_named(config: object, says: str) -> None:
    assert says in refusal(config)


def test_as_many_groups_as_are_allowed() -> None:
    assert only({**COMPRESSED, "config_groups": {str(i): GROUP for i in range(limits.MAX_QUANT_GROUPS)}}) == only(COMPRESSED)


def test_a_regular_expression_of_a_file_is_never_run() -> None:
    began = time.monotonic()
    evil = "re:(a+)+$"
    parse({**COMPRESSED, "ignore": [evil], "config_groups": {"a": {**GROUP, "targets": [evil]}}})
    parse({**GPTQ, "dynamic": {evil: {}}})
    assert time.monotonic() - began < 1


FIELDS = sorted({*COMPRESSED, *FP8, *AWQ, *GPTQ, *GROUP, *WEIGHTS, "actorder", "block_structure", "w_bit", "q_group_size"})
WORDS = [
    "awq",
    "gptq",
    "fp8",
    "compressed-tensors",
    "pack-quantized",
    "dense",
    "group",
    "block",
    "int",
    "float",
    "gemm",
    "e4m3",
    "x",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "a"]), inner, max_size=6),
    max_leaves=20,
)


@given(
    base=st.sampled_from([COMPRESSED, FP8, AWQ, GPTQ, with_weights("int-quantized")]),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
    weights=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4),
)
def test_anything_else_is_refused_in_one_line(base: dict[str, Any], changes: dict[str, Any], weights: dict[str, Any]) -> None:
    config = copy.deepcopy(base) | changes
    groups = config.get("config_groups")
    if isinstance(groups, dict) and isinstance(groups.get("group_0"), dict):
        groups["group_0"]["weights"] = {**WEIGHTS, **weights}
    try:
        parsed = parse(config)
    except ModelError as exc:
        assert "\n" not in str(exc)
    else:
        assert parsed is not None
        for scheme in parsed.schemes:
            assert all(side >= 1 for side in scheme.grid.shape(64, 96)) and scheme.bits in (4, 8)
