"""Files, batches and several prompts with OpenAI's own client against real fleets, and what becomes of a batch when its router is killed."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet, start_fleet, until
from tests.e2e.test_routers import TwoRouters
from tests.e2e.test_tenants import key, table

OVER = ("completed", "failed", "expired", "cancelled")
GREEDY = {"model": "pico", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


def quiet_port() -> int:
    """Free, and none that the kernel would give to somebody else meanwhile."""
    while True:
        port = random.randint(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Door:
    """A fleet, and OpenAI's client of its HTTP port."""

    def __init__(self, fleet: RunningFleet, port: int, api_key: str = "none") -> None:
        self.fleet = fleet
        self.port = port
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=api_key, max_retries=0, timeout=60)

    def upload(self, lines: list[Any]) -> str:
        content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
        return self.client.files.create(file=("requests.jsonl", content.encode()), purpose="batch").id

    def begin(self, lines: list[Any], endpoint: Any = "/v1/completions") -> str:
        return self.client.batches.create(input_file_id=self.upload(lines), endpoint=endpoint, completion_window="24h").id

    def batch(self, batch_id: str) -> Batch:
        """Also while a router comes back."""
        found: list[Batch] = []

        def ask() -> bool:
            with contextlib.suppress(openai.APIConnectionError):
                found.append(self.client.batches.retrieve(batch_id))
            return bool(found)

        until(ask, 20)
        return found[0]

    def over(self, batch_id: str, seconds: float = 60.0) -> Batch:
        until(lambda: self.batch(batch_id).status in OVER, seconds, lambda: str(self.batch(batch_id)))
        return self.batch(batch_id)

    def rows(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(row) for row in self.client.files.content(file_id).text.splitlines()]


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**GREEDY, **body}}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    port, files = quiet_port(), tmp_path_factory.mktemp("files")
    router = ("--split=always", f"--http-port={port}", f"--files-dir={files}", "--batch-requests=3")
    with start_fleet("pico", router=router) as fleet:
        yield Door(fleet, port)


# -- batches


def test_a_batch_answers_what_a_client_would_get(door: Door) -> None:
    prompts = [f"def f{i}(" for i in range(25)]
    lines = [line(f"r{i}", prompt=prompt) for i, prompt in enumerate(prompts)]
    lines += [
        line("both", prompt=prompts[:2], n=2),
        line("bad", prompt="x", temperature=-1),
        line("other", prompt="x", model="gpt-5"),
    ]
    batch_id = door.client.batches.create(
        input_file_id=door.upload(lines), endpoint="/v1/completions", completion_window="24h", metadata={"for": "a test"}
    ).id
    over = door.over(batch_id)
    assert (over.status, over.metadata, over.model) == ("completed", {"for": "a test"}, "pico")
    counts = over.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (28, 26, 2)
    answers = {row["custom_id"]: row["response"]["body"] for row in door.rows(over.output_file_id)}
    for i, prompt in enumerate(prompts):
        assert answers[f"r{i}"]["choices"][0]["text"] == complete(door, prompt=prompt).choices[0].text
    assert [choice["index"] for choice in answers["both"]["choices"]] == [0, 1, 2, 3]
    refused = {row["custom_id"]: row["response"] for row in door.rows(over.error_file_id)}
    assert {name: response["status_code"] for name, response in refused.items()} == {"bad": 400, "other": 404}
    assert refused["bad"]["body"]["error"]["param"] == "temperature"
    assert over.usage is not None and over.usage.output_tokens == (25 + 4) * 12
    assert next(iter(door.client.batches.list(limit=1))).id == batch_id
    assert door.client.files.retrieve(over.output_file_id or "").purpose == "batch_output"
    door.fleet.assert_no_leaks()


def complete(door: Door, **given: Any) -> Any:
    known = {name: value for name, value in GREEDY.items() if name != "ignore_eos"}
    return door.client.completions.create(**{**known, "extra_body": {"ignore_eos": True}, **given})


