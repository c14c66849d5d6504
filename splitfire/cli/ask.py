"""`splitfire generate` and `splitfire chat`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from splitfire.cli.client import Client, connect
from splitfire.cli.formats import read_text, response_format
from splitfire.cli.options import API_KEY_FILE, DEFAULT_SERVER, SERVER, TIMEOUT, TLS_CA
from splitfire.cli.render import print_waterfall
from splitfire.v1 import inference_pb2 as pb

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def generate(
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads standard input")],
    server: SERVER = DEFAULT_SERVER,
    max_tokens: Annotated[int, typer.Option(envvar="SPLITFIRE_MAX_TOKENS", min=1, help="at most this many tokens")] = 128,
    temperature: Annotated[
        float | None, typer.Option(envvar="SPLITFIRE_TEMPERATURE", help="0 is greedy; default: the model's")
    ] = None,
    top_p: Annotated[float | None, typer.Option(envvar="SPLITFIRE_TOP_P", help="nucleus")] = None,
    top_k: Annotated[int | None, typer.Option(envvar="SPLITFIRE_TOP_K", help="most likely k")] = None,
    seed: Annotated[int | None, typer.Option(envvar="SPLITFIRE_SEED", help="the same seed gives the same tokens")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(envvar="SPLITFIRE_STOP", help="end before this text; may be given several times")
    ] = None,
    predicted: Annotated[
        Path | None, typer.Option(envvar="SPLITFIRE_PREDICTED", help="file that the answer will resemble: faster where it does")
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(envvar="SPLITFIRE_JSON_SCHEMA", help="the answer is JSON of this schema"),
    ] = None,
    regex: Annotated[str | None, typer.Option(envvar="SPLITFIRE_REGEX", help="the whole answer matches this")] = None,
    grammar: Annotated[Path | None, typer.Option(envvar="SPLITFIRE_GRAMMAR", help="the answer follows this GBNF")] = None,
    trace: Annotated[bool, typer.Option("--trace", envvar="SPLITFIRE_TRACE", help="show where the time went")] = False,
    timeout: TIMEOUT = 600.0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """Streams the continuation of a text."""
    text = sys.stdin.read() if prompt == "-" else prompt
    request = pb.GenerateRequest(
        text=text,
        predicted_output=read_text("--predicted", predicted) if predicted is not None else "",
        response_format=response_format(json_schema, regex, grammar),
        sampling=pb.SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        stopping=pb.StoppingParams(max_tokens=max_tokens, stop=stop or []),
    )
    with connect(server, api_key_file, tls_ca) as client:
        summary = stream_answer(client, request, timeout)
    if trace and summary is not None:
        err.print()
        print_waterfall(err, summary)


def chat(
    server: SERVER = DEFAULT_SERVER,
    max_tokens: Annotated[int, typer.Option(envvar="SPLITFIRE_MAX_TOKENS", min=1, help="of one answer")] = 256,
    timeout: TIMEOUT = 600.0,
    api_key_file: API_KEY_FILE = None,
    tls_ca: TLS_CA = None,
) -> None:
    """A conversation; an empty line or Ctrl-D ends it."""
    with connect(server, api_key_file, tls_ca) as client:
        out.print(f"[dim]{client.model().id} on {server}; an empty line ends[/]")
        messages: list[pb.ChatMessage] = []
        session = f"chat-{os.getpid()}"
        while line := _ask():
            messages.append(pb.ChatMessage(role="user", content=line))
            request = pb.GenerateRequest(messages=messages, stopping=pb.StoppingParams(max_tokens=max_tokens), session_id=session)
            answer: list[str] = []
            stream_answer(client, request, timeout, answer)
            messages.append(pb.ChatMessage(role="assistant", content="".join(answer)))


def stream_answer(
    client: Client, request: pb.GenerateRequest, timeout_s: float, answer: list[str] | None = None
) -> pb.Summary | None:
    """Prints the text as it comes; the summary at the end."""
    summary = None
    for response in client.generate(request, timeout_s):
        if response.text:
            sys.stdout.write(response.text)
            sys.stdout.flush()
            if answer is not None:
                answer.append(response.text)
        if response.HasField("summary"):
            summary = response.summary
    sys.stdout.write("\n")
    sys.stdout.flush()
    return summary


def _ask() -> str:
    try:
        return out.input("[bold]> [/]").strip()
    except EOFError:
        return ""
