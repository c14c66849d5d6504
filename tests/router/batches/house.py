"""Everything behind /v1/batches but the fleet: a store on a real disk, a runner, and answers that a test decides on."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import date
from pathlib import Path
from typing import Any

from router.access import Access
from router.batches.disk import Disk
from router.batches.records import BATCH, FILE, StoredBatch, StoredFile, new_id
from router.batches.runner import BatchRunner
from router.batches.store import FileStore
from router.completions import Whole
from router.inference import Call
from router.tenants import KeyRing
from splitfire.v1 import inference_pb2 as pb
from tests.faults.sims import until

TENANT = "default"


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": custom_id, **body}}


class Answers:
    """Instead of completions.py. `decide` may raise, or wait."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: dict[str, dict[str, Any]] = {}
        self.tenants: set[str] = set()
        self.num_open = self.most_open = 0
        self.decide: Callable[[str, int], Coroutine[None, None, None]] = self._at_once

    async def _at_once(self, _prompt: str, _count: int) -> None:
        await asyncio.sleep(0)

    def read(self, _path: str, given: dict[str, Any]) -> Asked:
        self.bodies[given["prompt"]] = given
        return Asked(self, given["prompt"])


class Asked:
    def __init__(self, answers: Answers, prompt: str) -> None:
        self._answers = answers
        self._prompt = prompt

    async def whole(self, call: Call) -> Whole:
        answers, prompt = self._answers, self._prompt
        answers.asked[prompt] += 1
        answers.tenants.add(call.tenant.name)
        answers.num_open += 1
        answers.most_open = max(answers.most_open, answers.num_open)
        try:
            await answers.decide(prompt, answers.asked[prompt])
        finally:
            answers.num_open -= 1
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
        call.request_id = f"r-{prompt}"
        body = json.dumps({"text": prompt, "usage": usage}).encode()
        return Whole(body, pb.Usage(prompt_tokens=2, generated_tokens=3, cached_prompt_tokens=1))


class House:
    """As server.py joins it. Several on one directory are several processes."""

    def __init__(self, root: Path, *, num_requests: int = 4, max_bytes: int = 1 << 30, keys: KeyRing | None = None) -> None:
        self.answers = Answers()
        self.store = FileStore(root, max_bytes)
        self.store.open()
        self.disk = Disk()
        self.access = Access(keys, None, date.today, is_loopback=True)
        self.runner = BatchRunner(self.store, self.disk, self.answers, self.access, num_requests)  # type: ignore[arg-type]

    def add_file(self, lines: list[Any], tenant: str = TENANT, *, expires_at: int | None = None) -> StoredFile:
        content = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines).encode()
        draft = self.store.draft(new_id(FILE, time.time()))
        draft.write(content)
        file = StoredFile(
            id=draft.directory.name, num_bytes=len(content), created_at=int(time.time()), filename="x", purpose="batch", expires_at=expires_at
        )  # fmt: skip
        self.store.add_file(tenant, draft, file)
        return file

    def add_batch(self, lines: list[Any], tenant: str = TENANT, *, seconds: float = 3600.0) -> StoredBatch:
        now, file = time.time(), self.add_file(lines, tenant)
        batch = StoredBatch(
            id=new_id(BATCH, now), tenant=tenant, endpoint="/v1/completions", input_file_id=file.id, output_file_id=new_id(FILE, now),
            error_file_id=new_id(FILE, now), created_at=int(now), expires_at=int(now + seconds),
        )  # fmt: skip
        self.store.add_batch(batch)
        return batch

    def read(self, batch: StoredBatch) -> StoredBatch:
        found = self.store.batch(batch.tenant, batch.id)
        assert found is not None
        return found

    async def over(self, batch: StoredBatch) -> StoredBatch:
        """As it is when it is over."""
        await until(lambda: self.read(batch).is_over, 10)
        return self.read(batch)

    def output(self, batch: StoredBatch) -> list[dict[str, Any]]:
        return self._rows(batch, batch.output_file_id)

    def errors(self, batch: StoredBatch) -> list[dict[str, Any]]:
        return self._rows(batch, batch.error_file_id)

    def _rows(self, batch: StoredBatch, file_id: str) -> list[dict[str, Any]]:
        file = self.store.file(batch.tenant, file_id)
        if file is None:
            return []
        with open(self.store.content(batch.tenant, file_id), "rb") as content:
            found = content.read()
        assert len(found) == file.num_bytes
        return [json.loads(row) for row in found.splitlines()]

    def unfinished_rows(self, batch: StoredBatch) -> list[str]:
        """What is written of a batch that is not over, by custom_id."""
        path = self.store.directory(batch) / "output" / "content"
        return [json.loads(row)["custom_id"] for row in path.read_text().splitlines()] if path.exists() else []


def play(scene: Coroutine[None, None, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scene

    asyncio.run(bounded())
