"""Whose a call is, what that lets it do, and what it may use: keys, the table of methods, quotas, salts."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import date, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.access import NEEDS, Access, Need
from router.choice import Choice, RequestPlan
from router.doors import Doors
from router.keys_file import read_keys
from router.quotas import Quotas
from router.tenants import DEFAULT, KeyRing, Tenant, cache_salt
from router.text_worker import TextEngine
from splitfire.core.errors import ConfigError, Exhausted, Forbidden, Unauthenticated
from splitfire.core.flags import parse_settings
from splitfire.core.hashing import hash_blocks
from splitfire.core.model_dir import ModelDir
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.settings import RouterSettings
from splitfire.v1 import fleet_pb2
from splitfire.v1 import inference_pb2 as pb
from splitfire.worker.job import JobLimits, make_job
from tests.checkpoints import PICO
from tests.rig import _Replies
from tests.router.fakes import LAYOUT, fingerprint
from tests.router.test_flow import PROMPT, Desk, dispatched, play

TODAY = date(2026, 11, 22)
TOKEN = b"t" * 32
ALICE, BOB, OPS, OLD = (f"sf-{name}" + "x" * 40 for name in ("alice", "bob", "ops", "old"))


def hash_of(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def table(name: str, key: str, *lines: str) -> str:
    return "\n".join((f"[tenant.{name}]", f'keys = ["{hash_of(key)}"]', *lines, ""))


FILE = "".join(
    (
        table("alice", ALICE, 'class = "interactive"'),
        table("bob", BOB, 'class = "batch"', "weight = 0.5", "max_running = 4", "max_queued = 2", "tokens_per_minute = 600"),
        table("ops", OPS, "admin = true", f"expires = {TODAY}"),
        table("old", OLD, f"expires = {TODAY - timedelta(days=1)}"),
    )
)
RING = KeyRing(read_keys(FILE.encode(), TOKEN))


def access(ring: KeyRing | None = RING, *, is_loopback: bool = True) -> Access:
    return Access(ring, TOKEN, lambda: TODAY, is_loopback=is_loopback)


def bearer(key: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {key}")]


# -- the keys file


def test_what_a_table_says_is_what_its_tenant_gets() -> None:
    bob = RING.find(BOB, TODAY)
    assert (bob.name, bob.priority, bob.weight, bob.max_running, bob.max_queued, bob.tokens_per_minute) == (
        "bob",
        1,
        0.5,
        4,
        2,
        600,
    )
    assert not bob.is_admin
    assert not bob.allow_special
    assert RING.find(ALICE, TODAY).priority == pb.PRIORITY_INTERACTIVE
    assert RING.find(OPS, TODAY).priority == pb.PRIORITY_STANDARD
    assert RING.find(OPS, TODAY).is_admin
    assert BOB not in repr(RING.find(BOB, TODAY)) and bob.cache_salt.hex() not in repr(bob)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "accepted: 1 to 10000 tables"),
        ("tenant = 3", "accepted: 1 to 10000 tables"),
        (table("a", ALICE).replace("tenant.", "tenants."), "tenants: is unknown, did you mean tenant?"),
        (table("a", ALICE, "weigth = 1"), "tenant.a.weigth: is unknown, did you mean weight?"),
        (table("a", ALICE, "weight = 0"), "tenant.a.weight: is '0'"),
        (table("a", ALICE, "weight = nan"), "tenant.a.weight: is 'nan'"),
        (table("a", ALICE, "weight = true"), "tenant.a.weight: is 'True'"),
        (table("a", ALICE, "max_running = 0"), "tenant.a.max_running: is '0'"),
        (table("a", ALICE, "max_running = 1.0"), "tenant.a.max_running: is '1.0'"),
        (table("a", ALICE, "max_running = 4097"), "less than or equal to 4096"),
        (table("a", ALICE, "max_queued = 3"), "give both"),
        (table("a", ALICE, "tokens_per_minute = 0"), "tenant.a.tokens_per_minute"),
        (table("a", ALICE, 'class = "system"'), "'batch', 'standard' or 'interactive'"),
        (table("a", ALICE, 'admin = "yes"'), "tenant.a.admin: is 'yes'"),
        (table("a", ALICE, 'expires = "soon"'), "tenant.a.expires: is 'soon'"),
        (table("a", ALICE, "expires = 2027-01-01T10:00:00"), "tenant.a.expires"),
        (table("a", ALICE, "expires = 5"), "tenant.a.expires: is '5'"),
        ("[tenant.a]\n", "tenant.a.keys: is missing"),
        ("[tenant.a]\nkeys = []", "tenant.a.keys"),
        (table("a", ALICE) + table("b", ALICE), "tenant.b.keys: one of them is tenant.a's already"),
        (table("a", ALICE) + table("a", BOB), "is not TOML"),
        (table("default", ALICE), "neither default nor operator"),
        (table("'a b'", ALICE), "tenant.a b: accepted"),
        (table("a" * 65, ALICE), "accepted: 1 to 64"),
        ("a = " + "[" * 9000, "is not TOML"),
    ],
)
def test_a_wrong_keys_file_is_one_line_that_names_what_is_wrong(content: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys(content.encode(), TOKEN)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [f'[tenant.a]\nkeys = ["{ALICE}"]', f'[tenant.a]\nkeys = "{ALICE}"', f'[tenant]\na = "{ALICE}"']
)
def test_a_key_written_where_its_hash_belongs_is_not_shown(content: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_keys(content.encode(), TOKEN)
    assert ALICE[:12] not in str(caught.value)


def test_a_bad_file_keeps_the_keys_that_were_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", ALICE))
    path.chmod(0o644)
    settings = parse_settings(RouterSettings, [f"--keys-file={path}"], prog="router")
    with pytest.raises(ConfigError, match="others can read it"):
        Doors(settings)
    path.chmod(0o600)
    doors = Doors(settings)
    path.write_text(table("bob", BOB) + "[[")
    doors.reload()
    assert "is not TOML" in capsys.readouterr().out
    assert doors.access.tenant(bearer(ALICE)).name == "alice"
    path.write_text(table("bob", BOB))
    doors.reload()
    assert doors.access.tenant(bearer(BOB)).name == "bob"
    with pytest.raises(Unauthenticated):
        doors.access.tenant(bearer(ALICE))


# -- whose a call is


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", ALICE)],
        [("authorization", f"Basic {ALICE}")],
        bearer(ALICE[:-1] + "y"),
        bearer(ALICE + "x"),
        bearer(ALICE[:-1]),
        bearer(ALICE.upper()),
        bearer("x" * 100_000),
        bearer(OLD),
        bearer(hash_of(ALICE)),
        [*bearer(ALICE), *bearer(ALICE)],
        [*bearer(ALICE), *bearer(BOB)],
        [("Authorization-bin", ALICE.encode()), ("x-api-key", ALICE), ("tenant_id", "alice")],
    ],
)
def test_a_credential_that_is_not_exactly_right_opens_nothing(metadata: list[tuple[str, str | bytes]]) -> None:
    """B39, B40."""
    for method, need in NEEDS.items():
        if need is not Need.NOTHING:
            with pytest.raises(Unauthenticated):
                access().check(method, metadata)


def test_who_a_client_says_it_is_counts_for_nothing() -> None:
    """B35."""
    claims: list[tuple[str, str | bytes]] = [("tenant_id", "alice"), ("cache_salt", "00"), ("x-priority", "system")]
    assert access().tenant([*claims, *bearer(BOB)]) == RING.find(BOB, TODAY)
    assert access(None).tenant(claims) == Tenant("default", pb.PRIORITY_INTERACTIVE, is_admin=True)


@pytest.mark.parametrize(
    ("who", "may"),
    [
        (access(), {ALICE: {Need.KEY}, BOB: {Need.KEY}, OPS: {Need.KEY, Need.VIEW, Need.ADMIN}}),
        (access(None), {"": {Need.KEY, Need.VIEW, Need.ADMIN}, ALICE: {Need.KEY, Need.VIEW, Need.ADMIN}}),
        (access(None, is_loopback=False), {"": {Need.KEY, Need.VIEW}}),
        (access(None, is_loopback=False), {TOKEN.decode(): {Need.KEY, Need.VIEW, Need.ADMIN}}),
        (access(is_loopback=False), {TOKEN.decode(): {Need.KEY, Need.VIEW, Need.ADMIN}}),
    ],
)
def test_each_credential_opens_what_it_is_for(who: Access, may: dict[str, set[Need]]) -> None:
    """B50; a method that nobody has thought about is for administrators."""
    methods = {**NEEDS, "/splitfire.v1.Admin/ChangeRole": Need.ADMIN, "/some.Debug/Dump": Need.ADMIN}
    for key, needs in may.items():
        for method, need in methods.items():
            metadata = bearer(key) if key else []
            if need in needs or need is Need.NOTHING:
                who.check(method, metadata)
            else:
                with pytest.raises(Forbidden):
                    who.check(method, metadata)


def test_a_key_is_good_to_the_end_of_its_last_day() -> None:
    assert RING.find(OPS, TODAY).name == "ops"
    with pytest.raises(Unauthenticated, match="expired on 2026-11-22"):
        RING.find(OPS, TODAY + timedelta(days=1))


# -- what it may use


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def ask(quotas: Quotas, tenant: Tenant, num_tokens: int) -> Exhausted | None:
    """One request from begin to end."""
    try:
        with quotas.opened(tenant):
            quotas.spend(tenant, num_tokens)
    except Exhausted as exc:
        return exc
    return None


@given(
    st.integers(1, 100_000),
    st.integers(1, 5),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 5_000)), min_size=1, max_size=60),
)
def test_no_tenant_gets_more_than_its_tokens_and_a_refusal_says_when(
    per_minute: int, num_routers: int, asked: list[tuple[float, int]]
) -> None:
    """What was let in before the last request fits the bucket and what has flowed into it; who comes back when told is let in."""
    clock = Clock()
    quotas, tenant = Quotas(clock, lambda: num_routers), Tenant("t", tokens_per_minute=per_minute)
    spent, began, part = 0, clock.now, per_minute / num_routers
    for after_s, num_tokens in asked:
        clock.now += after_s
        refused = ask(quotas, tenant, num_tokens)
        if refused is not None:
            assert (refused.reason, refused.is_retryable) == ("tenant_quota", True)
            assert refused.retry_after_s is not None
            clock.now += refused.retry_after_s
            assert ask(quotas, tenant, num_tokens) is None
        assert spent <= part * (1 + (clock.now - began) / 60) + 1e-3
        spent += num_tokens


def test_a_tenant_without_a_bound_has_none() -> None:
    quotas = Quotas(Clock(), lambda: 1)
    assert [ask(quotas, DEFAULT, 10**9) for _ in range(3)] == [None] * 3


def test_open_requests_are_bounded_and_come_back() -> None:
    quotas, bob = Quotas(Clock(), lambda: 2), Tenant("bob", max_running=4, max_queued=2)
    assert (quotas.part(4), quotas.part(1), quotas.part(0), quotas.part(None)) == (2, 1, 0, None)
    held = [quotas.opened(bob) for _ in range(3)]
    for each in held:
        each.__enter__()
    with pytest.raises(Exhausted, match="3 requests of this tenant are open, limit 3: 2 that run and 1 that wait"):
        quotas.opened(bob).__enter__()
    assert ask(quotas, Tenant("alice", max_running=1, max_queued=0), 1) is None, "another tenant's business"
    held[0].__exit__(None, None, None)
    assert ask(quotas, bob, 1) is None
    with pytest.raises(KeyError), quotas.opened(bob):
        raise KeyError
    assert ask(quotas, bob, 1) is None


# -- what it shares


def submitted(salt: bytes) -> fleet_pb2.Submit:
    """What a worker gets of a tenant's request."""

    async def scene() -> None:
        desk, now = Desk(prefills=0), time.monotonic()
        plan = RequestPlan("r", PROMPT, SamplingParams(), StopParams(4), 2, "", "", now, now + 30.0, cache_salt=salt)
        task = asyncio.create_task(desk.flow.run(Choice(plan, 0, asyncio.Event())))
        _, submit = await dispatched(*desk.decodes)
        submits.append(submit)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    submits: list[fleet_pb2.Submit] = []
    play(scene())
    return submits[0]


