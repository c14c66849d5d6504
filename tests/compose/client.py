"""Runs in a container of its own: asks the node for more than it will ever get, and says `token` for each piece that comes."""

from __future__ import annotations

import http.client
import json
import sys

import grpc

from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

MANY = 1900


def by_grpc() -> None:
    channel = grpc.insecure_channel("node:7070", (("grpc.keepalive_time_ms", 600_000),))
    request = pb.GenerateRequest(
        text="def f(", sampling=pb.SamplingParams(temperature=1.5), stopping=pb.StoppingParams(max_tokens=MANY, ignore_eos=True)
    )
    for response in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=600):
        print("token", len(response.token_ids), flush=True)


def by_http() -> None:
    connection = http.client.HTTPConnection("node", 8000)
    asked = {"prompt": "def f(", "max_tokens": MANY, "ignore_eos": True, "temperature": 1.5, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    response = connection.getresponse()
    while line := response.readline():
        print("token", len(line), flush=True)


if __name__ == "__main__":
    by_grpc() if sys.argv[1] == "grpc" else by_http()
