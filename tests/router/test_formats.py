"""B28: whatever a response format is, its request gets a grammar or an honest refusal in time, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from router.formats import FormatPool
from router.processes import ProcessPool
from splitfire.core import limits
from splitfire.core.errors import Code, InvalidInput, SplitfireError, Unsupported
from splitfire.core.model_dir import ModelDir
from splitfire.core.response_format import ANY_OBJECT, OutputGrammar, ResponseFormat
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import PICO
from tests.grammars import GRAMMAR, REGEX, SCHEMA

Scene = Callable[[FormatPool], Awaitable[None]]


def play(scene: Scene, pool: FormatPool | None = None) -> None:
    async def run() -> None:
        formats = pool or FormatPool(ModelDir(PICO))
        try:
            await scene(formats)
        finally:
            await formats.close()
        assert not [c for c in psutil.Process().children() if {"router.format_worker", "tests.router.odd_worker"} & {*c.cmdline()}]

    asyncio.run(asyncio.wait_for(run(), 60))


def odd() -> FormatPool:
    """Its processes are odd_worker's."""
    pool = FormatPool(ModelDir(PICO))
    pool._pool = ProcessPool("tests.router.odd_worker", PICO, "nothing", 2)
    return pool


async def refusal(pool: FormatPool, asked: ResponseFormat) -> SplitfireError:
    began = time.perf_counter()
    with pytest.raises(SplitfireError) as caught:
        await pool.compile(asked)
    assert time.perf_counter() - began < limits.FORMAT_TIMEOUT_S + 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return caught.value


def schema(**keys: object) -> str:
    return json.dumps(keys)


ENDLESS = schema(**{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
DEEP_REFS = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {}]} for i in range(900)} | {"d900": {}}
RING = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{(i + 1) % 900}"}} for i in range(900)}
REFUSED = [
    (REGEX, "(a", "unclosed group"),
    (REGEX, "a**{", ""),
    (REGEX, r"(a)\1", "backreferences"),
    (REGEX, "(?=a)a", "look-around"),
    (REGEX, "(" * 30_000 + "a" + ")" * 30_000, ""),
    (REGEX, "", "no text but the empty one"),
    (REGEX, "[a&&b]", "no text but the empty one"),
    (GRAMMAR, "root ::= root", "no text but the empty one"),
    (GRAMMAR, "root ::= x\nx ::= y\ny ::= x", "no text but the empty one"),
    (GRAMMAR, 'root ::= ""', "no text but the empty one"),
    (GRAMMAR, 'root ::= "a', "line 1"),
    (GRAMMAR, "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(2500)) + '\nr2500 ::= "c"\nroot ::= r0', ""),
    (SCHEMA, ENDLESS, "no text but the empty one"),
    (SCHEMA, schema(**{"$ref": "#"}), "no text but the empty one"),
    (SCHEMA, schema(**{"$ref": "http://example.com/x"}), "not present"),
    (SCHEMA, schema(type="array", uniqueItems=True), "uniqueItems"),
    (SCHEMA, schema(**{"not": {}}), "not"),
    (SCHEMA, schema(**{"not": {}, "x-guidance": {"lenient": True}}), "not"),
    (SCHEMA, schema(type="strin"), ""),
    (SCHEMA, schema(type="string", pattern="(a"), ""),
    (SCHEMA, schema(type="string", minLength=5, maxLength=4), ""),
]


def test_what_cannot_be_kept_to_is_refused_by_its_field() -> None:
    async def scene(pool: FormatPool) -> None:
        for kind, source, says in REFUSED:
            asked = ResponseFormat(kind, source)
            error = await refusal(pool, asked)
            assert error.code == Code.INVALID_ARGUMENT, source[:80]
            assert error.field == asked.field != "response_format"
            assert says in str(error), source[:80]
        assert (await pool.compile(ResponseFormat(REGEX, "still here"))).text

    play(scene)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (REGEX, "(a+)+$"),
        (REGEX, "(a|a)*b"),
        (REGEX, "((((a*)*)*)*)*b"),
        (REGEX, "(a{1,1000}){1,1000}"),
        (REGEX, "a" * limits.MAX_FORMAT_CHARS),
        (REGEX, "|".join(f"w{i}" for i in range(9000))),
        (GRAMMAR, 'root ::= root root | "a" | ""'),
        (GRAMMAR, "root ::= " + " | ".join(f'"w{i}"' for i in range(6000))),
        (SCHEMA, schema(type="object", properties={f"p{i}": {"type": "string"} for i in range(400)})),
        (SCHEMA, schema(**{"$defs": RING, "$ref": "#/$defs/d0"})),
        (SCHEMA, schema(**{"$defs": DEEP_REFS, "$ref": "#/$defs/d0"})),
    ],
)
def test_what_blows_up_elsewhere_is_answered_in_time(kind: pb.ResponseFormat.Type.ValueType, source: str) -> None:
    """Derivatives do not backtrack, so most of these are simply fine."""

    async def scene(pool: FormatPool) -> None:
        await pool.compile(ResponseFormat(pb.ResponseFormat.TYPE_JSON_OBJECT, ANY_OBJECT))  # the processes are there
        began = time.perf_counter()
        try:
            assert (await pool.compile(ResponseFormat(kind, source))).text
        except InvalidInput as exc:
            assert exc.field == ResponseFormat(kind, source).field
        assert time.perf_counter() - began < limits.FORMAT_TIMEOUT_S + 2

    play(scene)


