"""The model in Triton kernels against the torch one: chunks, drafts and decodes in one step, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitfire.engine.kernels.gpu import prepare
from splitfire.engine.models import gpu
from splitfire.engine.models.gpu import GpuTransformer
from splitfire.engine.models.transformer import Transformer
from tests.checkpoints import family_configs, save_checkpoint
from tests.engine.bench import Bench, Piece, prompts_of
from tests.engines import load_model

FAMILIES = ("llama-tied-bias", "qwen2-window", "qwen3")


def twin(model: Transformer) -> GpuTransformer:
    return GpuTransformer(model.config, model.weights, model.rope, num_multiprocessors=6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_torch_computes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "FEW_ROWS", 6)  # so that smaller chunks count as many
    monkeypatch.setattr(gpu, "FEW_ROWS", 6)
    save_checkpoint(family_configs()[name], tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(40, 12, 1)
    reference, bench = Bench(model, "fp32", prompts), Bench(twin(model), "fp32", prompts)
    for pieces in (
        [Piece(0, 0, 23), Piece(1, 0, 11)],
        [Piece(1, 11, 12), Piece(0, 23, 36), Piece(2, 0, 1)],
        [Piece(0, 36, 40)],
    ):
        got, want = bench.step(pieces), reference.step(pieces)
        assert (got.values - want.values).abs().max() < 1e-4 * want.values.std()


def test_a_quantised_pool_holds_what_torch_would_have_written(tmp_path: Path) -> None:
    save_checkpoint(family_configs()["llama"], tmp_path)
    model, prompts = load_model(tmp_path), prompts_of(50)
    got, want, exact = Bench(twin(model), "int8", prompts), Bench(model, "int8", prompts), Bench(model, "fp32", prompts)
    for piece in (Piece(0, 0, 40), Piece(0, 40, 50)):
        ours, theirs = got.step([piece]).values, want.step([piece]).values
        right = exact.step([piece]).values
        assert (ours - right).norm() <= 2 * (theirs - right).norm()
    assert got.pool.scales is not None and want.pool.scales is not None
    blocks = torch.from_numpy(got.tables[0, :3]).long()  # filled by both
    # Of the first layer, whose inputs are the same to the last bits: at most a step of fp16 apart.
    torch.testing.assert_close(got.pool.scales[blocks, 0], want.pool.scales[blocks, 0], rtol=2.0**-10, atol=0)
