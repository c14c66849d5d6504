"""The page at `/`: one file, sent as it is, and headers under which it runs only itself and talks only to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("index.html")
CONTENT_TYPE = b"text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Page:
    """What is sent."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...]


def read_page() -> Page:
    """Its one script and one style sheet are allowed by their hashes, so whatever else got into it would not run."""
    body = FILE.read_bytes()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash_of(body, b'script')}'",
            f"style-src '{_hash_of(body, b'style')}'",
            "connect-src 'self'",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # text never becomes markup: the browser refuses innerHTML
            "trusted-types 'none'",
        )
    )
    headers = (
        (b"content-length", str(len(body)).encode()),
        (b"content-security-policy", policy.encode()),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
    )
    return Page(body, headers)


def _hash_of(page: bytes, element: bytes) -> str:
    """As a policy names what stands between the tags."""
    [inside] = re.findall(rb"<%b\b[^>]*>(.*?)</%b>" % (element, element), page, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(inside).digest()).decode()