def test_chats_too_and_never_more_in_flight_than_was_said(door: Door) -> None:
    url = "/v1/chat/completions"
    lines = [line(f"r{i}", url, messages=[{"role": "user", "content": f"def f{i}("}], max_tokens=100) for i in range(30)]
    batch_id = door.begin(lines, url)
    most, status = 0, ""
    while status not in OVER:
        load = door.fleet.status()
        most = max(most, load.running_requests + load.queued_requests)
        status = door.batch(batch_id).status
    assert 0 < most <= 3
    over = door.over(batch_id)
    assert {row["response"]["body"]["object"] for row in door.rows(over.output_file_id)} == {"chat.completion"}
    assert over.error_file_id is None


def test_a_cancel_frees_what_is_in_flight(door: Door) -> None:
    batch_id = door.begin([line(f"r{i}", prompt="x", max_tokens=1500) for i in range(50)])
    until(lambda: door.fleet.status().running_requests)
    assert door.client.batches.cancel(batch_id).status in ("cancelling", "cancelled")
    assert door.over(batch_id).status == "cancelled"
    door.fleet.assert_no_leaks()


def test_a_file_that_is_none_fails_its_batch(door: Door) -> None:
    over = door.over(door.begin([line("a", prompt="x"), "{", line("a", prompt="x")]))
    assert over.status == "failed" and over.errors is not None and over.errors.data is not None
    assert [error.line for error in over.errors.data] == [2, 3]
    with pytest.raises(openai.NotFoundError):
        door.client.batches.retrieve("batch_" + "0" * 32)
    with pytest.raises(openai.BadRequestError) as caught:
        door.client.files.create(file=("x", b"x"), purpose="assistants")
    assert caught.value.param == "purpose"


def written(files: Path) -> int:
    """Answers of batches that are not over."""
    return sum(path.read_bytes().count(b"\n") for path in files.glob("*/batches/*/output/content"))


def test_a_batch_outlives_a_router_that_is_killed(tmp_path: Path) -> None:
    """Twice, in the middle: every request is answered once, and only those in flight run again."""
    port = quiet_port()
    router = ("--split=always", f"--http-port={port}", f"--files-dir={tmp_path}", "--batch-requests=4")
    with start_fleet("pico", router=router) as fleet:
        door = Door(fleet, port)
        batch_id = door.begin([line(f"r{i}", prompt=f"def f{i}(", max_tokens=40) for i in range(150)])
        for least in (10, 60):
            until(lambda least=least: written(tmp_path) > least, 30)  # type: ignore[misc]
            process = fleet.process("router")
            process.kill()
            process.wait(10)

            def is_back() -> bool:
                fleet.fleet.watch()
                with contextlib.suppress(openai.APIConnectionError):
                    return bool(door.client.models.list().data)
                return False

            until(is_back, 40)
        over = door.over(batch_id)
        assert over.status == "completed"
        rows = door.rows(over.output_file_id)
        assert sorted(row["custom_id"] for row in rows) == sorted(f"r{i}" for i in range(150))
        assert len({row["response"]["request_id"] for row in rows}) == 150
        for row in rows[::30]:
            prompt = f"def f{row['custom_id'][1:]}("
            assert row["response"]["body"]["choices"][0]["text"] == complete(door, prompt=prompt, max_tokens=40).choices[0].text


@pytest.mark.long
def test_of_two_routers_one_has_a_batch_and_the_other_goes_on_with_it(tmp_path: Path) -> None:
    port = quiet_port()
    router = ("--split=always", f"--http-port={port}", f"--files-dir={tmp_path}", "--batch-requests=2")
    with start_fleet("pico", router=router, kind=TwoRouters) as fleet:
        door = Door(fleet, port)
        batch_id = door.begin([line(f"r{i}", prompt=f"def f{i}(", max_tokens=60) for i in range(200)])
        until(lambda: written(tmp_path) > 10, 30)
        logs = {child.name: child.log for child in fleet.fleet.children if child.name.startswith("router")}
        [owner] = [name for name, log in logs.items() if batch_id in log.read_text()]
        fleet.process(owner).kill()
        over = door.over(batch_id)
        assert over.status == "completed"
        assert sorted(row["custom_id"] for row in door.rows(over.output_file_id)) == sorted(f"r{i}" for i in range(200))
        assert all(batch_id in log.read_text() for log in logs.values())


