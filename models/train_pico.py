"""Trains the built-in models, `pico` and `pico-draft`, from text every machine has.

The text is the sources of Python's own standard library (PSF licence), split by file into train and
held-out. Steps, each resumable and each a sub-command: `data` (tokenizer and token files), `train`
(a Llama of about 10 M parameters), `draft` (about 1 M, taught by pico's own distribution) and `eval`
(held-out bits per byte beside a byte 5-gram). The architecture is transformers' own Llama, so that
what is saved is a plain Hugging Face directory and nothing of Splitfire is needed to make it.

    python models/train_pico.py data && python models/train_pico.py train --tokens 20e6
    python models/train_pico.py draft --tokens 5e6 && python models/train_pico.py eval
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
VOCAB_SIZE = 4096
MAX_POSITION = 2048
HELD_OUT_SHARE = 0.04
# Words, numbers of up to three digits, runs of punctuation, and white space that keeps an indentation whole.
SPLIT = r" ?[A-Za-z]+|_+|\d{1,3}| ?[^\sA-Za-z0-9_]+|\n+[ \t]*|[ \t]+(?=\S)|\s+"
# What a request gets that says nothing about sampling: code of a model this small is best read near its most likely path.
GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.4, "top_p": 0.95}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def source_files() -> list[Path]:
    """Every text module of the standard library that is code: no tables, no test data, nothing huge."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = ("site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "__pycache__", "cjkencodings")
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in skip) or not 200 < path.stat().st_size < 300_000:
            continue
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        files.append(path)
    return files


