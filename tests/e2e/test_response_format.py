"""Structured output end to end: asked for over gRPC or by the command line, kept to by prefill and decode, resumed, refused."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import grpc
import pytest

from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import PROMPT, RunningFleet, generated_at, refusal_of, start_fleet, until
from tests.e2e.test_bad_requests import refused
from tests.e2e.test_cli import splitfire
from tests.grammars import ARITHMETIC, PERSON, SMALL, is_person

STOP = pb.FINISH_REASON_STOP
FAR = "[a-z]{3}([0-9]{2}[a-z]{3}){60}"  # an answer that is not over soon
FARTHER = "[a-z]{3}([0-9]{2}[a-z]{3}){250}"


def asking(
    seed: int = 1, max_tokens: int = 400, *, more: dict[str, str] | None = None, **response_format: str
) -> pb.GenerateRequest:
    [(name, source)] = (more or response_format).items()
    kind = pb.ResponseFormat.Type.Value(f"TYPE_{name.upper()}")
    return pb.GenerateRequest(
        prompt_token_ids=PROMPT,
        sampling=pb.SamplingParams(seed=seed),
        stopping=pb.StoppingParams(max_tokens=max_tokens),
        response_format=pb.ResponseFormat(type=kind, **{name: source} if source else {}),
    )


def test_every_kind_of_format_is_kept_to(pico: RunningFleet) -> None:
    request = asking(json_schema=json.dumps(PERSON))
    request.n = 3
    answers = pico.generate(request)
    assert all(is_person(answer.text) and answer.finish_reason == STOP for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) == 3
    date = pico.generate(asking(regex=r"(19|20)\d\d-(0[1-9]|1[0-2])"))[0]
    assert re.fullmatch(r"(19|20)\d\d-(0[1-9]|1[0-2])", date.text)
    assert date.summary.kv_transfer.bytes > 0, "the first token came from elsewhere"
    total = pico.generate(asking(4, 40, grammar=ARITHMETIC))[0]
    assert re.fullmatch(r"[0-9+()-]+", total.text)
    anything = pico.generate(asking(2, 60, json_object=""))[0]
    assert re.match(r"\s*\{", anything.text)
    assert anything.finish_reason != STOP or isinstance(json.loads(anything.text), dict)


def test_ignoring_the_end_the_answer_ends_with_its_grammar(pico: RunningFleet) -> None:
    request = asking(regex="yes|no")
    request.stopping.ignore_eos = True
    answer = pico.generate(request)[0]
    assert answer.text in ("yes", "no")
    assert answer.finish_reason == STOP


def test_the_same_request_gives_the_same_answer_beside_any_other(pico: RunningFleet) -> None:
    """Metamorphic: alone, and while others with and without formats run; plain requests do not change either."""
    plain, request = pico.ids(count=40), asking(7, json_schema=json.dumps(SMALL))
    alone = pico.generate(request)[0].ids
    crowd = [pico.stub.Generate(asking(seed, regex=FAR), timeout=60) for seed in range(3)]
    for call in crowd:
        next(call)
    assert pico.generate(request)[0].ids == alone
    assert pico.ids(count=40) == plain
    for call in crowd:
        call.cancel()


@pytest.mark.parametrize(
    ("response_format", "field", "says"),
    [
        ({"regex": "(a"}, "response_format.regex", "unclosed group"),
        ({"regex": "(" * 20_000 + "a" + ")" * 20_000}, "response_format.regex", ""),
        ({"regex": "a" * 3_000_000}, "response_format.regex", "accepted: 1 to 65536"),
        ({"grammar": "root ::= root"}, "response_format.grammar", "no text but the empty one"),
        ({"grammar": 'root ::= "a'}, "response_format.grammar", "line 1, column 12"),
        ({"json_schema": '{"a":' * 5000 + "1" + "}" * 5000}, "response_format.json_schema", "deeper than 100"),
        ({"json_schema": '{"$ref": "#"}'}, "response_format.json_schema", "no text but the empty one"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "response_format.json_schema", "uniqueItems"),
    ],
)
def test_bad_formats_are_refused_in_time_beside_a_running_request(
    pico: RunningFleet, response_format: dict[str, str], field: str, says: str
) -> None:
    """B28 on the wire."""
    mate = pico.stub.Generate(asking(max_tokens=1500, regex=FARTHER), timeout=60)
    next(mate)
    began = time.monotonic()
    refusal = refused(pico, asking(more=response_format))
    assert time.monotonic() - began < 5
    assert (refusal.code, refusal.field, refusal.is_retryable) == (grpc.StatusCode.INVALID_ARGUMENT, field, False)
    assert says in refusal.message
    assert next(mate).token_ids
    mate.cancel()


def test_what_blows_up_other_engines_is_answered(pico: RunningFleet) -> None:
    """B28: `(a+)+$` and its like have no bad input here; a grammar too ambiguous to follow ends its own request."""
    answer = pico.generate(asking(max_tokens=30, regex="(a+)+$"))[0]
    assert set(answer.text) == {"a"}
    try:
        text = pico.generate(asking(max_tokens=120, grammar='root ::= root root | "a" | "b" | ""'))[0].text
        assert set(text) <= {"a", "b"}
    except grpc.RpcError as exc:
        refusal = refusal_of(exc)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "constraint_too_complex")
    assert pico.ids(count=3)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_cancelled_request_leaves_nothing(pico: RunningFleet, tokens: int) -> None:
    call = pico.stub.Generate(asking(regex=FAR + "{2}"))
    ids: list[int] = []
    while len(ids) < tokens:
        ids += next(call).token_ids
    call.cancel()
    until(lambda: pico.is_quiet, 3)


def test_a_deadline_ends_it(pico: RunningFleet) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(pico.stub.Generate(asking(max_tokens=1500, regex="(" + FAR + "){9}"), timeout=0.4))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_killed_decode_worker_is_resumed_within_its_grammar() -> None:
    """P9: state is a function of the ids, so the answer is the one it would have been."""
    with start_fleet("pico", 1, 2, worker=("--dtype=fp32", "--speculate=off")) as fleet:
        request = asking(3, max_tokens=1500, regex=FARTHER)
        request.session_id = "one decode worker"
        whole = fleet.generate(request)[0]
        assert re.fullmatch(FARTHER, whole.text)
        [decode] = generated_at(whole.summary)
        call = fleet.stub.Generate(request, timeout=60)
        ids: list[int] = []
        killed = False
        for response in call:
            ids += response.token_ids
            if len(ids) > 12 and not killed:
                killed = True
                fleet.process(decode).kill()
            if response.HasField("summary"):
                [other] = {phase.worker for phase in response.summary.phases if phase.name == "forward"}
                assert other != decode
        assert killed
        assert ids == whole.ids


def test_the_command_line_asks_for_formats(pico: RunningFleet, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SMALL))
    (tmp_path / "sum.gbnf").write_text(ARITHMETIC)
    common = ("generate", "x = ", "--server", pico.address, "--seed=3")
    ran = splitfire(*common, f"--json-schema={tmp_path / 'schema.json'}", "--max-tokens=300")
    assert json.loads(ran.stdout).keys() == {"n", "word"}, ran.stderr
    assert re.fullmatch(r"\d{3}\n", splitfire(*common, "--regex=[0-9]{3}").stdout)
    assert re.fullmatch(r"[0-9+()-]+\n", splitfire(*common, f"--grammar={tmp_path / 'sum.gbnf'}", "--max-tokens=20").stdout)
    both = splitfire(*common, "--regex=a", f"--grammar={tmp_path / 'sum.gbnf'}")
    assert both.returncode == 2 and "give one of them" in both.stderr
    bad = splitfire(*common, "--regex=(")
    assert bad.returncode == 1 and "response_format.regex" in bad.stderr
    assert splitfire(*common, "--grammar=/nowhere").returncode == 2
