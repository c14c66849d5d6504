"""Files and batches over a raw socket: what is hostile is refused, costs nobody else anything, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import hashlib
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import router.http_api
from router.batches.api import BatchApi
from router.batches.records import FILE, Status, new_id
from router.batches.store import Draft
from router.http_api import HttpApi
from router.http_server import HttpServer
from router.tenants import Credential, KeyRing, Tenant
from splitfire.core import limits
from splitfire.core.validation import ModelLimits
from tests.faults.sims import until
from tests.router.batches.house import House, line, play

END = b"--b--\r\n"
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n'
MULTIPART = "Content-Type: multipart/form-data; boundary=b"
JSON = "Content-Type: application/json"


def form(content: bytes, *parts: bytes) -> bytes:
    return b"".join((PURPOSE, *parts, HEAD, content, b"\r\n", END))


class Site:
    """A house behind a port."""

    def __init__(self, house: House, port: int) -> None:
        self.house = house
        self.port = port

    async def ask(self, method: str, path: str, body: bytes = b"", *lines: str, key: str = "") -> tuple[int, Any]:
        head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *lines]
        if key:
            head.append(f"Authorization: Bearer {key}")
        told = await self.say("\r\n".join([*head, "", ""]).encode() + body)
        content = told.partition(b"\r\n\r\n")[2]
        return int(told.split()[1]), json.loads(content) if b"application/json" in told else content

    async def upload(self, body: bytes, *, key: str = "") -> tuple[int, Any]:
        return await self.ask("POST", "/v1/files", body, MULTIPART, key=key)

    async def say(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """All that is answered until the other side closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(pause_s)

        sending = asyncio.create_task(send())
        told = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while chunk := await reader.read(1 << 16):
                    told += chunk
        sending.cancel()
        writer.close()
        return told

    def leftovers(self) -> list[str]:
        return [str(path) for path in (self.house.store._root / "new").rglob("*")]


@asynccontextmanager
async def site(root: Path, **more: Any) -> AsyncIterator[Site]:
    house = House(root, **more)
    inference = SimpleNamespace(
        model=SimpleNamespace(limits=lambda: ModelLimits("m", 100, 100)), access=house.access, detokenizer=None
    )
    files = BatchApi(house.store, house.disk, house.runner, lambda: "m").routes()
    server = HttpServer(HttpApi(inference, lambda: "f", lambda: True, is_loopback=True, files=files), None, None)  # type: ignore[arg-type]
    port = await server.start("127.0.0.1", 0, is_shared=False)
    house.runner.start()
    try:
        yield Site(house, port)
    finally:
        await house.runner.stop()
        await server.stop()


def over(root: Path, scene: Any, **more: Any) -> None:
    async def bounded() -> None:
        async with site(root, **more) as made:
            await scene(made)

    play(bounded())


def error(answer: tuple[int, Any]) -> tuple[int, str, str | None]:
    status, body = answer
    return status, body["error"]["code"], body["error"]["param"]