def test_two_tenants_never_share_a_cached_block() -> None:
    """B52, P22: the same prompt has other names for each, to the router's index and to the worker's cache alike."""
    salts = [RING.find(ALICE, TODAY).cache_salt, RING.find(BOB, TODAY).cache_salt, b""]
    mine = fingerprint()
    limits = JobLimits(4096, 400, 40, LAYOUT, mine, "ucx")
    seen: set[bytes] = set()
    for salt in salts:
        submit = submitted(salt)
        job = make_job(submit, _Replies({}), limits, 0.0)
        as_worker = hash_blocks(job.spec.hash_root, PROMPT, mine.block_size)
        assert job.spec.block_hashes == as_worker, "router and worker agree"
        assert len(as_worker) == 2
        assert not seen & set(as_worker)
        seen |= set(as_worker)


def test_a_salt_is_the_same_on_every_router_and_another_in_every_fleet() -> None:
    again = KeyRing(read_keys(FILE.encode(), TOKEN))
    assert again.find(BOB, TODAY).cache_salt == RING.find(BOB, TODAY).cache_salt == cache_salt(TOKEN, "bob")
    assert cache_salt(b"another", "bob") != cache_salt(TOKEN, "bob")
    assert len(RING.find(BOB, TODAY).cache_salt) == 32


def test_special_tokens_count_only_where_they_were_asked_for() -> None:
    """B09."""
    engine = TextEngine(ModelDir(PICO))
    plain, special, again = (engine.encode("a<|endoftext|>b", allow_special=allowed) for allowed in (False, True, False))
    assert plain == again
    assert len(special) < len(plain)
