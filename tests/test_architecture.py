"""Who may import whom (docs/architecture.md draws it). A new arrow is a decision, not an accident."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
V1, CORE, ENGINE, WORKER, CLI = "splitfire.v1", "splitfire.core", "splitfire.engine", "splitfire.worker", "splitfire.cli"

# room -> rooms it may import. The worker's serve.py is a room of its own: it joins the two ends.
ROOMS: dict[str, set[str]] = {
    V1: set(),
    CORE: {V1},
    ENGINE: {CORE, V1},
    "kvtransfer": {CORE, V1},
    WORKER: {CORE, V1, ENGINE, "kvtransfer"},
    "prefill_svc": {CORE, V1, ENGINE, "kvtransfer", WORKER},
    "decode_svc": {CORE, V1, ENGINE, "kvtransfer", WORKER},
    "splitfire.worker.serve": {CORE, V1, ENGINE, "kvtransfer", WORKER, "prefill_svc", "decode_svc"},
    "splitfire.worker.__main__": {CORE, "splitfire.worker.serve"},
    "router": {CORE, V1},
    CLI: {CORE, V1},
}
EVENT_LOOPS = {"asyncio", "uvloop", "anyio"}
HEAVY = {"torch", "triton", "transformers"}

# room or module -> top-level packages it must not import.
FORBIDDEN: dict[str, set[str]] = {
    CORE: HEAVY | EVENT_LOOPS | {"grpc", "ucxx"},
    ENGINE: EVENT_LOOPS | {"grpc", "ucxx", "tokenizers"},
    "kvtransfer": HEAVY | {"grpc"},
    "router": HEAVY | {"ucxx"},
    CLI: HEAVY | {"ucxx"},
}
# Pure files: decisions without a clock, a socket, a thread or a tensor.
PURE = {
    "splitfire.engine.blocks",
    "splitfire.engine.constraint",
    "splitfire.engine.drafting",
    "splitfire.engine.parallel.shards",
    "splitfire.engine.scheduler",
    "splitfire.engine.sequence",
    "splitfire.engine.speculation.acceptance",
    "splitfire.engine.speculation.controller",
    "splitfire.engine.speculation.costs",
    "splitfire.engine.speculation.lookup",
    "splitfire.engine.speculation.predicted",
    "splitfire.engine.speculation.suffix",
    "kvtransfer.protocol",
    "kvtransfer.frames",
    "kvtransfer.ring",
    "kvtransfer.sender",
    "kvtransfer.receiver",
    "kvtransfer.outgoing",
    "kvtransfer.incoming",
    "kvtransfer.peers",
    "kvtransfer.probe",
    "kvtransfer.tcp_wire",
    "kvtransfer.tcp_records",
    "router.placement",
    "router.views",
    "router.ways",
    "router.costs",
    "router.policies",
    "router.prefix_index",
    "router.admission",
    "router.waiting",
    "router.fairness",
    "router.bounds",
    "router.running",
    "router.drain_rate",
    "router.retries",
    "router.ejection",
    "router.roles",
    "router.access",
    "router.keys_file",
    "router.quotas",
    "router.tenants",
    "router.batches.form",
    "router.batches.records",
    "router.hello",
    "router.gbnf",
    "router.lark",
    "splitfire.cli.findings",
    "splitfire.cli.bench.arrivals",
    "splitfire.cli.bench.charts",
    "splitfire.cli.bench.flags",
    "splitfire.cli.bench.markup",
    "splitfire.cli.bench.numbers",
    "splitfire.cli.bench.page",
    "splitfire.cli.bench.plot",
    "splitfire.cli.bench.prompts",
    "splitfire.cli.bench.results",
    "splitfire.cli.bench.statistics",
    "splitfire.cli.bench.verdict",
}
NOT_PURE = HEAVY | EVENT_LOOPS | {"grpc", "time", "random", "threading", "socket"}
ONLY_HERE = {
    "ucxx": {"kvtransfer.ucx"},
    "triton": {"splitfire.engine.kernels"},
    "python_multipart": {"router.batches.form"},
    "llguidance": {"splitfire.engine.grammar", "router.format_worker"},
    "cryptography": {"splitfire.core.tls", "splitfire.cli.authority"},
    "prometheus_client": {
        "splitfire.core.metrics",
        "splitfire.core.metrics_push",
        "splitfire.core.outlets",
        "splitfire.worker.metrics",
        "router.metrics",
        "router.request_metrics",
    },
}
# Code from data (rule S1): none of these is imported anywhere.
NEVER = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing"}


def modules() -> dict[str, Path]:
    found = {}
    for top in ("splitfire", "kvtransfer", "prefill_svc", "decode_svc", "router"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(module: str) -> str | None:
    """The innermost room that holds a module; None for what is not ours (and for `splitfire` itself)."""
    holders = [room for room in ROOMS if module == room or module.startswith(room + ".")]
    return max(holders, key=len) if holders else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return found


def random_is_only_the_type(path: Path, imported: str) -> bool:
    """`from random import Random`: a source of randomness as a parameter's type is what pure code asks for."""
    return imported == "random" and "from random import Random" in path.read_text()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_drawing(module: str) -> None:
    room = room_of(module)
    if room is None:
        assert module == "splitfire"
        return
    for imported in imports_of(MODULES[module]):
        target = room_of(imported)
        assert target in (None, room) or target in ROOMS[room], (
            f"{module} imports {imported}: {room} may import {sorted(ROOMS[room])}"
        )
        top = imported.split(".")[0]
        assert top not in NEVER, f"{module} imports {top}"
        assert top not in FORBIDDEN.get(room, set()), f"{module} imports {top}, which {room} must not"
        if module in PURE:
            assert top not in NOT_PURE or random_is_only_the_type(MODULES[module], top), f"{module} is pure and imports {top}"
        if top in ONLY_HERE:
            assert any(module == place or module.startswith(place + ".") for place in ONLY_HERE[top]), f"{module} imports {top}"


def test_every_pure_module_exists() -> None:
    assert MODULES.keys() >= PURE


def test_code_and_data_are_kept_apart() -> None:
    """No eval, exec, torch.load or unsafe YAML anywhere (rule S1)."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "yaml.load", "__import__"), f"{module} calls {called}"


def test_every_queue_has_a_bound() -> None:
    """Rule R5: `asyncio.Queue()` without a size is unbounded."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Queue"):
                assert node.args or node.keywords, f"{module}: a queue without a bound"


def test_deadlines_are_asyncio_timeout() -> None:
    """`asyncio.wait_for` of Python 3.11 swallows a cancellation that comes together with the result: tasks then never end."""
    for module, path in MODULES.items():
        assert "wait_for(" not in path.read_text(), module


def test_top_level_is_what_the_owner_fixed() -> None:
    for name in (
        "pyproject.toml",
        "proto",
        "prefill_svc",
        "decode_svc",
        "router",
        "kvtransfer",
        "tests",
        "compose.yaml",
        "README.md",
    ):
        assert (ROOT / name).exists(), name
