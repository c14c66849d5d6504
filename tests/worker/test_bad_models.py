"""Group D of bad inputs: a model directory that is wrong stops the process with one clear line, before anything is allocated.

B98 (a file that changes while mapped) is handled by reading into memory of our own; a truncated file is B96's check of
offsets. B99 and B101 are in tests/router/test_text.py, because the router is who loads tokenizers and templates.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfire.core import limits
from splitfire.core.errors import ConfigError, ModelError
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir, others_who_may_change, weights_digest
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.kernels.linear import Matrix
from splitfire.worker.loading import check_memory, num_blocks_of
from tests.checkpoints import edit_config, family_configs, save_checkpoint

OPTIONS = LoadOptions(torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save_checkpoint(family_configs()["llama"], path)
    return path


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def refusal(path: Path) -> str:
    """The line a start-up would print."""
    with pytest.raises(ModelError) as caught:
        load_weights(ModelDir(path), OPTIONS)
    line = str(caught.value)
    assert "\n" not in line
    return line


def plain(matrix: Matrix) -> torch.Tensor:
    assert isinstance(matrix, torch.Tensor)
    return matrix


def test_the_undamaged_model_loads(good: Path) -> None:
    load_weights(ModelDir(good), OPTIONS)


# B88


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nothing")


def test_a_file_instead_of_a_directory(good: Path) -> None:
    assert "is not a directory" in refusal(good / "config.json")


def test_a_directory_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != model)  # root may read everything
    assert "not readable" in refusal(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_cannot_be_read(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def guarded(self: Path, *args: Any, **more: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **more)

    monkeypatch.setattr(Path, "open", guarded)
    assert refusal(model) == f"{name}: Permission denied"


def test_a_symlink_loop(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "symbolic links" in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_that_leads_nowhere_is_a_mistake_and_not_an_absent_file(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(model / name)
    assert refusal(model).startswith(f"{name}: ")


def test_a_link_out_of_the_directory(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    shutil.move(model / "config.json", outside)
    (model / "config.json").symlink_to(outside)
    assert "link out of the model directory" in refusal(model)


def test_links_as_a_hub_cache_makes_them_are_fine(good: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in good.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    load_weights(ModelDir(snapshot), OPTIONS)


# B89


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b'{"a": 1,\n  oops}', "line 2 column 3"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
    ],
)
def test_a_config_that_is_no_config(model: Path, content: bytes, says: str) -> None:
    (model / "config.json").write_bytes(content)
    line = refusal(model)
    assert line.startswith("config.json: ")
    assert says in line


def test_duplicate_keys_are_found_in_no_time(model: Path) -> None:
    keys = [*range(60_000), 59_999]
    (model / "config.json").write_text("{" + ",".join(f'"{k}": 1' for k in keys) + "}")
    began = time.monotonic()
    assert "'59999' appears twice" in refusal(model)
    assert time.monotonic() - began < 2


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(model).startswith("config.json: No such file")


def test_a_huge_config(model: Path) -> None:
    with (model / "config.json").open("wb") as file:
        file.truncate(limits.MAX_CONFIG_BYTES + 1)
    assert str(limits.MAX_CONFIG_BYTES) in refusal(model)


# B90


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0), ("hidden_size", -64), ("hidden_size", "64"), ("hidden_size", 10**9), ("hidden_size", None), ("hidden_size", True),
        ("num_attention_heads", 0), ("num_key_value_heads", 3), ("num_key_value_heads", 0), ("head_dim", 7), ("vocab_size", 0),
        ("num_hidden_layers", 10**6), ("intermediate_size", -1), ("max_position_embeddings", 0), ("rms_norm_eps", "small"),
        ("rms_norm_eps", 5), ("tie_word_embeddings", "no"), ("attention_bias", 1), ("hidden_act", "gelu"), ("eos_token_id", 10**6),
        ("eos_token_id", [0, -1]), ("bos_token_id", "0"), ("num_experts", 8), ("partial_rotary_factor", 0.5),
    ],
)  # fmt: skip
def test_a_config_field_out_of_range_is_named(model: Path, field: str, value: object) -> None:
    edit_config(model, **{field: value})
    line = refusal(model)
    assert line.startswith(f"config.json: {field}: "), line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": "x", "factor": 2.0}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.0}}, "factor"),
    ],
)
def test_rope_settings_out_of_range_are_named(model: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(model, **changes)
    assert says in refusal(model)


def test_layer_types_that_are_no_names(model: Path) -> None:
    edit_config(model, model_type="mistral", sliding_window=32, layer_types=[["x"], ["y"]])
    assert "config.json: layer_types: " in refusal(model)


def test_what_cannot_fit_is_refused_before_anything_is_allocated() -> None:
    with pytest.raises(ConfigError, match=r"the model needs \d+ MiB and the KV pool 256 MiB, \d+ MiB are available"):
        check_memory(1 << 50, 256 << 20, torch.device("cpu"))
    layout = KvLayout("fp32", num_layers=1024, num_kv_heads=8, head_dim=128, block_size=32)
    with pytest.raises(ConfigError, match=r"kv_memory is 268435456 bytes, one sequence of max_context = 131072 tokens needs"):
        num_blocks_of(256 << 20, layout, 131072)


def test_the_pool_holds_the_longest_sequence_when_nobody_says_how_much() -> None:
    layout = KvLayout("bf16", num_layers=24, num_kv_heads=2, head_dim=64, block_size=32)
    assert num_blocks_of(None, layout, 32768) == 32768 // 32 + 1
    assert num_blocks_of(None, layout, 512) * layout.block_bytes <= 128 << 20
    quantised = replace(layout, dtype="int8")
    assert num_blocks_of(256 << 20, quantised, 512) > 1.9 * num_blocks_of(256 << 20, layout, 512), "66 bytes a vector, not 128"


def test_heads_that_do_not_divide_the_hidden_size(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config.pop("head_dim", None)
    config["num_attention_heads"], config["num_key_value_heads"] = 3, 1
    (model / "config.json").write_text(json.dumps(config))
    assert "does not divide hidden_size = 64" in refusal(model)


# B91


@pytest.mark.parametrize("kind", ["bert", "llama4", "../llama", ""])
def test_an_unknown_architecture(model: Path, kind: str) -> None:
    edit_config(model, model_type=kind)
    assert "accepted: llama, mistral, qwen2, qwen3" in refusal(model)


def test_remote_code_is_never_loaded(model: Path) -> None:
    edit_config(model, auto_map={"AutoModel": "modeling_x.X"})
    (model / "modeling_x.py").write_text("raise SystemExit('ran')")
    assert "custom code is never loaded" in refusal(model)


# B104: tests/core/test_quant_config.py and test_bad_formats.py


def test_an_unknown_way_of_quantising_is_refused_by_name(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "mxfp4"})
    assert refusal(model).startswith("config.json: quantization_config.quant_method: is 'mxfp4', accepted: ")


# B92, B93


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "x.pth", "last.ckpt", "weights.pkl"])
def test_pickled_weights_only(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"\x80\x02")
    line = refusal(model)
    assert "safetensors only" in line
    assert "save_pretrained" in line


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no weights" in refusal(model)


def test_a_zip_that_is_called_safetensors(model: Path) -> None:
    with zipfile.ZipFile(model / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02")
    assert "zip archive or a pickle" in refusal(model)


def test_a_pickle_that_is_called_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"\0" * 100)
    assert "zip archive or a pickle" in refusal(model)


# B94, B96, B98


def with_header(model: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    (model / "model.safetensors").write_bytes(struct.pack("<Q", size) + header + data)
    return model


@pytest.mark.parametrize("length", [0, 1, 10**6, limits.MAX_SAFETENSORS_HEADER_BYTES + 1, 2**63])
def test_a_header_length_out_of_range(model: Path, length: int) -> None:
    assert "header length" in refusal(with_header(model, b"{}", length=length))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{x", "header: "),
        (b"[]", "an object of at most"),
        (b'{"a": {}, "a": {}}', "appears twice"),
        (b'{"a": ' + b"[" * 50_000 + b"}", "header: "),
        (b'{"a": 3}', "tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "truncated or damaged"),
        (b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 0]}}', "needs dtype, shape"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "outside"),
    ],
)
def test_a_header_that_lies(model: Path, header: bytes, says: str) -> None:
    assert says in refusal(with_header(model, header))


def test_too_many_tensors(model: Path) -> None:
    header = json.dumps({str(i): {} for i in range(limits.MAX_TENSORS + 1)}).encode()
    assert str(limits.MAX_TENSORS) in refusal(with_header(model, header))


def test_a_short_file(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"abc")
    assert "too short" in refusal(model)


def test_a_truncated_file(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or damaged" in refusal(model)


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    return model


def test_a_missing_tensor_is_named(model: Path) -> None:
    change_tensors(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in refusal(model)


def test_an_extra_tensor_is_named(model: Path) -> None:
    change_tensors(model, lambda t: t.update(evil=torch.zeros(3)))
    assert "tensor evil is not part of a llama model" in refusal(model)


def test_a_tensor_of_another_shape_is_named(model: Path) -> None:
    change_tensors(model, lambda t: t.update({"model.norm.weight": torch.zeros(3)}))
    assert "model.norm.weight has shape [3], config.json asks for [64]" in refusal(model)


def test_a_tensor_of_a_dtype_that_cannot_be_loaded_is_named(model: Path) -> None:
    change_tensors(model, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    assert "model.norm.weight is I8, accepted: BF16, F16, F32" in refusal(model)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "sub/model.safetensors", 7, "weights.bin"])
def test_an_index_that_points_elsewhere(model: Path, name: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "plain file names" in refusal(model)


def test_an_index_whose_shard_is_not_there(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    assert "gone.safetensors, which is not in the directory" in refusal(model)


def test_an_index_without_a_map(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in refusal(model)


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    save_checkpoint(family_configs()["llama"], tmp_path, max_shard="200KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    assert f"tensor {name} is also in {first.name}" in refusal(tmp_path)


def test_names_from_files_cannot_write_lines_of_their_own(model: Path) -> None:
    evil = "a\nsplitfire: all good\x1b[31m"
    header = json.dumps({evil: 3}).encode()
    assert refusal(with_header(model, header)) == "model.safetensors: tensor a\\nsplitfire: all good\\x1b[31m: is not an object"
    edit_config(model, model_type="x" * 900_000)
    assert len(refusal(model)) < 600


def test_weights_that_change_after_loading_change_nothing(model: Path) -> None:
    """B98: tensors are in memory of our own, so a file cut short under us is no SIGBUS and no other weights."""
    held = plain(load_weights(ModelDir(model), OPTIONS).layers[0].gate_up)
    before = held.clone()
    (model / "model.safetensors").write_bytes(b"")
    assert torch.equal(held, before)


def test_sharded_checkpoints_load_like_single_ones(tmp_path: Path) -> None:
    config = family_configs()["llama"]
    save_checkpoint(config, tmp_path / "one")
    save_checkpoint(config, tmp_path / "many", max_shard="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (load_weights(ModelDir(tmp_path / name), OPTIONS) for name in ("one", "many"))
    assert torch.equal(plain(one.embed), plain(many.embed))
    assert all(torch.equal(plain(a.gate_up), plain(b.gate_up)) for a, b in zip(one.layers, many.layers, strict=True))


# B97


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model: Path, value: float) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][5] = value

    change_tensors(model, damage)
    assert "tensor model.norm.weight has NaN or infinite values" in refusal(model)
    load_weights(ModelDir(model), LoadOptions(torch.float32, torch.device("cpu"), allow_nonfinite=True))


# B100, B102, B105


def test_end_of_sequence_ids_of_both_files_count(model: Path) -> None:
    edit_config(model, eos_token_id=3)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert ModelDir(model).config.eos_token_ids == (3, 9)
    edit_config(model, eos_token_id=None)
    (model / "generation_config.json").write_text("{}")
    assert ModelDir(model).config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 2),
        ("top_k", -7),
        ("top_k", 0.5),
        ("repetition_penalty", 0),
    ],
)
def test_generation_defaults_out_of_range_are_named(model: Path, field: str, value: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({field: value}))
    assert refusal(model).startswith(f"generation_config.json: {field}: ")


def test_generation_defaults_are_used(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 40}))
    assert (ModelDir(model).generation.temperature, ModelDir(model).generation.top_p, ModelDir(model).generation.top_k) == (
        0.6,
        0.9,
        40,
    )
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert ModelDir(model).generation.temperature == 1.0


def test_a_pad_token_is_not_used_and_so_not_checked(model: Path) -> None:
    """B100: many checkpoints name a pad token outside the vocabulary; nothing is ever padded here."""
    edit_config(model, pad_token_id=10**9)
    load_weights(ModelDir(model), OPTIONS)


@pytest.mark.parametrize("value", [10**6, [3, -1], "2", 1.5])
def test_end_of_sequence_ids_of_the_second_file_are_checked_too(model: Path, value: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert refusal(model).startswith("generation_config.json: eos_token_id: ")


def test_a_directory_that_others_can_change_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not others_who_may_change(model)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert others_who_may_change(model) == ("" if model.stat().st_uid == 0 else f"user {model.stat().st_uid}, its owner")
    if os.geteuid() == 0:
        os.chown(model, 12345, -1)
        assert others_who_may_change(model) == "user 12345, its owner"
    model.chmod(0o777)
    assert others_who_may_change(model) == "every user of this machine"


# F67


def test_what_max_context_does_to_dynamic_rope_enters_the_fingerprint(model: Path) -> None:
    """Two workers with other lengths would rotate the same key by other angles."""
    plain = ModelDir(model)
    assert plain.rope_digest(512) == plain.rope_digest(4096)
    edit_config(model, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    dynamic = ModelDir(model)
    positions = dynamic.config.max_positions
    assert dynamic.rope_digest(2 * positions) != dynamic.rope_digest(3 * positions)
    assert dynamic.rope_digest(positions // 2) == dynamic.rope_digest(positions), "inside the window nothing changes"


def test_the_weights_digest_tells_one_changed_byte(model: Path) -> None:
    path = model / "model.safetensors"
    before = weights_digest([path])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert weights_digest([path]) != before