def test_a_file_goes_in_and_comes_out(tmp_path: Path) -> None:
    async def scene(here: Site) -> None:
        content = b"\r\n--a\0\xff" * 100_000
        status, file = await here.upload(form(content))
        assert status == 200
        assert {**file, "id": "", "created_at": 0, "expires_at": 0} == {
            "id": "", "object": "file", "bytes": len(content), "created_at": 0, "filename": "in.jsonl", "purpose": "batch",
            "status": "processed", "status_details": None, "expires_at": 0,
        }  # fmt: skip
        assert file["expires_at"] - file["created_at"] == 30 * 24 * 3600
        assert await here.ask("GET", f"/v1/files/{file['id']}") == (200, file)
        assert await here.ask("GET", f"/v1/files/{file['id']}/content") == (200, content)
        assert await here.ask("DELETE", f"/v1/files/{file['id']}") == (200, {"id": file["id"], "object": "file", "deleted": True})
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert error(await here.ask(method, f"/v1/files/{file['id']}{path}")) == (404, "file_not_found", "file_id")
        kept = b'--b\r\nContent-Disposition: form-data; name="expires_after[%s]"\r\n\r\n%s\r\n'
        _, short = await here.upload(form(b"x", kept % (b"anchor", b"created_at"), kept % (b"seconds", b"3600")))
        assert short["expires_at"] - short["created_at"] == 3600
        assert error(await here.upload(form(b"x", kept % (b"anchor", b"created_at"), kept % (b"seconds", b"3599"))))[0] == 400
        assert not here.leftovers()

    over(tmp_path, scene)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_form"),
        (b"nonsense", 400, "invalid_form"),
        (form(b"x")[:-4], 400, "invalid_form"),
        (form(b""), 400, "invalid_file"),
        (form(b"x").replace(b"batch", b"fine-tune"), 400, "invalid_purpose"),
        (form(b"x").replace(b"in.jsonl", b"../x"), 400, "invalid_filename"),
        (form(b"x", b'--b\r\nContent-Disposition: form-data; name="user"\r\n\r\nx\r\n'), 400, "invalid_user"),
        (PURPOSE * 10**5, 400, "invalid_purpose"),
        (b"".join(b"--b\r\nContent-Disposition: form-data; name=p%d\r\n\r\nx\r\n" % i for i in range(10**5)), 400, "invalid_p0"),
        (b"--b\r\nX: " + b"a" * 10**6, 400, "invalid_form"),
        (b"--b\r\n" + b"X: a\r\n" * 10**5, 400, "invalid_form"),
        (b"\r\n" * 10**6, 400, "invalid_form"),
    ],
)  # fmt: skip
def test_a_form_that_is_none_is_told_and_leaves_nothing(tmp_path: Path, body: bytes, status: int, code: str) -> None:
    async def scene(here: Site) -> None:
        assert error(await here.upload(body))[:2] == (status, code)
        assert not here.leftovers() and here.house.store.usage().num_files == 0
        assert (await here.upload(form(b"x")))[0] == 200, "and others are served"

    over(tmp_path, scene)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "b" * 100])
def test_a_body_of_another_kind_is_no_upload(tmp_path: Path, kind: str) -> None:
    async def scene(here: Site) -> None:
        told = await here.ask("POST", "/v1/files", form(b"x"), *([f"Content-Type: {kind}"] if kind else []))
        assert told[0] in (400, 415)
        assert not here.leftovers()

    over(tmp_path, scene)


def test_an_upload_that_never_ends_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes, in time, and when nothing comes any more; by length or in chunks."""
    monkeypatch.setattr(limits, "MAX_UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(router.http_api, "READ_ON_BYTES", 1 << 20)
    monkeypatch.setattr(router.http_api, "SKIP_S", 0.3)
    begin = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n" + MULTIPART.encode() + b"\r\n"
    by_length = begin + b"Content-Length: 100000000000\r\n\r\n" + PURPOSE + HEAD
    in_chunks = begin + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n" % (len(PURPOSE + HEAD), PURPOSE + HEAD)
    megabyte = b"a" * (1 << 20)

    async def scene(here: Site) -> None:
        told = await here.say(by_length, *[megabyte] * 100)
        assert told.startswith(b"HTTP/1.1 413") and b"connection: close" in told
        told = await here.say(in_chunks, *[b"%x\r\n%s\r\n" % (len(megabyte), megabyte)] * 100)
        assert told.startswith(b"HTTP/1.1 413")
        with monkeypatch.context() as short:
            short.setattr(router.http_api, "BODY_S", 0.3)
            short.setattr(limits, "UPLOAD_S", 1.0)
            for head in (by_length, in_chunks):
                assert (await here.say(head)).startswith(b"HTTP/1.1 408"), "nothing comes any more"
            trickle = [b"a"] * 200
            assert (await here.say(by_length, *trickle, pause_s=0.1)).startswith(b"HTTP/1.1 408"), "a byte now and then"
        assert not here.leftovers()
        assert (await here.upload(form(b"a" * (1 << 20))))[0] == 200, "exactly as much as may be"
        assert error(await here.upload(form(b"a" * ((1 << 20) + 1)))) == (413, "file_too_large", "file")

    over(tmp_path, scene)


def test_who_goes_away_in_an_upload_leaves_nothing(tmp_path: Path) -> None:
    async def scene(here: Site) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", here.port)
        head = "\r\n".join(["POST /v1/files HTTP/1.1", "Host: localhost", MULTIPART, "Content-Length: 1000000", "", ""])
        writer.write(head.encode() + PURPOSE + HEAD + b"a" * 200_000)
        await until(lambda: len(here.leftovers()) == 2)
        writer.transport.abort()
        await until(lambda: not here.leftovers())

    over(tmp_path, scene)


def test_uploads_have_a_bound_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_UPLOADS", 2)

    async def scene(here: Site) -> None:
        head = "\r\n".join(["POST /v1/files HTTP/1.1", "Host: localhost", MULTIPART, "Content-Length: 1000000", "", ""])
        writers = [(await asyncio.open_connection("127.0.0.1", here.port))[1] for _ in range(2)]
        for writer in writers:
            writer.write(head.encode() + PURPOSE + HEAD + b"a")
        await until(lambda: len(here.leftovers()) == 4)
        assert error(await here.upload(form(b"x")))[:2] == (429, "uploads_full")
        for writer in writers:
            writer.close()
        await until(lambda: not here.leftovers())
        assert (await here.upload(form(b"x")))[0] == 200

    over(tmp_path, scene)


def test_files_have_a_bound_in_number_and_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_FILES", 3)

    async def scene(here: Site) -> None:
        assert error(await here.upload(form(b"x" * 70_000))) == (413, "files_full", "file"), "all together are too many"
        for _ in range(3):
            assert (await here.upload(form(b"x" * 10_000)))[0] == 200
        assert error(await here.upload(form(b"x"))) == (413, "files_full", "file")
        assert not here.leftovers()

    over(tmp_path, scene, max_bytes=65_536)


def test_a_full_disk_is_told_and_serving_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F29."""

    async def scene(here: Site) -> None:
        real = Draft.write

        def full(_: Draft, __: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

        monkeypatch.setattr(Draft, "write", full)
        status, told = await here.upload(form(b"x" * 100_000))
        assert (status, told["error"]["code"]) == (503, "disk_full")
        assert "/secret" not in str(told)
        assert not here.leftovers()
        assert (await here.ask("GET", "/health"))[0] == 200
        monkeypatch.setattr(Draft, "write", real)
        assert (await here.upload(form(b"x")))[0] == 200

    over(tmp_path, scene)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/files/..",
            "/v1/files/../../etc/passwd",
            "/v1/files/%2e%2e",
            "/v1/files/%2e%2e%2fx",
            "/v1/files/",
            "/v1/files//content",
        ),
        *(
            "/v1/files/file-" + "0" * 32,
            "/v1/files/x/content/y",
            "/v1/batches/x/cancel/y",
            "/v1/batches/..",
            "/v1/batches/batch_" + "0" * 32,
        ),
        *("/v1/files/" + "a" * 5000, "/v1/files/file-%00", "/v1/batches/%0a"),
    ],
)
def test_what_no_id_names_is_not_there(tmp_path: Path, path: str) -> None:
    async def scene(here: Site) -> None:
        assert (await here.ask("GET", path))[0] == 404

    over(tmp_path, scene)


