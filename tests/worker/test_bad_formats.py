"""Group D of bad inputs, quantised: tensors that are not what the quantization_config says, or that lie, stop the process by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from splitfire.core.errors import ModelError
from splitfire.core.model_dir import ModelDir
from splitfire.engine.checkpoint import LoadOptions, load_weights
from tests.checkpoints import edit_config, family_configs, save_checkpoint
from tests.quantised import (
    awq,
    awq_config,
    compressed,
    fp8_blocks,
    fp8_config,
    gptq,
    gptq_config,
    quantise_checkpoint,
)

DOWN = "model.layers.1.mlp.down_proj"  # [64, 96]
FORMATS = {
    "gptq": (gptq(4, 32, is_v1=True), gptq_config(4, 32, desc_act=True)),
    "awq": (awq(32), awq_config(32)),
    "fp8": (fp8_blocks((32, 32)), fp8_config(weight_block_size=[32, 32])),
    "int4": compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32, symmetric=False),
    "int8": compressed("int-quantized", type="int", num_bits=8, strategy="channel"),
}
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each format."""
    config = family_configs()["llama"]
    config.num_hidden_layers = 2
    plain = tmp_path_factory.mktemp("plain")
    paths = {"plain": plain}
    model = save_checkpoint(config, plain)
    for name, (encode, quantization) in FORMATS.items():
        paths[name] = plain.parent / name
        shutil.copytree(plain, paths[name])
        quantise_checkpoint(paths[name], model, encode, quantization)
    return paths


def load(path: Path, *, is_int8: bool = False, allow_nonfinite: bool = False) -> None:
    load_weights(ModelDir(path), LoadOptions(torch.float32, torch.device("cpu"), allow_nonfinite, is_int8))


def refusal(path: Path) -> str:
    """The same line whether weights are to be int8 or not."""
    lines = set()
    for is_int8 in (False, True):
        with pytest.raises(ModelError) as caught:
            load(path, is_int8=is_int8)
        lines.add(str(caught.value))
    assert len(lines) == 1 and "\n" not in str(lines)
    return lines.pop()


def damaged(good: dict[str, Path], name: str, tmp_path: Path, change: Change) -> Path:
    path = Path(shutil.copytree(good[name], tmp_path / name))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def put(part: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{DOWN}.{part}": value})


def set_one(part: str, value: float, at: int = 0) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{DOWN}.{part}"].view(-1)[at] = value

    return change


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(f"{DOWN}.{part}")


WORDS = torch.int32
NAN8 = torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        # missing
        ("gptq", drop("qweight"), "tensor {}.qweight is missing; quantization_config asks for it"),
        ("gptq", drop("scales"), "tensor {}.scales is missing"),
        ("gptq", drop("g_idx"), "tensor {}.g_idx is missing"),
        ("awq", drop("qzeros"), "tensor {}.qzeros is missing"),
        ("fp8", drop("weight_scale_inv"), "tensor {}.weight_scale_inv is missing"),
        ("int4", drop("weight_packed"), "tensor {}.weight_packed is missing"),
        ("int4", drop("weight_zero_point"), "tensor {}.weight_zero_point is missing"),
        ("int8", drop("weight_scale"), "tensor {}.weight_scale is missing"),
        # of another shape
        ("gptq", put("qweight", torch.zeros(13, 64, dtype=WORDS)), "{}.qweight has shape [13, 64], quantization_config asks for [12, 64]"),
        ("gptq", put("scales", torch.ones(4, 64)), "{}.scales has shape [4, 64], quantization_config asks for [3, 64]"),
        ("gptq", put("g_idx", torch.zeros(95, dtype=WORDS)), "{}.g_idx has shape [95]"),
        ("awq", put("qweight", torch.zeros(96, 7, dtype=WORDS)), "{}.qweight has shape [96, 7]"),
        ("awq", put("qzeros", torch.zeros(1, 8, dtype=WORDS)), "{}.qzeros has shape [1, 8]"),
        ("fp8", put("weight_scale_inv", torch.ones(2, 2)), "{}.weight_scale_inv has shape [2, 2], quantization_config asks for [2, 3]"),
        ("fp8", put("weight_scale_inv", torch.ones(0)), "{}.weight_scale_inv has shape [0]"),
        ("int4", put("weight_packed", torch.zeros(64, 11, dtype=WORDS)), "{}.weight_packed has shape [64, 11]"),
        ("int4", put("weight_zero_point", torch.zeros(64, 3, dtype=WORDS)), "{}.weight_zero_point has shape [64, 3]"),
        ("int8", put("weight_scale", torch.ones(63, 1)), "{}.weight_scale has shape [63, 1], quantization_config asks for [64, 1] or [64]"),
        # of another dtype
        ("gptq", put("qweight", torch.zeros(12, 64, dtype=torch.int64)), "{}.qweight is I64, accepted: I32"),
        ("gptq", put("scales", torch.ones(3, 64, dtype=torch.int8)), "{}.scales is I8, accepted: BF16, F16, F32"),
        ("fp8", put("weight", torch.zeros(64, 96, dtype=torch.float8_e5m2)), "{}.weight is F8_E5M2, accepted: F8_E4M3"),
        ("int8", put("weight", torch.zeros(64, 96, dtype=torch.uint8)), "{}.weight is U8, accepted: I8"),
        # with values that cannot be
        ("gptq", set_one("g_idx", 3), "{}.g_idx names the groups 0 to 3, accepted: 0 to 2"),
        ("gptq", set_one("g_idx", -1), "{}.g_idx names the groups -1 to 2, accepted: 0 to 2"),
        ("int4", put("weight_g_idx", torch.full((96,), 2**31 - 1, dtype=WORDS)), "{}.weight_g_idx names the groups 2147483647"),
        ("int4", put("weight_shape", torch.tensor([64, 95])), "{}.weight_shape is [64, 95], config.json asks for [64, 96]"),
        ("int4", put("weight_shape", torch.tensor([2**62, -1])), "{}.weight_shape is ["),
        ("gptq", set_one("scales", float("nan")), "{}.scales has NaN or infinite values"),
        ("awq", set_one("scales", float("inf")), "{}.scales has NaN or infinite values"),
        ("fp8", set_one("weight_scale_inv", float("-inf")), "{}.weight_scale_inv has NaN or infinite values"),
        ("int8", set_one("weight_scale", float("nan")), "{}.weight_scale has NaN or infinite values"),
        ("fp8", lambda t: t[f"{DOWN}.weight"].view(-1)[:1].copy_(NAN8), "{}.weight has NaN or infinite values"),
        # and ones that do not belong
        ("gptq", put("bias", torch.ones(64)), "{}.bias is not zero, and by config.json the model has no such bias"),
        ("awq", put("bias", torch.zeros(64)), "{}.bias is not part of a llama model"),
        ("gptq", put("weight", torch.zeros(64, 96)), "is not part of a llama model"),
        ("int4", put("weight_global_scale", torch.ones(1)), "{}.weight_global_scale is not part of a llama model"),
        ("gptq", lambda t: t.pop("model.embed_tokens.weight"), "tensor model.embed_tokens.weight is missing; config.json asks for it"),
    ],
)  # fmt: skip
def test_a_tensor_that_lies_is_named(good: dict[str, Path], name: str, change: Change, says: str, tmp_path: Path) -> None:
    assert says.format(DOWN) in refusal(damaged(good, name, tmp_path, change))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_undamaged_ones_load(good: dict[str, Path], name: str) -> None:
    load(good[name])
    load(good[name], is_int8=True)