def is_held_out(path: Path) -> bool:
    """By a hash of the file's name, so that the split is the same on every machine."""
    digest = hashlib.sha256(path.name.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def build_tokenizer(texts: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_data(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    files = source_files()
    train = [f for f in files if not is_held_out(f)]
    held_out = [f for f in files if is_held_out(f)]
    tokenizer = build_tokenizer(f.read_text(encoding="utf-8") for f in train)
    tokenizer.save(str(work / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    assert end is not None
    for name, part in (("train", train), ("held_out", held_out)):
        ids: list[int] = []
        num_bytes = 0
        for path in part:
            text = path.read_text(encoding="utf-8")
            num_bytes += len(text.encode())
            ids += [end, *tokenizer.encode(text).ids]
        np.array(ids, dtype=np.uint16).tofile(work / f"{name}.bin")
        print(f"{name}: {len(part)} files, {num_bytes} bytes, {len(ids)} tokens, {num_bytes / len(ids):.2f} bytes a token")
        (work / f"{name}.json").write_text(json.dumps({"files": len(part), "bytes": num_bytes, "tokens": len(ids)}))
    (work / "held_out.txt").write_bytes(b"".join(f.read_bytes() for f in held_out))
    (work / "train.txt").write_bytes(b"".join(f.read_bytes() for f in train))


def pico_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=384, intermediate_size=896, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITION, rope_theta=10000.0, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip


def draft_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITION, rope_theta=10000.0, rms_norm_eps=1e-5,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip


def batches(tokens: np.ndarray, batch: int, length: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Windows of `length` + 1 tokens in a shuffled order, a new offset every epoch; [batch, length + 1]."""
    while True:
        offset = int(rng.integers(length))
        starts = np.arange(offset, len(tokens) - length - 1, length)
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            rows = [tokens[s : s + length + 1].astype(np.int64) for s in starts[i : i + batch]]
            yield torch.from_numpy(np.stack(rows))


def held_out_bits_per_byte(model: LlamaForCausalLM, work: Path, length: int, limit: int | None = None) -> float:
    """Bits per byte of the held-out text, windows of `length` tokens with half of each as context."""
    tokens = np.fromfile(work / "held_out.bin", dtype=np.uint16).astype(np.int64)
    info = json.loads((work / "held_out.json").read_text())
    nats, counted, stride = 0.0, 0, length // 2
    model.eval()
    with torch.inference_mode():
        for begin in range(0, len(tokens) - 1, stride):
            window = torch.from_numpy(tokens[max(0, begin - stride) : begin + stride + 1])[None]
            fresh = min(stride, len(tokens) - 1 - begin)
            logits = model(window[:, :-1]).logits[0, -fresh:].float()
            nats += torch.nn.functional.cross_entropy(logits, window[0, -fresh:], reduction="sum").item()
            counted += fresh
            if limit and counted >= limit:
                break
    model.train()
    bytes_counted = counted * int(info["bytes"]) / int(info["tokens"])
    return float(nats) / math.log(2) / bytes_counted


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_scale(progress: float) -> float:
    """Warm-up over the first 2 %, flat, then linear to zero over the last 35 %."""
    return min(1.0, progress / 0.02 + 1e-3) if progress < 0.65 else max(0.0, (1.0 - progress) / 0.35)


def train(work: Path, out: Path, config: LlamaConfig, args: argparse.Namespace, teacher: LlamaForCausalLM | None) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokens = np.memmap(work / "train.bin", dtype=np.uint16, mode="r")
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    opts = optimizers(model, args.lr)
    base_lrs = [group["lr"] for opt in opts for group in opt.param_groups]
    state_path = work / f"{out.name}.state.safetensors"
    meta_path = work / f"{out.name}.state.json"
    step, spent, seen = 0, 0.0, 0
    if args.resume and state_path.exists():
        model.load_state_dict(load_file(state_path), strict=False)
        step, spent, seen = (json.loads(meta_path.read_text())[k] for k in ("step", "spent", "seen"))
        print(f"resumed at step {step} after {spent / 60:.0f} min (optimizer state starts anew)")
    forward = torch.compile(model) if args.compile else model
    feeds = {length: batches(tokens, args.batch_tokens // length, length, rng) for length in (512, 2048)}
    total = args.tokens
    last_save = last_print = time.perf_counter()
    while seen < total:
        began = time.perf_counter()
        progress = seen / total
        length = 2048 if progress > 0.85 else 512  # the last part teaches long positions
        for group, lr in zip((g for o in opts for g in o.param_groups), base_lrs, strict=True):
            group["lr"] = lr * learning_rate_scale(progress)
        data = next(feeds[length])
        inputs, targets = data[:, :-1], data[:, 1:]
        logged = 0.0
        for rows, want in zip(inputs.split(args.micro_tokens // length), targets.split(args.micro_tokens // length), strict=True):
            logits = forward(rows).logits.float()
            share = rows.shape[0] / inputs.shape[0]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), want.flatten())
            logged += loss.item() * share
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(rows).logits.float().log_softmax(-1)
                kl = torch.nn.functional.kl_div(logits.log_softmax(-1), soft, log_target=True, reduction="none")
                loss = 0.2 * loss + 0.8 * kl.sum(-1).mean()
            (loss * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step, seen, spent = step + 1, seen + inputs.numel(), spent + time.perf_counter() - began
        if time.perf_counter() - last_print > 30:
            last_print = time.perf_counter()
            print(
                f"step {step} {seen / 1e6:.2f} M tokens, loss {logged:.4f}, {seen / spent:.0f} tokens/s, {spent / 60:.0f} min",
                flush=True,
            )
        if time.perf_counter() - last_save > 900:
            last_save = time.perf_counter()
            save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, state_path)
            meta_path.write_text(json.dumps({"step": step, "spent": spent, "seen": seen}))
            print(f"  held-out {held_out_bits_per_byte(model, work, 1024, 60_000):.4f} bits a byte", flush=True)
    save(model, work, out)
    print(f"done: {held_out_bits_per_byte(model, work, 1024):.4f} bits a byte, {seen} tokens in {spent / 60:.0f} min")


def save(model: LlamaForCausalLM, work: Path, out: Path) -> None:
    """A plain Hugging Face directory: bf16 safetensors, tied embeddings stored once."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    config = json.loads(model.config.to_json_string(use_diff=False))
    keep = [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "eos_token_id",
    ]
    slim = {"architectures": ["LlamaForCausalLM"], **{k: config[k] for k in keep}, "rope_theta": 10000.0, "torch_dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(slim, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "add_bos_token": True,
        "model_max_length": MAX_POSITION, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def five_gram_bits_per_byte(work: Path, order: int = 5) -> float:
    """A byte n-gram with Witten-Bell interpolation (Bell, Cleary and Witten 1990), the baseline."""
    text = (work / "train.txt").read_bytes()
    counts: list[defaultdict[bytes, dict[int, int]]] = [defaultdict(dict) for _ in range(order)]
    for i, byte in enumerate(text):
        for n in range(min(order, i + 1)):
            seen = counts[n][text[i - n : i]]
            seen[byte] = seen.get(byte, 0) + 1
    totals = [{k: sum(v.values()) for k, v in table.items()} for table in counts]
    held_out = (work / "held_out.txt").read_bytes()
    bits = 0.0
    for i, byte in enumerate(held_out):
        p = 1 / 256
        for n in range(min(order, i + 1)):
            context = held_out[i - n : i]
            if context not in counts[n]:
                break
            seen = counts[n][context]
            total, kinds = totals[n][context], len(seen)
            p = (seen.get(byte, 0) + kinds * p) / (total + kinds)
        bits -= math.log2(p)
    return bits / len(held_out)


def load(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("step", choices=("data", "train", "draft", "export", "eval"))
    parser.add_argument("--work", type=Path, default=HERE / "build", help="token files and checkpoints while training")
    parser.add_argument("--tokens", type=float, default=60e6, help="how many tokens to train on")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler)")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.step == "data":
        make_data(args.work)
    elif args.step == "train":
        train(args.work, HERE / "pico", pico_config(), args, None)
    elif args.step == "draft":
        train(args.work, HERE / "pico-draft", draft_config(), args, load(HERE / "pico").eval())
    elif args.step == "export":  # the latest checkpoint of a training that still runs
        model = LlamaForCausalLM(pico_config())
        model.load_state_dict(load_file(args.work / "pico.state.safetensors"), strict=False)
        save(model, args.work, HERE / "pico")
    else:
        for name in ("pico", "pico-draft"):
            print(f"{name}: {held_out_bits_per_byte(load(HERE / name), args.work, 1024):.4f} bits a byte on the held-out files")
        print(f"byte 5-gram, Witten-Bell: {five_gram_bits_per_byte(args.work):.4f}")


if __name__ == "__main__":
    main()
