"""Cancel, disconnect, deadline, SIGTERM, SIGKILL, Ctrl-C: the work stops, nothing is held, nothing is left running."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import psutil
import pytest

from splitfire.cli.supervisor import free_port
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import ROOT, assert_greedy, pico_oracle
from tests.e2e.fleets import LONG, PROMPT, SLOW, RunningFleet, cpu_s, generating, greedy, refusal_of, start_fleet, until

SPLITFIRE = [sys.executable, "-m", "splitfire.cli"]


def first_tokens(call: Iterator[pb.GenerateResponse], count: int) -> list[int]:
    ids: list[int] = []
    for response in call:
        ids += response.token_ids
        if len(ids) >= count:
            return ids
    raise AssertionError(f"the stream ended after {len(ids)} tokens")


# -- the client goes


@pytest.mark.parametrize("tokens", [0, 1, 2, 20])
def test_a_cancelled_request_holds_nothing_one_second_later(pico: RunningFleet, tokens: int) -> None:
    """P5, F46: with no token yet, after the first (its KV may be on the way), after the second, in the middle."""
    call = pico.stub.Generate(LONG)
    if tokens:
        first_tokens(call, tokens)
    else:
        until(lambda: pico.status().running_requests == 1)
    call.cancel()
    cancelled = time.monotonic()
    until(lambda: pico.is_quiet, 2.5)
    # Workers report within 50 ms of an end, at the latest every second; what is held may not outlive that.
    assert time.monotonic() - cancelled < 2.0


def test_a_batch_mate_of_a_cancelled_request_never_notices(pico: RunningFleet) -> None:
    alone = pico.ids(count=120)
    results: list[list[int]] = []
    mate = threading.Thread(target=lambda: results.append(pico.ids(count=120)))
    mate.start()
    for i in range(5):
        call = pico.stub.Generate(greedy([i + 50] * 200, 500))
        first_tokens(call, 1 + i)
        call.cancel()
    mate.join(60)
    assert results == [alone]


def test_a_killed_client_frees_everything(pico: RunningFleet) -> None:
    script = (
        "import sys; from tests.e2e.fleets import *; import grpc\n"
        "stub = inference_pb2_grpc.InferenceStub(grpc.insecure_channel(sys.argv[1]))\n"
        "for r in stub.Generate(LONG): print('token', flush=True)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", script, pico.address], stdout=subprocess.PIPE, cwd=ROOT)
    assert client.stdout is not None
    for _ in range(5):
        assert client.stdout.readline() == b"token\n"
    assert not pico.is_quiet
    client.kill()
    client.wait()
    until(lambda: pico.is_quiet, 2.5)
    client.stdout.close()


@pytest.mark.parametrize("seconds", [0.05, 0.5])
def test_an_expired_deadline_ends_the_work(pico: RunningFleet, seconds: float) -> None:
    """F52: with the prompt under way, and with an answer that takes longer than any deadline tried."""
    many = pb.GenerateRequest()
    many.CopyFrom(LONG)
    many.n = 8
    with pytest.raises(grpc.RpcError) as caught:
        for _ in pico.stub.Generate(many, timeout=seconds):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: pico.is_quiet, 2.5)


def test_a_client_that_does_not_read_costs_nobody_anything(pico: RunningFleet) -> None:
    """F49: decode does not wait for it, and its tokens are all there when it comes back."""
    expected = pico.ids(count=300)
    slow = pico.stub.Generate(greedy(count=300))
    ids = [*next(slow).token_ids]
    until(lambda: pico.worker("decode-0").running_sequences == 0, 20)  # finished although nobody reads
    assert pico.ids(count=50) == expected[:50]
    ids += [t for response in slow for t in response.token_ids]
    assert ids == expected


# -- a worker goes


def test_a_killed_prefill_worker_is_invisible_and_comes_back() -> None:
    """F01-F03, F19: killed while it computes; another one, or decode itself, takes over; `up` starts it again."""
    with start_fleet("pico", prefill=1, decode=1, router=("--split=auto",)) as fleet:
        prompt = [(5 * i) % 4000 for i in range(1500)]
        expected = fleet.ids(prompt, 8)
        prompt[0] += 1
        results: list[list[int]] = []
        asking = threading.Thread(target=lambda: results.append(fleet.ids(prompt, 8)))
        asking.start()
        until(lambda: fleet.status().running_requests == 1 or results)
        process = fleet.process("prefill-0")
        computed = cpu_s(process)
        until(lambda: cpu_s(process) > computed + 0.05, 30)
        before = fleet.worker("prefill-0").incarnation
        process.kill()
        asking.join(60)
        assert_greedy(pico_oracle(), prompt, results[0])
        assert len(expected) == 8
        until(lambda: _restarted(fleet, "prefill-0", before), 30)
        prompt[0] += 1
        answer = fleet.generate(greedy(prompt, 4))[0]
        assert answer.summary.kv_transfer.bytes > 0, "the new incarnation is used"
        fleet.assert_no_leaks()


def _restarted(fleet: RunningFleet, name: str, before: str) -> bool:
    fleet.fleet.watch()
    return any(w.worker_id == name and w.incarnation != before for w in fleet.status().workers)


def test_the_last_decode_worker_dying_says_what_was_streamed() -> None:
    """F10."""
    with start_fleet("pico") as fleet:
        call = fleet.stub.Generate(LONG)
        first_tokens(call, 5)
        fleet.process("decode-0").kill()
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert time.monotonic() - began < 2
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.reason, refusal.is_retryable) == (grpc.StatusCode.UNAVAILABLE, "no_decode", True)
        assert refusal.metadata["incomplete"] == "true"
        assert int(refusal.metadata["generated_tokens"]) >= 5
        until(lambda: fleet.worker("prefill-0").free_blocks == fleet.worker("prefill-0").total_blocks, 3)


def test_sigterm_drains_a_worker() -> None:
    """F16: what is accepted is finished, nothing new is taken, exit 0."""
    with start_fleet("pico", prefill=1, decode=2, worker=SLOW) as fleet:
        expected = fleet.ids(count=300)
        fleet.assert_no_leaks()
        call = fleet.stub.Generate(greedy(count=300))
        ids = first_tokens(call, 3)
        busy = generating(fleet)
        [child] = [c for c in fleet.fleet.children if c.name == busy]
        assert child.process is not None
        child.process.terminate()
        until(lambda: all(w.is_draining for w in fleet.status().workers if w.worker_id == busy), 3)
        other = fleet.ids([9] * 40, 4)  # goes to the other one
        assert len(other) == 4
        ids += [t for response in call for t in response.token_ids]
        assert ids == expected
        assert child.process.wait(10) == 0


def test_sigterm_drains_the_router_and_a_second_one_ends_it() -> None:
    with start_fleet("pico", prefill=0, router=()) as fleet:
        call = fleet.stub.Generate(LONG)
        ids = first_tokens(call, 3)
        router = fleet.fleet.children[0].process
        assert router is not None
        router.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            until(lambda: fleet.ids(count=2) and False, 5)
        assert refusal_of(caught.value).reason == "draining"
        ids += [t for response in call for t in response.token_ids]
        assert len(ids) == LONG.stopping.max_tokens
        assert router.wait(10) == 0
        # Workers let go of what the router had given them, and wait for the next one (F12).
        assert all(c.process is not None and c.process.poll() is None for c in fleet.fleet.children[1:])


def test_workers_clean_up_when_the_router_is_killed_and_attach_to_the_next_one() -> None:
    """F12: orphaned requests end, blocks come back, no worker is restarted."""
    with start_fleet("pico") as fleet:
        call = fleet.stub.Generate(LONG)
        first_tokens(call, 3)
        incarnations = {w.worker_id: w.incarnation for w in fleet.status().workers}
        fleet.process("router").kill()
        with pytest.raises(grpc.RpcError):
            for _ in call:
                pass
        until(lambda: _watched(fleet), 30)
        assert {w.worker_id: w.incarnation for w in fleet.status().workers} == incarnations
        fleet.assert_no_leaks()
        assert len(fleet.ids(count=5)) == 5


def test_a_worker_that_was_frozen_is_given_up_and_used_again_when_it_wakes() -> None:
    """F14, F15: its peers were told that it is gone; the same process, the same incarnation, is there again."""
    with start_fleet("pico") as fleet:
        expected = fleet.ids(count=5)
        decode = fleet.process("decode-0")
        decode.suspend()
        try:
            until(lambda: len(fleet.status().workers) == 1, 30)
        finally:
            decode.resume()
        until(lambda: len(fleet.status().workers) == 2, 30)
        answer = fleet.generate(greedy(PROMPT, 5))[0]
        assert answer.ids == expected
        fleet.assert_no_leaks()


def _watched(fleet: RunningFleet) -> bool:
    fleet.fleet.watch()
    try:
        return len(fleet.status().workers) == 2
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.long)])
def test_an_idle_fleet_ends_at_once(rounds: int) -> None:
    """A cancellation that is swallowed leaves a process behind until somebody kills it; once in many times, so many times."""
    for _ in range(rounds):
        with start_fleet("pico") as fleet:
            children = [c.process for c in fleet.fleet.children if c.process is not None]
            for process in children:
                process.terminate()
            assert [process.wait(8) for process in children] == [0, 0, 0]


# -- splitfire up


def start_up(*flags: str, through: Sequence[str] = ()) -> tuple[subprocess.Popen[str], list[str]]:
    """`splitfire up pico`, and the lines it printed until it was ready."""
    up = subprocess.Popen(
        [*through, *SPLITFIRE, "up", "pico", "--port=0", "--http-port=0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    lines: list[str] = []
    assert up.stdout is not None
    for line in up.stdout:
        lines.append(line.rstrip())
        if "Ctrl-C" in line:
            return up, lines
    raise AssertionError("\n".join(lines))


def family_of(up: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(up.pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_up_says_what_is_ready_and_ctrl_c_ends_everything() -> None:
    up, lines = start_up()
    text = "\n".join(lines)
    assert re.search(r"^router +ready +127\.0\.0\.1:\d+", text, re.M)
    assert re.search(r"^prefill-0 +ready", text, re.M)
    assert re.search(r"^decode-0 +ready.*from prefill-0: ucx over shared memory, [\d.]+ GB/s", text, re.M)
    [server] = re.findall(r"--server (\S+)", text)
    family = family_of(up)
    assert len(family) == 5, "router, its two tokenizer processes, two workers"
    answered = subprocess.run(
        [*SPLITFIRE, "generate", "import", "--server", server, "--max-tokens=5", "--temperature=0", "--trace"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert "prefill" in answered.stderr
    up.send_signal(signal.SIGINT)
    up.communicate(timeout=20)
    until(lambda: all_gone(family), 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_starting_ends_quietly(number: int) -> None:
    process = subprocess.Popen([*SPLITFIRE, "up", "pico", "--port=0", "--http-port=0"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    until(lambda: bool(psutil.Process(process.pid).children()), 30)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    until(lambda: not any(child.is_running() for child in children), 10)


@pytest.mark.long
def test_services_work_without_asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    """B116: nothing from outside is checked by an assert, nothing needed happens inside one."""
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    with start_fleet("pico") as fleet:
        answer = fleet.generate(greedy(PROMPT, 8))[0]
        assert len(answer.ids) == 8
        assert answer.summary.kv_transfer.bytes
        with pytest.raises(grpc.RpcError) as caught:
            fleet.ids(count=10**6)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        fleet.assert_no_leaks()


def test_a_killed_supervisor_takes_its_children_along() -> None:
    up, _ = start_up()
    family = family_of(up)
    up.kill()
    up.communicate()
    until(lambda: all_gone(family), 10)


def test_up_aggregated() -> None:
    """And begun as a script begins what shall run beside it: with SIGINT ignored, until it says otherwise."""
    up, lines = start_up("--aggregated", through=["bash", "-c", "trap '' INT; exec \"$@\"", "-"])
    assert not any("prefill-0" in line for line in lines)
    up.send_signal(signal.SIGINT)
    said, _ = up.communicate(timeout=20)
    assert said.strip() == "ending the fleet"


def test_a_port_in_use_is_one_line_and_exit_code_2() -> None:
    """F72, B113."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [*SPLITFIRE, "up", "pico", f"--port={port}", "--http-port=0"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
        )
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_another_fleets_router_on_the_port_is_not_taken_for_our_own(pico: RunningFleet) -> None:
    port = pico.address.split(":")[1]
    command = [*SPLITFIRE, "up", "pico", f"--port={port}", "--http-port=0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "ready" not in ended.stdout


def test_a_model_that_is_not_there_is_refused_before_anything_starts() -> None:
    command = [*SPLITFIRE, "up", "nope", "--port=0", "--http-port=0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "splitfire: nope: No such file or directory; give a model directory, a hub id, or pico\n"


def test_a_worker_that_cannot_start_ends_the_fleet_with_its_own_line() -> None:
    """F74."""
    command = [*SPLITFIRE, "up", "pico", "--port=0", "--http-port=0", "--kv-memory=1MiB"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert ended.returncode == 2
    assert "kv_memory is 1048576 bytes" in ended.stderr


def test_workers_may_come_before_their_router(tmp_path: Path) -> None:
    """F73: any start order converges without a restart."""
    worker_port = free_port()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "splitfire.worker", f"--router=127.0.0.1:{worker_port}", "--threads=1"]
    log = (tmp_path / "worker.log").open("w")
    worker = subprocess.Popen(command, stderr=log, stdout=log, cwd=ROOT, env=environment)
    until(lambda: '"ready"' in (tmp_path / "worker.log").read_text(), 30)
    router_log = (tmp_path / "router.log").open("w")
    router = subprocess.Popen(
        [sys.executable, "-m", "router", "--port=0", f"--worker-port={worker_port}"], stderr=router_log, stdout=router_log, cwd=ROOT
    )
    until(lambda: "worker attached" in (tmp_path / "router.log").read_text(), 30)
    ready = next(json.loads(line) for line in (tmp_path / "router.log").read_text().splitlines() if '"ready"' in line)
    subprocess.run(
        [*SPLITFIRE, "generate", "x", "--server", ready["address"], "--max-tokens=3"], check=True, capture_output=True, cwd=ROOT
    )
    for process in (worker, router):
        process.terminate()
        assert process.wait(10) == 0
    log.close()
    router_log.close()


def test_every_listening_port_is_known(pico: RunningFleet) -> None:
    """S2: two ports of the router, one status port and one UCX port a worker, all on loopback."""
    listening: dict[str, set[int]] = {}
    for child in pico.fleet.children:
        process = pico.process(child.name)
        for one in (process, *process.children(recursive=True)):
            for connection in one.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), connection
                    listening.setdefault(child.name, set()).add(connection.laddr.port)
    assert {name: len(ports) for name, ports in listening.items()} == {"router": 2, "prefill-0": 2, "decode-0": 2}
