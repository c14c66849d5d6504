"""Which fault is tried where: printed from the tests themselves, whose docstrings name the rows. `make docs` writes docs/faults.md."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LAYERS = (
    ("faults/sim", "SIM"),
    ("faults/proc", "PROC"),
    ("faults/", "SIM"),
    ("model/", "SIM"),
    ("e2e/", "PROC"),
    ("compose/", "DOC"),
    ("", "UNIT"),
)
FAULTS = {
    "F01": "prefill worker killed before it begins",
    "F02": "prefill worker killed while it computes",
    "F03": "prefill worker killed in mid transfer",
    "F04": "prefill worker killed between its last block and the commit",
    "F05": "prefill worker killed after the commit",
    "F06": "decode worker killed while a request waits for it",
    "F07": "decode worker killed while it receives",
    "F08": "decode worker killed in mid stream",
    "F09": "decode worker killed between the last token and the end",
    "F10": "the only decode worker killed",
    "F11": "all prefill workers killed",
    "F12": "router killed",
    "F13": "one of two routers killed",
    "F14": "prefill worker frozen, and back",
    "F15": "decode worker frozen, and back",
    "F16": "SIGTERM, idle and busy, once and twice",
    "F17": "SIGTERM to a prefill worker that holds prompts",
    "F18": "every worker restarted in turn under load",
    "F19": "worker restarted under its old name",
    "F20": "worker that dies again and again",
    "F21": "request that kills whoever computes it",
    "F22": "exception in one request's part of a step",
    "F23": "engine thread dead or hung",
    "F24": "event loop blocked for 3 s",
    "F25": "KV pool exhausted",
    "F26": "two requests that do not fit together",
    "F27": "request larger than the pool",
    "F28": "container out of memory",
    "F29": "disk full",
    "F30": "router out of file descriptors",
    "F31": "prefill and decode cannot reach each other",
    "F32": "router and prefill cannot reach each other",
    "F33": "router and decode cannot reach each other",
    "F34": "acknowledgements lost one way",
    "F35": "packets lost, late, twice, out of order",
    "F36": "slow KV link",
    "F37": "bits flipped in KV",
    "F38": "blocks swapped, or from before",
    "F39": "transfer message repeated",
    "F40": "message cut short",
    "F41": "commit before its data",
    "F42": "abort, and blocks lent again at once",
    "F43": "hold that ends around the last send",
    "F44": "step longer than every deadline of control",
    "F45": "clock that jumps",
    "F46": "client cancels, at any stage",
    "F47": "a thousand cancels at once",
    "F48": "streams opened and reset as fast as possible",
    "F49": "client that reads slowly",
    "F50": "client that stops reading",
    "F51": "client that vanishes without a word",
    "F52": "deadline that passes, at any stage",
    "F53": "overload",
    "F54": "end of an overload",
    "F55": "all clients try again at once",
    "F56": "flood of one tenant",
    "F57": "flood of a low class",
    "F58": "flood of one tenant's prefixes",
    "F59": "prefix index that is out of date",
    "F60": "cache events lost, repeated, out of order",
    "F61": "a million different prefixes",
    "F62": "worker that lies about its load",
    "F63": "everybody has the same prefix",
    "F64": "request id used twice",
    "F65": "worker of another version",
    "F66": "worker with another model, block size or KV dtype",
    "F67": "worker with other weights",
    "F68": "trace collector down",
    "F69": "trace exporter that hangs at the end",
    "F70": "name resolution that fails",
    "F71": "certificate expired, changed, or of another CA",
    "F72": "port in use",
    "F73": "any order of starting",
    "F74": "worker that cannot load",
    "F75": "logits that are not finite",
    "F76": "GPU error",
    "F77": "every 16th operation of the transport fails",
    "F78": "request after a long silence",
    "F79": "task cancelled in mid exchange",
    "F80": "preempted, and resumed elsewhere",
    "F81": "transfer aborted twice",
    "F82": "completion after the end",
    "F83": "completions in any order after an abort",
    "F84": "nothing to transfer",
    "F85": "hours of everything",
}
NOT_YET = {
    "F35": "needs netem: with the compose file; lost and late messages are in the simulator",
    "F76": "needs a GPU",
    "F85": "nightly, with the compose file",
}


def names_by_row() -> Mapping[str, Sequence[str]]:
    """For each row the tests whose docstrings name it, as `path::name`."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for function in _tests_of(ast.parse(path.read_text())):
            for row in sorted(set(re.findall(r"\bF\d\d\b", _unfolded(ast.get_docstring(function) or "")))):
                found[row].append(f"{path.relative_to(TESTS)}::{function.name}")
    return found


def _tests_of(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def _unfolded(text: str) -> str:
    """`F01-F03` and `F01 to F03` as the rows they mean."""

    def rows(match: re.Match[str]) -> str:
        return " ".join(f"F{number:02}" for number in range(int(match[1]), int(match[2]) + 1))

    return re.sub(r"\bF(\d\d)(?:-| to )F(\d\d)\b", rows, text)


def page() -> str:
    lines = [
        "# Faults, and where each is tried",
        "",
        "Printed from the tests, whose docstrings name the rows (`tests/faults/matrix.py`); do not edit (`make docs`).",
        "",
        "SIM: one process, virtual time, the real router, services and hand-off. PROC: real processes killed, frozen and flooded; those in",
        "`faults/proc/long`, and those marked `long`, run with `make test-faults`. DOC: containers, with `make test-compose`. `make",
        "fault-report` kills and freezes workers under load and counts.",
        "",
        "| row | fault | where |",
        "|---|---|---|",
    ]
    found = names_by_row()
    for row, fault in FAULTS.items():
        where = [f"{_layer(test)} `{test}`" for test in found.get(row, ())]
        missing = f"not yet: {NOT_YET.get(row, 'nobody has tried it')}"
        lines.append(f"| {row} | {fault} | {'<br>'.join(where) or missing} |")
    return "\n".join([*lines, ""])


def _layer(test: str) -> str:
    return next(layer for start, layer in LAYERS if test.startswith(start))


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
