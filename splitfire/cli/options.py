"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SERVER = Annotated[str, typer.Option(envvar="SPLITFIRE_SERVER", help="host:port of a router")]
API_KEY_FILE = Annotated[
    Path | None, typer.Option(envvar="SPLITFIRE_API_KEY_FILE", help="file with an API key, where the router wants one")
]
TLS_CA = Annotated[
    Path | None, typer.Option(envvar="SPLITFIRE_TLS_CA", help="PEM of who signed the router's certificate; default: no TLS")
]
TIMEOUT = Annotated[float, typer.Option(envvar="SPLITFIRE_TIMEOUT", min=0.1, max=3600, help="seconds an answer may take")]
DEFAULT_SERVER = "127.0.0.1:7070"