def test_a_group_size_that_does_not_divide_a_matrix_is_named(good: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(good["gptq"], tmp_path / "gptq"))
    edit_config(path, quantization_config=gptq_config(4, 40))  # as many groups as with 32
    assert "q_proj: the quantization_config's group size 40 does not divide its 64 columns" in refusal(path)


def test_a_matrix_that_could_mean_two_things_is_refused(good: dict[str, Path], tmp_path: Path) -> None:
    """Blocks of 48 x 40 and of 40 x 48 have scales of the same shape."""
    path = Path(shutil.copytree(good["fp8"], tmp_path / "fp8"))
    (one, config), (_, other) = (
        compressed("float-quantized", type="float", num_bits=8, strategy="block", block_structure=sides)
        for sides in ([48, 40], [40, 48])
    )
    shutil.copytree(good["plain"], path, dirs_exist_ok=True)
    config["config_groups"]["group_1"] = other["config_groups"]["group_0"]
    quantise_checkpoint(path, AutoModelForCausalLM.from_pretrained(path), one, config)
    assert "q_proj: fits groups of the quantization_config that mean different numbers" in refusal(path)


def test_quantised_tensors_without_a_config_are_no_plain_ones(good: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(good["int8"], tmp_path / "int8"))
    edit_config(path, quantization_config=None)
    assert ".weight is I8, accepted: BF16, F16, F32" in refusal(path)


def test_scales_that_are_not_finite_load_when_asked_for(good: dict[str, Path], tmp_path: Path) -> None:
    path = damaged(good, "gptq", tmp_path, set_one("scales", float("nan")))
    load(path, allow_nonfinite=True)
    load(path, allow_nonfinite=True, is_int8=True)


def test_a_number_too_large_for_the_dtype_of_computation_is_named(good: dict[str, Path], tmp_path: Path) -> None:
    path = damaged(good, "fp8", tmp_path, set_one("weight_scale_inv", 1e5))
    with pytest.raises(ModelError, match=r"down_proj.weight has NaN or infinite values"):
        load_weights(ModelDir(path), LoadOptions(torch.float16, torch.device("cpu")))


def test_a_worker_refuses_an_unknown_method_with_exit_code_2(good: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(good["awq"], tmp_path / "awq"))
    edit_config(path, quantization_config={"quant_method": "bitsandbytes"})
    command = [sys.executable, "-m", "splitfire.worker", "--model", str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith(
        "quantization_config.quant_method: is 'bitsandbytes', accepted: compressed-tensors, fp8, fbgemm_fp8, awq, gptq"
    )
