"""Jobs whose output must match a grammar wait here until it is built. io thread; building has a thread of its own.

Building takes milliseconds, without the interpreter's lock, and is bounded by the same fuel as in the router's process that
tried it. Every job gets a grammar of its own: those of the library share what they learn, and its bounds with it, so one
request could use up another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import structlog

from splitfire.core import limits
from splitfire.core.errors import Internal, SplitfireError, Unsupported
from splitfire.core.ranges import require
from splitfire.core.response_format import OutputGrammar
from splitfire.core.wire import trace_id_of
from splitfire.engine.constraint import Grammar
from splitfire.engine.grammar import GrammarCompiler
from splitfire.engine.sequence import SequenceSpec
from splitfire.v1 import fleet_pb2, inference_pb2
from splitfire.worker.job import Job, JobTable, Replies
from splitfire.worker.stacks import with_large_stack

log = structlog.get_logger("worker")
Submit = Callable[[Job], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    job: Job
    submit: Submit


@dataclass(frozen=True, slots=True)
class _Built:
    grammar: Grammar
    is_over: bool  # the output is complete already


class GrammarDesk:
    """A job leaves with its grammar, refused, or cancelled. `compiler` is None when the model's tokenizer cannot be used."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._waiting: JobTable[_Waiting] = JobTable()  # bounded by the jobs a worker takes
        self._thread = ThreadPoolExecutor(1, "grammar")
        with_large_stack(lambda: self._thread.submit(int))

    @property
    def num_jobs(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def build(self, job: Job, grammar: OutputGrammar, submit: Submit) -> None:
        """Calls `submit` with the job and its grammar, later; or refuses the job."""
        if self._compiler is None:
            raise Unsupported("response_format", "this model's output cannot be constrained")
        most = limits.MAX_GRAMMAR_CHARS
        require(1 <= len(grammar.text) <= most, "grammar.text", f"{len(grammar.text)} characters long", f"1 to {most}")
        waiting = _Waiting(job, submit)
        self._waiting.add(waiting)
        building = asyncio.get_running_loop().run_in_executor(self._thread, _build, self._compiler, grammar, job.spec)
        building.add_done_callback(partial(self._on_built, waiting))

    def cancel(self, replies: Replies, attempt: int | None) -> None:
        """Ends one attempt of a router, or (None) all of them. No reply is owed."""
        for waiting in self._waiting.of(replies, attempt):
            self._waiting.remove(waiting)

    def _on_built(self, waiting: _Waiting, building: asyncio.Future[_Built]) -> None:
        job = waiting.job
        error = None if building.cancelled() else building.exception()
        if building.cancelled() or job.spec.seq_id not in self._waiting:
            return
        self._waiting.remove(waiting)
        if isinstance(error, SplitfireError):
            job.refuse(error)
        elif error is not None:
            log.error(
                "grammar failed",
                request_id=job.request_id,
                trace_id=trace_id_of(job.traceparent),
                error=type(error).__name__,
                detail=str(error),
            )
            job.refuse(Internal(f"the grammar failed: {type(error).__name__}"))
        elif building.result().is_over:
            job.replies.finished(fleet_pb2.Finished(attempt=job.attempt, reason=inference_pb2.FINISH_REASON_STOP))
        else:
            waiting.submit(replace(job, spec=replace(job.spec, grammar=building.result().grammar)))


def _build(compiler: GrammarCompiler, grammar: OutputGrammar, spec: SequenceSpec) -> _Built:
    """On the thread. An answer may be complete when its worker died before it could say so."""
    built = compiler.compile(grammar)
    if not spec.output:
        return _Built(built, is_over=False)
    built = built.after(spec.output)
    return _Built(built, built.start(spec.output, spec.stopping.stop_token_ids).is_over)
