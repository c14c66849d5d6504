"""From settings to an engine: int8 weights are asked for, counted, told apart, and as good as they can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitfire.core.errors import ConfigError, Mismatch
from splitfire.core.flags import parse_settings
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.settings import WorkerSettings
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.kernels.linear import Int8Matrix
from splitfire.engine.pool import KvPool
from splitfire.engine.tensors import weight_bytes, weight_format
from splitfire.worker import loading
from splitfire.worker.loading import LoadedModel, compile_handoff, load_model
from tests.checkpoints import assert_greedy, edit_config, family_configs, save_checkpoint
from tests.engines import drain, make_spec, tokens_of
from tests.quantised import awq, awq_config, quantise_checkpoint

CPU = torch.device("cpu")


def load(path: Path, weights: str) -> LoadedModel:
    flags = [f"--model={path}", f"--weights={weights}", "--dtype=fp32", "--threads=1"]
    return load_model(parse_settings(WorkerSettings, flags, prog="test"))


def tensors_of(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, tuple):
        for one in held:
            yield from tensors_of(one)
    elif is_dataclass(held):
        for field in fields(held):
            yield from tensors_of(getattr(held, field.name))


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "qwen2", "qwen3", "multi-query"])
@pytest.mark.parametrize("is_int8", [False, True])
def test_memory_is_counted_to_the_byte(family: str, is_int8: bool, tmp_path: Path) -> None:
    save_checkpoint(family_configs()[family], tmp_path)
    model = ModelDir(tmp_path)
    weights = load_weights(model, LoadOptions(torch.bfloat16, CPU, is_int8=is_int8))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(weights)}  # a tied head counts once
    assert sum(held.values()) == weight_bytes(model.config, "bf16", is_int8)
    if model.config.tie_word_embeddings:
        assert weights.lm_head is weights.embed
    matrices = [weights.embed, weights.lm_head, *(m for w in weights.layers for m in (w.qkv, w.out, w.gate_up, w.down))]
    assert all(isinstance(matrix, Int8Matrix) == is_int8 for matrix in matrices)


def test_a_worker_with_int8_weights_has_no_kv_for_one_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = save_checkpoint(family_configs()["qwen2"], tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(loading, "check_memory", lambda weights, *rest: asked.append(weights))
    plain, int8 = load(tmp_path, "auto"), load(tmp_path, "int8")
    assert asked == [weight_bytes(plain.model.config, "fp32", is_int8) for is_int8 in (False, True)]
    with pytest.raises(Mismatch, match="weight_format differs: a has plain, b has int8"):
        plain.fingerprint.require_equal(int8.fingerprint, "a", "b")
    for parameter in oracle.parameters():  # to the numbers that int8 leaves
        if parameter.ndim == 2:
            with torch.no_grad():
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    spec = make_spec(range(100, 140), 12)
    int8.engine.add(spec)
    assert_greedy(oracle, spec.prompt, tokens_of(drain(int8.engine), spec))


def test_each_format_has_a_name_that_routers_accept(tmp_path: Path) -> None:
    oracle = save_checkpoint(family_configs()["llama"], tmp_path)
    quantise_checkpoint(tmp_path, oracle, awq(32), awq_config(32))
    assert load(tmp_path, "auto").fingerprint.weight_format == "awq"
    assert load(tmp_path, "int8").fingerprint.weight_format == "awq+int8"
    edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}})
    assert len(weight_format(ModelDir(tmp_path).config.quant, True)) <= 32  # router/hello.py


def test_weights_of_another_kind_are_no_setting() -> None:
    with pytest.raises(ConfigError, match=r"weights \(--weights, SPLITFIRE_WEIGHTS\): is 'int4': .*'auto' or 'int8'"):
        parse_settings(WorkerSettings, ["--weights=int4"], prog="test")


def test_a_pool_is_as_it_was_after_every_conversion_was_compiled() -> None:
    layout = KvLayout("bf16", 2, 2, 16, 16)
    pool = KvPool(layout, 3, torch.device("cpu"))
    pool.raw[1:] = 7
    before = pool.raw.clone()
    compile_handoff(pool)
    assert torch.equal(pool.raw, before)
