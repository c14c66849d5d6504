"""Random-weight checkpoints of real shapes: `python -m benchmarks.make_checkpoint smol135`. Half a minute each.

What speed depends on is shape, and shape needs no pretrained weights. Written with transformers as bf16 safetensors into
`build/checkpoints/<name>/`, beside a byte-level BPE tokenizer trained on the sources of Python's standard library, so that
every server that loads Hugging Face directories loads these. Equal seeds make equal files; one that is there is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from models.train_pico import END, ROLES, SPLIT, source_files

CHECKPOINTS = Path(__file__).resolve().parent.parent / "build" / "checkpoints"
SEED = 135
MADE = "made.json"  # what the files beside it were made from
FORMAT = 3  # of what this script writes; a checkpoint of another one is made again
# Times the deviation that keeps a matrix's input at its size. Rows of the tied embedding are the logits' directions: with 4
# the best of 49152 logits is well ahead of the second. With 1 for the others greedy output repeats itself after a few tokens,
# of 64 there were 3 different ones: attention is nearly a mean, and what a token adds to itself outweighs the layers.
GAINS = {"embed_tokens": 4.0, "q_proj": 2.0, "k_proj": 2.0, "o_proj": 2.0, "down_proj": 2.0}

SHAPES: Mapping[str, Mapping[str, int | float | bool]] = {
    # SmolLM2-135M
    "smol135": dict(
        num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192,
    ),
    # The KV of Llama-3.1-8B with small matrices: hand-offs that no computation hides.
    "kv8b": dict(
        num_hidden_layers=32, hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=128, intermediate_size=1024,
        vocab_size=4096, tie_word_embeddings=True, rope_theta=500000.0, max_position_embeddings=16384,
    ),
    # smol135's proportions in a hundredth of the time: smoke runs.
    "tiny": dict(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=384,
        vocab_size=4096, tie_word_embeddings=True, rope_theta=100000.0, max_position_embeddings=8192,
    ),
}  # fmt: skip


def make(name: str, seed: int = SEED, root: Path = CHECKPOINTS) -> Path:
    """The directory of checkpoint `name`, made now unless it is there."""
    path = root / name
    recipe = {"format": FORMAT, "seed": seed, "shape": dict(SHAPES[name]), "torch": torch.__version__}
    if _is_made(path, recipe):
        return path
    path.mkdir(parents=True, exist_ok=True)
    (path / MADE).unlink(missing_ok=True)  # a run that is interrupted leaves no finished checkpoint behind
    vocab_size = int(SHAPES[name]["vocab_size"])
    train_tokenizer(vocab_size).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "add_bos_token": True,
                "clean_up_tokenization_spaces": False, "model_max_length": SHAPES[name]["max_position_embeddings"]}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    model = random_model(name, seed)
    model.to(torch.bfloat16).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}) + "\n")
    (path / MADE).write_text(json.dumps(recipe, indent=1) + "\n")
    return path


def random_model(name: str, seed: int) -> LlamaForCausalLM:
    """fp32. 30 layers neither explode nor fade, and no weight is nearly zero."""
    shape = SHAPES[name]
    config = LlamaConfig(**shape, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=None)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
            else:
                gain = GAINS.get(weight_name.split(".")[-2], 1.0)
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
    return model


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Ids 0 .. vocab_size - 1, all of them: where text has fewer pairs than that, the last ones are unused special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f.read_text(encoding="utf-8") for f in source_files()), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|unused-{i}|>" for i in range(missing)])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def greedy_margin(path: Path, num_tokens: int = 64) -> str:
    """What a greedy continuation looks like: whether tokens differ, and how far the best logit is from the second."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(4, model.config.vocab_size, (1, 64), generator=generator)
    with torch.inference_mode():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=num_tokens,
            min_new_tokens=num_tokens, pad_token_id=0,
        )  # fmt: skip
        logits = model(out).logits[0, prompt.shape[1] - 1 : -1]
    best, second = logits.topk(2).values.unbind(-1)
    distinct = len(set(out[0, prompt.shape[1] :].tolist()))
    gap = (best - second).median()
    return f"{distinct} different tokens of {num_tokens}; logits deviate by {logits.std():.2f}, best before second by {gap:.2f}"


def _is_made(path: Path, recipe: Mapping[str, object]) -> bool:
    try:
        made = json.loads((path / MADE).read_text())
    except (OSError, ValueError):
        return False
    return {**recipe, "torch": None} == {**made, "torch": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--margin", action="store_true", help="also say what its greedy output looks like")
    args = parser.parse_args()
    for name in args.names:
        began = time.perf_counter()
        path = make(name, args.seed)
        print(f"{path.relative_to(CHECKPOINTS.parents[1])}: {time.perf_counter() - began:.1f} s")
        if args.margin:
            print(greedy_margin(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