def test_one_that_never_ends_is_killed_and_does_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FORMAT_TIMEOUT_S", 1.0)

    async def scene(pool: FormatPool) -> None:
        pids = {(await pool.compile(ResponseFormat(REGEX, str(i)))).text.split()[0] for i in range(4)}
        hanging = asyncio.create_task(pool.compile(ResponseFormat(REGEX, "hang")))
        await asyncio.sleep(0.05)
        assert (await pool.compile(ResponseFormat(REGEX, "quick"))).text.endswith("quick")
        assert not hanging.done()
        with pytest.raises(SplitfireError) as caught:
            await hanging
        assert (caught.value.reason, caught.value.code) == ("response_format_timeout", Code.INVALID_ARGUMENT)
        both = await asyncio.gather(*(pool.compile(ResponseFormat(REGEX, f"after {i}")) for i in range(2)))
        assert all(grammar.text for grammar in both)
        assert len(pids) == 2

    play(scene, odd())


@pytest.mark.parametrize("source", ["eat", "overflow"])
def test_one_that_takes_memory_or_its_process_down_is_refused(source: str) -> None:
    async def scene(pool: FormatPool) -> None:
        error = await refusal(pool, ResponseFormat(SCHEMA, source))
        assert (error.reason, error.field) == ("response_format_too_complex", "response_format.json_schema")
        assert (await pool.compile(ResponseFormat(SCHEMA, "fine"))).text

    play(scene, odd())


def test_a_caller_who_goes_away_does_not_leave_his_answer_to_the_next() -> None:
    async def scene(pool: FormatPool) -> None:
        for i in range(6):
            task = asyncio.create_task(pool.compile(ResponseFormat(REGEX, f"abandoned {i}")))
            await asyncio.sleep(0.002 * i)
            task.cancel()
            assert (await pool.compile(ResponseFormat(REGEX, f"mine {i}"))).text.endswith(f"mine {i}")

    play(scene, odd())


def test_the_same_format_is_not_tried_twice_and_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[str] = []

    async def scene(pool: FormatPool) -> None:
        ask = pool._pool.ask

        async def counted(question: dict[str, str], timeout_s: float) -> dict[str, object]:
            asked_for.append(question["source"])
            return await ask(question, timeout_s)

        monkeypatch.setattr(pool._pool, "ask", counted)
        for source in ("a", "b", "a", "a"):
            first = await pool.compile(ResponseFormat(REGEX, source))
            assert isinstance(first, OutputGrammar)
        assert (await pool.compile(ResponseFormat(GRAMMAR, "a"))).kind == GRAMMAR, "another kind is another format"
        assert asked_for == ["a", "b", "a"]
        monkeypatch.setattr(limits, "FORMAT_CACHE_BYTES", 20_000)
        for i in range(30):
            await pool.compile(ResponseFormat(REGEX, str(i) + "x" * 1000))
            assert pool._num_bytes <= 20_000
        assert 0 < len(pool._made) < 5
        asked_for.clear()
        await pool.compile(ResponseFormat(REGEX, "29" + "x" * 1000))
        await pool.compile(ResponseFormat(REGEX, "a"))
        assert asked_for == ["a"], "the newest are kept"

    play(scene, odd())


def test_refusals_are_not_kept_and_repeat() -> None:
    async def scene(pool: FormatPool) -> None:
        for _ in range(2):
            assert "says nothing" in str(await refusal(pool, ResponseFormat(GRAMMAR, "bad")))

    play(scene, odd())


def test_no_process_is_started_before_somebody_asks() -> None:
    async def scene(pool: FormatPool) -> None:
        assert not pool._pool._processes
        await asyncio.gather(*(pool.compile(ResponseFormat(REGEX, str(i))) for i in range(5)))
        assert len(pool._pool._processes) == 2

    play(scene, odd())


@pytest.mark.parametrize("turns", range(0, 60, 12))
def test_no_process_outlives_a_pool_that_is_closed_while_it_starts(turns: int) -> None:
    async def scene(pool: FormatPool) -> None:
        asking = asyncio.create_task(pool.compile(ResponseFormat(REGEX, "a")))
        for _ in range(turns):
            await asyncio.sleep(0.002)
        await pool.close()
        await asyncio.gather(asking, return_exceptions=True)

    play(scene, odd())


def test_a_model_without_an_end_is_served_without_response_formats(tmp_path: Path) -> None:
    path = Path(shutil.copytree(PICO, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((path / name).read_text())
        config.pop("eos_token_id", None)
        (path / name).write_text(json.dumps(config))

    async def scene(pool: FormatPool) -> None:
        for _ in range(2):
            with pytest.raises(Unsupported) as caught:
                await pool.compile(ResponseFormat(REGEX, "a"))
            assert caught.value.reason == "unsupported_response_format"

    play(scene, FormatPool(ModelDir(path)))
