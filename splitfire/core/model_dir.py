"""A Hugging Face model directory, read with suspicion: what is in it, whether it may be used, and its digests.

The router reads configuration, tokenizer and chat template from here; workers also read the weights (through
`splitfire/engine/checkpoint.py`). Nothing in a directory can choose code to run: JSON and safetensors only. Every
complaint is a ModelError of one line that names the file and what is accepted. Blocking file access, no tensors.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from splitfire.core import limits
from splitfire.core.errors import ModelError
from splitfire.core.model_config import GenerationDefaults, ModelConfig, parse_config, parse_generation_defaults

PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_INDEX_BYTES = 64 * limits.MIB


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file, by its header."""

    file: Path
    dtype: str  # safetensors' own spelling: BF16, F16, F32, ...
    shape: tuple[int, ...]


class ModelDir:
    """An existing, readable directory whose small files have been parsed and found in range."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_directory(path)
        config = _read_json(path / "config.json", limits.MAX_CONFIG_BYTES)
        generation = None
        if _is_there(path / "generation_config.json"):
            generation = _read_json(path / "generation_config.json", limits.MAX_CONFIG_BYTES)
        self.config: ModelConfig = parse_config(config, generation)
        self.generation: GenerationDefaults = parse_generation_defaults(generation)
        self.tokenizer_path = path / "tokenizer.json"
        _require_file(self.tokenizer_path, limits.MAX_TOKENIZER_BYTES)
        self.chat_template, self.template_tokens = _chat_template(path)
        self._raw_config = config

    @cached_property
    def config_digest(self) -> bytes:
        """Over what the model computes with; formatting and key order do not count."""
        return sha256(json.dumps(self._raw_config, sort_keys=True).encode()).digest()

    @cached_property
    def tokenizer_digest(self) -> bytes:
        template = (self.chat_template or "").encode()
        return sha256(self.tokenizer_path.read_bytes() + b"\0" + template).digest()

    def rope_digest(self, max_context: int) -> bytes:
        """Over what turns a position into an angle: dynamic scaling fixes its base from the configured length."""
        rope = self.config.rope
        length = max(max_context, rope.original_positions) if rope.rope_type == "dynamic" else 0
        return sha256(f"{rope!r} {length}".encode()).digest()

    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, from the headers alone; nothing is mapped or loaded."""
        entries: dict[str, TensorEntry] = {}
        for file in self._weight_files():
            for name, entry in _read_safetensors_header(file).items():
                if name in entries:
                    raise ModelError(f"{file.name}: tensor {name} is also in {entries[name].file.name}")
                entries[name] = entry
        return entries

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index.exists():
            return self._shards(index)
        if single.exists():
            return [single]
        files = sorted(self.path.glob("*.safetensors"))
        if len(files) == 1:
            return files
        if any(f.suffix in PICKLED_WEIGHTS for f in self.path.iterdir()):
            raise ModelError(
                "the weights are pickled (.bin, .pt, ...), accepted: safetensors only; convert them with "
                "transformers: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir)"
            )
        raise ModelError("no weights: accepted are model.safetensors, or model.safetensors.index.json with its shards")

    def _shards(self, index: Path) -> list[Path]:
        weight_map = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > limits.MAX_TENSORS:
            raise ModelError(f"{index.name}: weight_map: accepted: an object of 1 to {limits.MAX_TENSORS} tensors")
        names = []
        for name in dict.fromkeys(weight_map.values()):
            if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
                raise ModelError(f"{index.name}: weight_map names {name!r}, accepted: plain file names ending in .safetensors")
            if not (self.path / name).exists():
                raise ModelError(f"{index.name}: weight_map names {name}, which is not in the directory")
            names.append(name)
        return [self.path / name for name in names]


def shows_tools(chat_template: str) -> bool:
    """Whether it has a place for them."""
    return re.search(r"\btools\b", chat_template) is not None


def weights_digest(files: list[Path]) -> bytes:
    """SHA-256 over the bytes of the weight files, in order of their names."""
    whole = sha256()
    for file in sorted(files):
        part = sha256()
        with _open(file) as handle:
            while chunk := handle.read(8 * limits.MIB):
                part.update(chunk)
        whole.update(part.digest())
    return whole.digest()


def others_who_may_change(path: Path) -> str:
    """Who else could change the model under us, in words; empty: nobody but us and root. The process warns."""
    found = path.stat()
    if found.st_mode & stat.S_IWOTH:
        return "every user of this machine"
    return f"user {found.st_uid}, its owner" if found.st_uid not in (0, os.getuid()) else ""


