"""Files that only their owner may read: shared secrets, API keys, private keys. What they hold is never in a message."""

from __future__ import annotations

import os
from pathlib import Path

from splitfire.core.errors import ConfigError

MAX_SECRET_CHARS = 4096
MAX_FILE_BYTES = 1 << 16


def read_private(path: Path, kind: str, max_bytes: int) -> bytes:
    """The content of a file that nobody else can read. ConfigError, one line that begins with its `kind`."""
    content, mode = _read(path, kind, max_bytes)
    if mode & 0o077:
        raise ConfigError(f"{kind} {path}: others can read it; chmod 600 {path}")
    return content


def read_bounded(path: Path, kind: str, max_bytes: int) -> bytes:
    """The content of a file that anybody may read."""
    return _read(path, kind, max_bytes)[0]


def read_secret(path: Path) -> bytes:
    """One line from such a file; a newline at its end is not part of it."""
    secret = read_private(path, "secret file", MAX_FILE_BYTES).removesuffix(b"\n").removesuffix(b"\r")
    if not 16 <= len(secret) <= MAX_SECRET_CHARS or not all(0x21 <= byte <= 0x7E for byte in secret):
        raise ConfigError(
            f"secret file {path}: accepted: 16 to {MAX_SECRET_CHARS} printable ASCII characters without spaces, in one line"
        )
    return secret


def _read(path: Path, kind: str, max_bytes: int) -> tuple[bytes, int]:
    """Content and mode of one and the same file, whoever replaces it meanwhile."""
    try:
        with path.open("rb") as file:
            content, mode = file.read(max_bytes + 1), os.fstat(file.fileno()).st_mode
    except OSError as exc:
        raise ConfigError(f"{kind} {path}: {exc.strerror or exc}") from exc
    if len(content) > max_bytes:
        raise ConfigError(f"{kind} {path}: is larger than {max_bytes} bytes")
    return content, mode
