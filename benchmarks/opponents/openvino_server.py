"""OpenVINO GenAI's continuous batching behind the smallest HTTP server that can stream: it has none of its own in Python.

Runs in build/openvino-venv, of which it uses openvino-genai, and of ours it imports nothing. One thread does everything in
turn: take new requests, one `step()` of the pipeline, write each request's new token ids. So nothing waits for another
thread, and what HTTP costs is a few microseconds a token; ids are not made into text, which other servers do.

    POST /v1/completions {"prompt": [ids], "max_tokens": n}    server-sent events with `token_ids`, then [DONE]
    GET  /health
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
from dataclasses import dataclass, field

import numpy as np
import openvino
import openvino_genai as genai

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
MAX_REQUEST_BYTES = 1 << 20


@dataclass
class Connection:
    """One client: a request being read, then its answer being written."""

    socket: socket.socket
    received: bytes = b""
    handle: genai.GenerationHandle | None = None
    tokens_left: int = 0


@dataclass
class Server:
    """Owner of the pipeline and of all connections. One thread."""

    pipeline: genai.ContinuousBatchingPipeline
    listener: socket.socket
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    running: list[Connection] = field(default_factory=list)
    num_requests: int = 0

    def serve(self) -> None:
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        while True:
            for key, _ in self.selector.select(0 if self.running else None):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            if self.running:
                self.pipeline.step()
                for connection in list(self.running):
                    self._write(connection)

    def _accept(self) -> None:
        client, _ = self.listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(client, selectors.EVENT_READ, Connection(client))

    def _read(self, connection: Connection) -> None:
        try:
            more = connection.socket.recv(1 << 16)
        except ConnectionError:
            more = b""
        connection.received += more
        if not more or len(connection.received) > MAX_REQUEST_BYTES:
            self._end(connection)
            return
        head, separator, body = connection.received.partition(b"\r\n\r\n")
        if not separator or connection.handle is not None:
            return
        if head.startswith(b"GET "):
            connection.socket.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self._end(connection)
        elif len(body) >= _content_length(head):
            self._start(connection, json.loads(body))

    def _start(self, connection: Connection, request: dict[str, object]) -> None:
        config = genai.GenerationConfig()
        connection.tokens_left = config.max_new_tokens = int(str(request["max_tokens"]))
        config.ignore_eos = True
        config.do_sample = False
        prompt = openvino.Tensor(np.array([request["prompt"]], dtype=np.int64))
        connection.handle = self.pipeline.add_request(self.num_requests, prompt, config)
        self.num_requests += 1
        self.running.append(connection)
        connection.socket.sendall(HEADERS)

    def _write(self, connection: Connection) -> None:
        handle = connection.handle
        assert handle is not None
        ids: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
        is_lost = handle.get_status() not in (genai.GenerationStatus.RUNNING, genai.GenerationStatus.FINISHED)
        try:
            if ids:
                connection.tokens_left -= len(ids)
                event = {"choices": [{"index": 0, "text": "", "token_ids": ids}]}
                connection.socket.sendall(b"data: " + json.dumps(event).encode() + b"\n\n")
            if connection.tokens_left <= 0:
                connection.socket.sendall(b"data: [DONE]\n\n")
        except ConnectionError:
            is_lost = True
        if is_lost or connection.tokens_left <= 0:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        if connection in self.running:
            self.running.remove(connection)
            if connection.tokens_left > 0 and connection.handle is not None:
                connection.handle.cancel()
                self.pipeline.step()  # in which the pipeline drops what was cancelled
        self.selector.unregister(connection.socket)
        connection.socket.close()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0


def open_pipeline(args: argparse.Namespace) -> genai.ContinuousBatchingPipeline:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = args.cache_gib
    scheduler.enable_prefix_caching = args.prefix_caching
    scheduler.max_num_batched_tokens = args.batched_tokens
    scheduler.dynamic_split_fuse = True
    properties: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": args.threads}
    if args.precision:
        properties["INFERENCE_PRECISION_HINT"] = args.precision
    if args.kv_precision:
        properties["KV_CACHE_PRECISION"] = args.kv_precision
    return genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory made by optimum-cli export openvino")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cache-gib", type=int, default=1)
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument("--precision", default="", help="INFERENCE_PRECISION_HINT: f32, bf16 or f16; its own choice when not given")
    parser.add_argument(
        "--kv-precision", default="", help="KV_CACHE_PRECISION: u8, bf16, f16 or f32; its own choice when not given"
    )
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    pipeline = open_pipeline(args)
    listener = socket.create_server(("127.0.0.1", args.port), backlog=64)
    print("ready", flush=True)
    Server(pipeline, listener).serve()


if __name__ == "__main__":
    main()
