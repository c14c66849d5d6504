"""What workers say of themselves, in range: a router takes nobody's word that cannot be true. Pure."""

from __future__ import annotations

from splitfire.core import limits
from splitfire.core.errors import InvalidInput
from splitfire.core.layout import DTYPE_BYTES
from splitfire.core.machine import MAX_SETTING_CHARS, UCX_SETTINGS
from splitfire.v1 import fleet_pb2, inference_pb2


def check_hello(hello: fleet_pb2.Hello) -> None:
    """A worker's own words about itself, in range (group B of bad inputs)."""
    if not 1 <= len(hello.worker_id) <= limits.MAX_WORKER_ID_CHARS or not hello.worker_id.isprintable():
        raise InvalidInput("worker_id", f"accepted: 1 to {limits.MAX_WORKER_ID_CHARS} printable characters")
    if len(hello.incarnation) != 16:
        raise InvalidInput("incarnation", f"has {len(hello.incarnation)} bytes, accepted: 16")
    if hello.role not in (inference_pb2.ROLE_PREFILL, inference_pb2.ROLE_DECODE):
        raise InvalidInput("role", f"is {hello.role}, accepted: ROLE_PREFILL or ROLE_DECODE")
    for name, high in (
        ("total_blocks", 1 << 31),
        ("max_running", 1 << 20),
        ("max_context", limits.MAX_POSITIONS),
        ("chunk_tokens", 1 << 20),
    ):
        value = getattr(hello.capacity, name)
        if not 1 <= value <= high:
            raise InvalidInput(f"capacity.{name}", f"is {value}, accepted: 1 to {high}")
    if len(hello.host) > 256 or not hello.host.isprintable():
        raise InvalidInput("host", "accepted: at most 256 printable characters")
    for name in ("weights", "config", "tokenizer", "rope"):
        if len(getattr(hello.fingerprint, name)) != 32:
            raise InvalidInput(f"fingerprint.{name}", f"has {len(getattr(hello.fingerprint, name))} bytes, accepted: 32")
    if len(hello.fingerprint.weight_format) > 32:
        raise InvalidInput("fingerprint.weight_format", "accepted: at most 32 characters")
    block_size = hello.fingerprint.block_size
    if not 8 <= block_size <= 256 or block_size & (block_size - 1) or hello.kv_format.block_size != block_size:
        raise InvalidInput(
            "fingerprint.block_size",
            f"is {block_size}, and {hello.kv_format.block_size} in kv_format, accepted: one power of two, 8 to 256",
        )
    if hello.kv_format.dtype not in DTYPE_BYTES:
        raise InvalidInput("kv_format.dtype", f"is {hello.kv_format.dtype[:40]!r}, accepted: {', '.join(DTYPE_BYTES)}")
    check_machine(hello.machine)
    if not 1 <= len(hello.transports) <= 8 or any(
        len(t.address) > 4096 or len(t.name) > limits.MAX_TRANSPORT_CHARS for t in hello.transports
    ):
        raise InvalidInput("transports", "accepted: 1 to 8, addresses of at most 4096 bytes")


def check_machine(facts: inference_pb2.MachineFacts) -> None:
    """Numbers may be any; text is bounded and can be shown."""
    for name, most in (("machine_id", 64), ("transport", limits.MAX_TRANSPORT_CHARS), ("transport_version", 32)):
        text = getattr(facts, name)
        if len(text) > most or not text.isprintable():
            raise InvalidInput(f"machine.{name}", f"accepted: at most {most} printable characters")
    texts = facts.ucx_settings
    if len(texts) > len(UCX_SETTINGS) or any(len(text) > MAX_SETTING_CHARS or not text.isprintable() for text in texts):
        bounds = f"{len(UCX_SETTINGS)} of {MAX_SETTING_CHARS}"
        raise InvalidInput("machine.ucx_settings", f"accepted: at most {bounds} printable characters")


def clamp(load: fleet_pb2.Load, total_blocks: int) -> bool:
    """Brings a report within what is possible (F62); True when it was not."""
    was = load.SerializeToString(deterministic=True)
    load.total_blocks = total_blocks
    load.free_blocks = min(load.free_blocks, total_blocks)
    load.reserved_blocks = min(load.reserved_blocks, total_blocks)
    for rate in ("prefill_tokens_per_s", "decode_tokens_per_s", "step_s"):
        value = getattr(load, rate)
        if not 0.0 <= value < 1e12:  # NaN fails this too
            setattr(load, rate, 0.0)
    return load.SerializeToString(deterministic=True) != was