def test_a_tenants_batch_is_its_own(tmp_path: Path) -> None:
    keys, port = tmp_path / "keys.toml", quiet_port()
    keys.touch(mode=0o600)
    keys.write_text(table("alice", "max_running = 1", "max_queued = 0") + table("bob"))
    router = ("--split=always", f"--http-port={port}", f"--keys-file={keys}", f"--files-dir={tmp_path / 'files'}")
    with start_fleet("pico", router=router) as fleet:
        alice, bob = (Door(fleet, port, key(name)) for name in ("alice", "bob"))
        batch_id = alice.begin([line(f"r{i}", prompt=f"def f{i}(") for i in range(20)])
        over = alice.over(batch_id)
        assert over.request_counts is not None and over.request_counts.completed == 20, "though it may have one open at a time"
        for ask in (
            lambda: bob.client.batches.retrieve(batch_id),
            lambda: bob.client.batches.cancel(batch_id),
            lambda: bob.client.files.content(over.output_file_id or ""),
            lambda: bob.client.files.delete(over.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                ask()
        assert not list(bob.client.files.list()) and not list(bob.client.batches.list())
        with pytest.raises(openai.AuthenticationError):
            Door(fleet, port).client.files.list()


# -- the same file, run from outside


@pytest.mark.long
def test_the_command_runs_a_batch_file_though_the_router_is_killed(tmp_path: Path) -> None:
    port = quiet_port()
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(json.dumps(line(f"r{i}", prompt=f"def f{i}(", max_tokens=40)) for i in range(300)))
    with start_fleet("pico", router=("--split=always", f"--http-port={port}")) as fleet:
        command = [
            sys.executable,
            "-m",
            "splitfire.cli",
            "batch",
            str(requests),
            "-o",
            str(output),
            f"--server=http://127.0.0.1:{port}",
        ]
        process = subprocess.Popen([*command, "--concurrency=4"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        until(lambda: output.exists() and output.read_bytes().count(b"\n") > 20, 30)
        fleet.process("router").kill()

        def is_done() -> bool:
            fleet.fleet.watch()
            return process.poll() is not None

        until(is_done, 60)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        assert "300 requests: 300 answered" in said and "sent again" in said
        rows = [json.loads(row) for row in output.read_text().splitlines()]
        assert sorted(row["custom_id"] for row in rows) == sorted(f"r{i}" for i in range(300))


# -- several prompts


def test_several_prompts_are_answered_prompt_by_prompt(door: Door) -> None:
    prompts = ["def add(a, b):", "import os", "class Point:"]
    alone = [complete(door, prompt=prompt) for prompt in prompts]
    together = complete(door, prompt=prompts)
    assert [(choice.index, choice.text) for choice in together.choices] == [(i, one.choices[0].text) for i, one in enumerate(alone)]
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert together.usage.completion_tokens == 36
    sampled = {"temperature": 1.0, "seed": 4, "n": 2, "logprobs": 1}
    expected = [choice.text for prompt in prompts for choice in complete(door, prompt=prompt, **sampled).choices]
    several = complete(door, prompt=prompts, **sampled).choices
    assert [choice.text for choice in several] == expected
    assert all("".join(choice.logprobs.tokens) == choice.text for choice in several)
    texts, reasons = [""] * 6, [""] * 6
    for chunk in complete(door, prompt=prompts, **sampled, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage
    assert texts == expected and set(reasons) == {"length"}
    assert usage.completion_tokens == 72


def test_several_prompts_may_be_ids(door: Door) -> None:
    prompts: Any = [[200, 201, 202], [300, 301], [400]]
    together = complete(door, prompt=prompts)
    assert [choice.text for choice in together.choices] == [complete(door, prompt=prompt).choices[0].text for prompt in prompts]


def test_one_bad_prompt_of_several_is_named_and_none_runs(door: Door) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(door, prompt=["a", "b", "x " * 5000])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt[2]")
    with pytest.raises(openai.BadRequestError) as caught:
        complete(door, prompt=["a"] * 129)
    assert "129 prompts, accepted: at most 128" in caught.value.message
    assert len(complete(door, prompt=["a"] * 128, max_tokens=2).choices) == 128


def test_who_goes_away_ends_all_prompts(door: Door) -> None:
    stream = complete(door, prompt=["a", "b", "c"], max_tokens=1900, temperature=1.5, stream=True)
    next(iter(stream))
    stream.close()
    door.fleet.assert_no_leaks()