def _require_directory(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ModelError(f"{path}: {exc.strerror or exc}; give a model directory, a hub id, or pico") from exc
    if not stat.S_ISDIR(mode):
        raise ModelError(f"{path}: is not a directory; give the directory that holds config.json")
    if not os.access(path, os.R_OK | os.X_OK):
        raise ModelError(f"{path}: not readable by this user")


def _require_file(path: Path, max_bytes: int) -> int:
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise ModelError(f"{path.name}: {exc.strerror or exc}") from exc
    if not path.is_file():
        raise ModelError(f"{path.name}: is not a file")
    if path.is_symlink() and not _is_inside(path):
        raise ModelError(f"{path.name}: is a link out of the model directory; copy the file into it")
    if size > max_bytes:
        raise ModelError(f"{path.name}: is {size} bytes long, accepted: at most {max_bytes}")
    return size


def _is_inside(link: Path) -> bool:
    """Whether a link stays in its directory, or goes where a hub cache keeps its blobs (`../../blobs`)."""
    root, target = link.parent.resolve(), link.resolve()
    return target.is_relative_to(root) or target.is_relative_to(root.parent.parent / "blobs")


def _is_there(path: Path) -> bool:
    """Also when it is a link that leads nowhere: that is a mistake to report, not an absent file."""
    return os.path.lexists(path)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as exc:
        raise ModelError(f"{path.name}: {exc.strerror or exc}") from exc


def _read_text(path: Path, max_bytes: int) -> str:
    _require_file(path, max_bytes)
    with _open(path) as handle:
        try:
            return handle.read().decode("utf-8")
        except UnicodeDecodeError as exc:
            raise ModelError(f"{path.name}: is not UTF-8: {exc.reason} at byte {exc.start}") from exc
        except OSError as exc:
            raise ModelError(f"{path.name}: {exc.strerror or exc}") from exc


def _read_json(path: Path, max_bytes: int) -> dict[str, object]:
    """One JSON object: no duplicate keys, no NaN, bounded size; the complaint carries line and column."""
    try:
        value = json.loads(_read_text(path, max_bytes), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except json.JSONDecodeError as exc:
        raise ModelError(f"{path.name}: line {exc.lineno} column {exc.colno}: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path.name}: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"key {name!r} appears twice")
        values[name] = value
    return values


def _no_constants(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _chat_template(path: Path) -> tuple[str | None, Mapping[str, str]]:
    """The chat template (its own file, or tokenizer_config.json's) and the special tokens it may use by name."""
    template: str | None = None
    tokens: dict[str, str] = {}
    if _is_there(path / "tokenizer_config.json"):
        settings = _read_json(path / "tokenizer_config.json", limits.MAX_TOKENIZER_BYTES)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = settings.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
        found = settings.get("chat_template")
        if isinstance(found, list):  # named templates; the plain one is called default
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if found is not None and not isinstance(found, str):
            raise ModelError("tokenizer_config.json: chat_template: accepted: a string or a list of named templates")
        template = found
    if _is_there(path / "chat_template.jinja"):
        template = _read_text(path / "chat_template.jinja", 4 * limits.MAX_TEMPLATE_CHARS)
    if template is not None and len(template) > limits.MAX_TEMPLATE_CHARS:
        raise ModelError(f"chat_template: is {len(template)} characters long, accepted: at most {limits.MAX_TEMPLATE_CHARS}")
    if template is not None and any("\ud800" <= c <= "\udfff" for c in template):
        raise ModelError("chat_template: holds half of a surrogate pair, accepted: Unicode text")
    return template, tokens


def _read_safetensors_header(file: Path) -> dict[str, TensorEntry]:
    """Checked before the safetensors library maps the file: sizes, offsets, names."""
    size = _require_file(file, 1 << 50)
    with _open(file) as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise ModelError(f"{file.name}: is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        is_in_range = 2 <= length <= min(limits.MAX_SAFETENSORS_HEADER_BYTES, size - 8)
        if not is_in_range and (prefix[:4] == b"PK\x03\x04" or prefix[:1] == b"\x80"):
            raise ModelError(f"{file.name}: is a zip archive or a pickle, not a safetensors file; accepted: safetensors only")
        if not is_in_range:
            raise ModelError(
                f"{file.name}: header length is {length}, accepted: 2 to {limits.MAX_SAFETENSORS_HEADER_BYTES} "
                f"and within the file ({size} bytes)"
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{file.name}: header: {exc}") from exc
    if not isinstance(header, dict) or len(header) > limits.MAX_TENSORS:
        raise ModelError(f"{file.name}: header: accepted: an object of at most {limits.MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - length
    return {name: _tensor_entry(file, name, info, data_bytes) for name, info in header.items()}


def _tensor_entry(file: Path, name: str, info: object, data_bytes: int) -> TensorEntry:
    if not isinstance(info, dict):
        raise ModelError(f"{file.name}: tensor {name}: is not an object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    are_sizes = all(isinstance(v, list) and all(isinstance(n, int) and 0 <= n < 1 << 48 for n in v) for v in (shape, offsets))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list) or not are_sizes:
        raise ModelError(f"{file.name}: tensor {name}: needs dtype, shape and data_offsets")
    if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= data_bytes:
        raise ModelError(
            f"{file.name}: tensor {name}: data_offsets {offsets} are outside the file's {data_bytes} bytes: truncated or damaged"
        )
    return TensorEntry(file, dtype, tuple(shape))
