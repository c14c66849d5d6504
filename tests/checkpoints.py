"""Tiny random checkpoints of every supported family, made by transformers, and its greedy tokens as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

ROOT = Path(__file__).resolve().parent.parent
PICO = ROOT / "models" / "pico"
VOCAB = 4096  # pico's tokenizer serves the random ones too

_SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=None,
)  # fmt: skip


def _small(**changes: object) -> dict[str, object]:
    return {**_SMALL, **changes}


def family_configs() -> dict[str, Any]:
    """One config for each thing that a family or a rope type does differently."""

    def rope(kind: str, **more: float) -> dict[str, object]:
        return {"rope_type": kind, "rope_theta": 10000.0, **more}

    return {
        "llama": LlamaConfig(**_small()),
        "llama-tied-bias": LlamaConfig(**_small(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=32)),
        "llama-linear": LlamaConfig(**_small(rope_parameters=rope("linear", factor=2.0))),
        "llama-dynamic": LlamaConfig(**_small(rope_parameters=rope("dynamic", factor=2.0))),
        "llama3": LlamaConfig(
            **_small(
                rope_parameters=rope(
                    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
                )
            )
        ),
        "llama-yarn": LlamaConfig(**_small(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=256))),
        "mistral": MistralConfig(**_small(sliding_window=None)),
        "mistral-window": MistralConfig(**_small(sliding_window=50)),
        "qwen2": Qwen2Config(**_small(tie_word_embeddings=True)),
        "qwen2-window": Qwen2Config(**_small(use_sliding_window=True, sliding_window=40, max_window_layers=1)),
        "qwen3": Qwen3Config(**_small(head_dim=32)),
        "multi-query": LlamaConfig(**_small(num_key_value_heads=1)),
    }


def save_checkpoint(config: Any, path: Path, *, seed: int = 0, max_shard: str | None = None) -> PreTrainedModel:
    """Random weights, saved as fp32 safetensors beside pico's tokenizer; the model itself, for the oracle.

    Weights are drawn wider than usual so that logits are not nearly equal, and so that greedy tokens mean something.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5 * (3.0 if "embed" in name or "lm_head" in name else 1.0))
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, **({"max_shard_size": max_shard} if max_shard else {}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PICO / name, path / name)
    return model


def assert_greedy(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """`tokens` are what transformers would answer greedily: each is the argmax after those before it (by induction this
    equals `generate`, at one forward pass instead of one a token)."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    assert list(tokens) == logits.argmax(-1).tolist(), f"after a prompt of {len(prompt)} tokens"


@lru_cache(maxsize=1)
def pico_oracle() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32, attn_implementation="eager").eval()


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))
