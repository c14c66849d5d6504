"""A batch, whatever happens to it: every request is answered once or the batch says why not, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import router.batches.run
from router.batches.records import BATCH_STATES, Event, Status, StoredBatch
from router.batches.rows import Rows
from router.tenants import Credential, KeyRing, Tenant
from splitfire.core import limits
from splitfire.core.errors import DataLoss, Exhausted, InvalidInput, Unavailable
from splitfire.core.row_file import RowFile
from tests.faults.sims import until
from tests.router.batches.house import House, line, play


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.batches.run, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("router.batches.runner.LOOK_S", 0.05)
    monkeypatch.setattr(router.batches.run, "SAVE_S", 0.05)


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(row["custom_id"] for row in rows)


def slow(house: House, seconds: float = 0.02) -> None:
    async def decide(_prompt: str, _count: int) -> None:
        await asyncio.sleep(seconds)

    house.answers.decide = decide


def test_every_request_is_answered_as_class_batch(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        slow(house, 0.005)
        batch = house.add_batch([line(f"r{i}", service_tier="priority") for i in range(100)])
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.COMPLETED
        assert (over.total, over.completed, over.failed) == (100, 100, 0)
        assert (over.used.prompt, over.used.cached, over.used.generated) == (200, 100, 300)
        assert ids(house.output(over)) == sorted(f"r{i}" for i in range(100))
        assert {row["response"]["request_id"] for row in house.output(over)} == {f"r-r{i}" for i in range(100)}
        assert over.has_output and not over.has_errors and house.store.file("default", over.error_file_id) is None
        assert {body["service_tier"] for body in house.answers.bodies.values()} == {"flex"}, "whatever it says itself"
        assert house.answers.most_open == 4
        assert set(over.at) == {Status.IN_PROGRESS, Status.FINALIZING, Status.COMPLETED}
        assert not house.store.all_open()
        assert sorted(os.listdir(house.store.directory(over))) == ["errors", "lock", "record.json"], (
            "nothing is left that nobody needs"
        )
        await house.runner.stop()

    play(scene())


def test_a_file_that_is_none_says_which_lines(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        bad = [line("a"), "{", {**line("b"), "url": "/v1/chat/completions"}, line("a"), {**line("c"), "method": "GET"}]
        batch = house.add_batch(bad)
        empty = house.add_batch(["", " "])
        many = house.add_batch(["x"] * 1000)
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.FAILED
        assert [(error.line, error.param) for error in over.errors] == [(2, "line"), (3, "url"), (4, "custom_id"), (5, "method")]
        assert "on line 1 and on line 4" in over.errors[2].message
        assert [error.code for error in (await house.over(empty)).errors] == ["empty_file"]
        assert len((await house.over(many)).errors) == limits.MAX_BATCH_ERRORS
        assert not house.answers.asked and not over.has_output
        await house.runner.stop()

    play(scene())


def test_a_file_may_have_so_many_lines_and_not_one_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BATCH_LINES", 20)

    async def scene() -> None:
        house = House(tmp_path)
        most, more = (house.add_batch([line(f"r{i}") for i in range(count)]) for count in (20, 21))
        house.runner.start()
        assert (await house.over(most)).completed == 20
        assert [error.code for error in (await house.over(more)).errors] == ["too_many_lines"]
        await house.runner.stop()

    play(scene())


def test_what_is_refused_is_in_the_file_of_errors_and_what_may_succeed_is_tried_again(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)

        async def decide(prompt: str, count: int) -> None:
            if prompt == "bad":
                raise InvalidInput("temperature", "is -1")
            if prompt == "bug":
                raise RuntimeError("not for clients")
            if prompt == "full" and count < 5:
                raise Exhausted("the queue is full", reason="queue_full", retry_after_s=0.01)
            if prompt == "nobody" and count < 3:
                raise Unavailable("no worker", reason="no_decode")
            if prompt == "lost":
                raise DataLoss("KV arrived corrupt", reason="data_loss")

        house.answers.decide = decide
        batch = house.add_batch([line(name) for name in ("bad", "bug", "full", "nobody", "lost", "good")])
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.COMPLETED
        assert ids(house.output(over)) == ["full", "good", "nobody"]
        errors = {row["custom_id"]: row for row in house.errors(over)}
        assert {name: row["response"]["status_code"] for name, row in errors.items()} == {"bad": 400, "bug": 500, "lost": 500}
        assert errors["bad"]["response"]["body"]["error"]["param"] == "temperature"
        assert "not for clients" not in str(errors)
        assert house.answers.asked == {"bad": 1, "bug": 1, "full": 5, "nobody": 3, "lost": 4, "good": 1}
        assert (over.completed, over.failed) == (3, 3)
        await house.runner.stop()

    play(scene())


def test_who_waits_for_room_holds_no_permit(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path, num_requests=1)

        async def decide(prompt: str, _count: int) -> None:
            if prompt.startswith("quota"):
                raise Exhausted("tokens are used up", reason="tenant_quota", retry_after_s=60.0)

        house.answers.decide = decide
        waiting = house.add_batch([line(f"quota{i}") for i in range(3)])
        other = house.add_batch([line(f"r{i}") for i in range(10)])
        house.runner.start()
        assert (await house.over(other)).completed == 10
        assert house.read(waiting).status is Status.IN_PROGRESS
        await house.runner.stop()

    play(scene())


def test_a_cancel_ends_what_is_in_flight_and_keeps_what_is_there(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        slow(house)
        batch = house.add_batch([line(f"r{i}") for i in range(500)])
        waiting = house.add_batch(["{"])
        house.store.cancel(waiting)
        house.runner.start()
        await until(lambda: house.runner.live(house.read(batch)).completed > 10)
        house.store.cancel(batch)
        over = await house.over(batch)
        assert over.status is Status.CANCELLED
        assert house.answers.num_open == 0
        assert 10 < over.completed < 500 and len(house.output(over)) == over.completed
        assert {Status.CANCELLING, Status.CANCELLED} <= set(over.at)
        assert (await house.over(waiting)).status is Status.CANCELLED, "before it was looked at"
        await house.runner.stop()

    play(scene())


def test_when_the_time_is_over_every_request_has_a_row(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        slow(house, 0.05)
        batch = house.add_batch([line(f"r{i}") for i in range(700)], seconds=3.0)
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.EXPIRED
        done, given_up = house.output(over), house.errors(over)
        assert done and given_up
        assert ids(done + given_up) == sorted(f"r{i}" for i in range(700))
        assert {row["error"]["code"] for row in given_up} == {"batch_expired"}
        assert (over.completed, over.failed) == (len(done), len(given_up))
        late = house.add_batch([line("a")], seconds=-1)
        house.runner.kick()
        assert (await house.over(late)).status is Status.EXPIRED
        await house.runner.stop()

    play(scene())


@pytest.mark.parametrize("torn", [b"", b'{"id": "batch_req_1", "custom_id": "r9', b"\0" * 9])
def test_another_process_goes_on_and_answers_nothing_twice(tmp_path: Path, torn: bytes) -> None:
    async def scene() -> None:
        first = House(tmp_path)
        slow(first)
        batch = first.add_batch([line(f"r{i}") for i in range(60)] + [line("bad")])
        first.runner.start()
        await until(lambda: len(first.unfinished_rows(batch)) > 10)
        await first.runner.stop()
        done = set(first.unfinished_rows(batch))
        assert first.read(batch).status is Status.IN_PROGRESS
        with (first.store.directory(batch) / "output" / "content").open("ab") as output:
            output.write(torn)
        second = House(tmp_path)
        second.runner.start()
        over = await second.over(batch)
        assert over.status is Status.COMPLETED
        assert ids(second.output(over)) == sorted([f"r{i}" for i in range(60)] + ["bad"]), "each once"
        assert not done & set(second.answers.asked), "what is answered is not asked again"
        assert (over.completed, over.used.generated) == (61, 183)
        await second.runner.stop()

    play(scene())


def test_of_two_processes_one_runs_a_batch_and_sees_what_the_other_is_told(tmp_path: Path) -> None:
    async def scene() -> None:
        houses = [House(tmp_path), House(tmp_path)]
        for house in houses:
            slow(house)
            house.runner.start()
        batch = houses[0].add_batch([line(f"r{i}") for i in range(200)])
        await until(lambda: any(house.answers.asked for house in houses))
        owner = next(house for house in houses if house.answers.asked)
        other = houses[1 - houses.index(owner)]
        await until(lambda: other.read(batch).completed > 10)  # reads of the other show how far it is
        assert not other.answers.asked
        other.store.cancel(batch)
        assert (await other.over(batch)).status is Status.CANCELLED
        assert not other.answers.asked
        again = other.add_batch([line(f"r{i}") for i in range(200)])
        await until(lambda: len(owner.answers.asked) + len(other.answers.asked) > 20)
        await owner.runner.stop()
        assert (await other.over(again)).completed == 200
        for house in houses:
            await house.runner.stop()

    play(scene())


def test_a_process_that_ended_while_it_made_the_files_is_gone_on_with(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        batch = house.add_batch([line("a")])
        rows = Rows(house.store, house.store.directory(batch))
        rows.add_answer("a", b'{"custom_id": "a", "response": {"body": {}}}\n', 1, 0, 1)
        rows.close()
        half = batch.after(Event.VALID, 1).after(Event.ALL_ANSWERED, 2).model_copy(update={"total": 1, "completed": 1})
        house.store.save(half)
        again = house.add_batch([line("b")])
        rows = Rows(house.store, house.store.directory(again))
        rows.add_answer("b", b'{"custom_id": "b", "response": {"body": {}}}\n', 1, 0, 1)
        rows.close()
        expired = again.after(Event.VALID, 1).after(Event.EXPIRE, 2).model_copy(update={"is_expired": True})
        house.store.save(expired)
        file = house.add_file(["x"]).model_copy(update={"id": again.output_file_id})
        house.store.adopt("default", house.store.directory(again) / "output", file)  # one file was made already
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.COMPLETED and ids(house.output(over)) == ["a"]
        late = await house.over(again)
        assert late.status is Status.EXPIRED and late.has_output
        assert not house.answers.asked
        await house.runner.stop()

    play(scene())


def test_a_full_disk_fails_the_batch_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        batch = house.add_batch([line(f"r{i}") for i in range(50)])
        real, real_save, left, saves = RowFile.append, house.store.save, [20], [0]

        def append(file: RowFile, row: bytes) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")
            real(file, row)

        def save(batch: StoredBatch) -> None:
            saves[0] += 1
            if left[0] < 0 and saves[0] % 3:  # not even that can be written, for a while
                raise OSError(errno.ENOSPC, "No space left on device")
            real_save(batch)

        monkeypatch.setattr(RowFile, "append", append)
        monkeypatch.setattr(house.store, "save", save)
        house.runner.start()
        over = await house.over(batch)
        assert over.status is Status.FAILED
        assert [error.code for error in over.errors] == ["disk_full"]
        assert "/secret" not in over.errors[0].message
        assert over.completed == 20 and len(house.output(over)) == 20, "what was answered is there"
        monkeypatch.setattr(RowFile, "append", real)
        monkeypatch.setattr(house.store, "save", real_save)
        following = house.add_batch([line("a")])
        house.runner.kick()
        assert (await house.over(following)).status is Status.COMPLETED
        await house.runner.stop()

    play(scene())


def test_answers_count_against_the_bound_of_all_files(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path, max_bytes=20_000)
        batch = house.add_batch([line(f"r{i}") for i in range(200)])
        house.runner.start()
        over = await house.over(batch)
        assert (over.status, over.errors[0].code) == (Status.FAILED, "disk_full")
        assert house.store.usage().num_bytes < 22_000
        await house.runner.stop()

    play(scene())


def credential(name: str) -> Credential:
    return Credential(hashlib.sha256(name.encode()).digest(), Tenant(name))


def test_a_tenant_that_is_gone_gets_nothing_more(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path, keys=KeyRing([credential("alice"), credential("bob")]))
        slow(house)
        batches = [house.add_batch([line(f"{name}{i}") for i in range(100)], name) for name in ("alice", "bob")]
        house.runner.start()
        await until(lambda: len(house.answers.asked) > 20)
        house.access.keys = KeyRing([credential("bob")])
        over = await house.over(batches[0])
        assert (over.status, over.errors[0].code) == (Status.FAILED, "tenant_gone")
        assert (await house.over(batches[1])).completed == 100
        assert house.answers.tenants == {"alice", "bob"}
        await house.runner.stop()

    play(scene())


def test_a_name_is_a_tenants_while_one_of_its_keys_is_good() -> None:
    old = Credential(b"1" * 32, Tenant("a"), date(2020, 1, 1))
    keys = KeyRing([old, Credential(b"2" * 32, Tenant("a"), date(2020, 3, 1))])
    assert keys.named("a", date(2020, 2, 1)) is not None
    assert keys.named("a", date(2020, 4, 1)) is None
    assert keys.named("b", date(2020, 2, 1)) is None


def test_batches_take_turns(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path, num_requests=3)
        slow(house, 0.002)
        long = house.add_batch([line(f"long{i}") for i in range(400)])
        short = [house.add_batch([line(f"short{k}-{i}") for i in range(10)]) for k in range(3)]
        house.runner.start()
        for batch in short:
            assert (await house.over(batch)).completed == 10
        assert house.runner.live(house.read(long)).completed < 200, "nobody waits for the long one's end"
        assert (await house.over(long)).completed == 400
        assert house.answers.most_open == 3
        await house.runner.stop()

    play(scene())


def test_a_tenant_does_not_take_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_RUNNING_BATCHES", 2)

    async def scene() -> None:
        house = House(tmp_path, keys=KeyRing([credential("alice"), credential("bob")]))
        slow(house)
        many = [house.add_batch([line(f"a{k}-{i}") for i in range(200)], "alice") for k in range(5)]
        one = house.add_batch([line("b")], "bob")
        house.runner.start()
        assert (await house.over(one)).completed == 1
        assert not any(house.read(batch).is_over for batch in many)
        await house.runner.stop()

    play(scene())


def test_a_process_that_drains_finishes_what_is_in_flight(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        slow(house, 0.2)
        batch = house.add_batch([line(f"r{i}") for i in range(100)])
        house.runner.start()
        await until(lambda: house.answers.num_open == 4)
        house.runner.drain()
        await until(lambda: house.answers.num_open == 0)
        await house.runner.stop()
        assert sum(house.answers.asked.values()) == 4
        assert len(house.unfinished_rows(batch)) == 4, "and keeps it"
        assert house.read(batch).status is Status.IN_PROGRESS

    play(scene())


def test_a_file_that_is_gone_fails_its_batch(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        batch = house.add_batch([line("a")])
        (house.store._files("default") / batch.input_file_id / "content").unlink()
        house.runner.start()
        over = await house.over(batch)
        assert (over.status, over.errors[0].code) == (Status.FAILED, "file_not_found")
        assert batch.input_file_id in over.errors[0].message
        await house.runner.stop()

    play(scene())


def test_every_state_but_the_last_has_a_way_on() -> None:
    last = {Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED}
    assert {status for status, ways in BATCH_STATES.items() if not ways} == last
    assert set(BATCH_STATES) == set(Status)