def keys(*names: str) -> KeyRing:
    return KeyRing([Credential(hashlib.sha256(name.encode()).digest(), Tenant(name)) for name in names])


def test_what_is_another_tenants_is_not_there(tmp_path: Path) -> None:
    async def scene(here: Site) -> None:
        _, file = await here.upload(form(json.dumps(line("a")).encode()), key="alice")
        asked = json.dumps({"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}).encode()
        _, batch = await here.ask("POST", "/v1/batches", asked, JSON, key="alice")
        for method, path in (
            ("GET", f"/v1/files/{file['id']}"), ("GET", f"/v1/files/{file['id']}/content"), ("DELETE", f"/v1/files/{file['id']}"),
            ("GET", f"/v1/batches/{batch['id']}"), ("POST", f"/v1/batches/{batch['id']}/cancel"),
        ):  # fmt: skip
            assert (await here.ask(method, path, key="bob"))[0] == 404
            assert (await here.ask(method, path))[0] == 401
        assert (await here.ask("GET", "/v1/files", key="bob"))[1]["data"] == []
        assert (await here.ask("GET", "/v1/batches", key="bob"))[1]["data"] == []
        assert error(await here.ask("POST", "/v1/batches", asked, JSON, key="bob"))[:2] == (404, "file_not_found")
        assert (await here.ask("GET", f"/v1/files/{file['id']}", key="alice"))[0] == 200

    over(tmp_path, scene, keys=keys("alice", "bob"))


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def scene(here: Site) -> None:
        made = [here.house.add_file(["x"]).id for _ in range(5)]
        _, page = await here.ask("GET", "/v1/files?limit=2&order=asc")
        assert [file["id"] for file in page["data"]] == made[:2] == [page["first_id"], page["last_id"]]
        assert page["has_more"]
        _, page = await here.ask("GET", f"/v1/files?limit=10&order=asc&after={made[1]}")
        assert [file["id"] for file in page["data"]] == made[2:] and not page["has_more"]
        _, page = await here.ask("GET", f"/v1/files?after={made[3]}")
        assert [file["id"] for file in page["data"]] == made[2::-1], "the latest first"
        assert (await here.ask("GET", "/v1/files?purpose=batch_output"))[1]["data"] == []
        for query in ("limit=0", "limit=x", "order=up", "after=..", "page=2", "limit=1&limit=2", "limit", "%ff=1", "&" * 1000):
            assert (await here.ask("GET", f"/v1/files?{query}"))[0] == 400, query
        assert (await here.ask("GET", "/v1/batches?limit=101"))[0] == 400
        batches = [here.house.add_batch([line("a")]).id for _ in range(3)]
        _, page = await here.ask("GET", "/v1/batches?limit=2")
        assert [batch["id"] for batch in page["data"]] == batches[:0:-1] and page["has_more"]
        _, page = await here.ask("GET", f"/v1/batches?limit=2&after={page['last_id']}")
        assert [batch["id"] for batch in page["data"]] == batches[:1] and not page["has_more"]

    over(tmp_path, scene)


def test_a_batch_says_what_is_wrong_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_OPEN_BATCHES", 2)

    async def scene(here: Site) -> None:
        file = here.house.add_file([line("a")]).id
        good = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}

        async def create(**changes: Any) -> tuple[int, Any]:
            return await here.ask("POST", "/v1/batches", json.dumps({**good, **changes}).encode(), JSON)

        for changes, param in (
            ({"input_file_id": new_id(FILE, 1.0)}, "input_file_id"), ({"input_file_id": "../x"}, "input_file_id"),
            ({"input_file_id": 3}, "input_file_id"), ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"), ({"priority": 1}, "priority"), ({"metadata": {"a": 3}}, "metadata.a"),
            ({"metadata": {"a" * 65: "x"}}, "metadata"), ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ):  # fmt: skip
            status, code, named = error(await create(**changes))
            assert status in (400, 404) and named == param, (changes, code)
        here.house.runner.drain()  # so that they stay open
        for _ in range(2):
            assert (await create(metadata={"a": "b"}))[0] == 200
        assert error(await create())[:2] == (429, "batches_full")
        assert error(await here.ask("DELETE", f"/v1/files/{file}"))[:2] == (409, "file_in_use")

    over(tmp_path, scene)


def test_a_cancel_is_seen_at_once_and_twice_is_no_error(tmp_path: Path) -> None:
    async def scene(here: Site) -> None:
        async def wait(_prompt: str, _count: int) -> None:
            await asyncio.sleep(60)

        here.house.answers.decide = wait
        batch = here.house.add_batch([line("a")])
        for _ in range(2):
            status, told = await here.ask("POST", f"/v1/batches/{batch.id}/cancel")
            assert status == 200 and told["status"] in ("cancelling", "cancelled")
        assert (await here.house.over(batch)).status is Status.CANCELLED
        status, told = await here.ask("POST", f"/v1/batches/{batch.id}/cancel", b"{}", JSON)
        assert (status, told["status"]) == (200, "cancelled")

    over(tmp_path, scene)


def test_who_does_not_read_a_file_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SLOW_CLIENT_S", 1.5)

    async def scene(here: Site) -> None:
        file = here.house.add_file(["x" * (20 << 20)])
        gc.collect()  # what earlier tests left open
        before = len(os.listdir("/proc/self/fd"))
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", here.port))
            await loop.sock_sendall(connection, f"GET /v1/files/{file.id}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await until(lambda: len(os.listdir("/proc/self/fd")) >= before + 3)  # this end, the server's, the file
            await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)

    over(tmp_path, scene)


def test_without_a_directory_the_flag_is_named(tmp_path: Path) -> None:
    async def scene() -> None:
        house = House(tmp_path)
        inference: Any = SimpleNamespace(model=None, access=house.access, detokenizer=None)
        server = HttpServer(HttpApi(inference, lambda: "f", lambda: True, is_loopback=True), None, None)
        here = Site(house, await server.start("127.0.0.1", 0, is_shared=False))
        for method, path in (
            ("POST", "/v1/files"),
            ("GET", "/v1/files"),
            ("GET", "/v1/batches/x"),
            ("POST", "/v1/batches/x/cancel"),
        ):
            status, told = await here.ask(method, path)
            assert (status, told["error"]["code"]) == (404, "files_off")
            assert "--files-dir PATH" in told["error"]["message"]
        await server.stop()

    play(scene())
