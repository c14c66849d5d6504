"""Rounds, variants, rates: in which order a load is given, and until when."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from splitfire.cli.bench.arrivals import Planned, Shape, Window, fit, next_rate, plan_poisson, plan_trace
from splitfire.cli.bench.flags import Slo, refuse
from splitfire.cli.bench.numbers import sent
from splitfire.cli.bench.prompts import Prompts
from splitfire.cli.bench.run import Run
from splitfire.cli.bench.statistics import Cell, rows_of
from splitfire.cli.bench.targets import Subject, Variants
from splitfire.core.errors import ConfigError
from splitfire.core.workload_trace import Trace
from splitfire.v1 import inference_pb2 as pb

MAX_PROMPT_TOKENS = 100_000_000  # of one run; they are made before it begins


@dataclass(frozen=True, slots=True)
class Load:
    """What every variant gets. No rates: they are doubled until goodput falls."""

    rates: tuple[float, ...]
    rounds: int
    window: Window
    shape: Shape
    shared_prefix: int
    trace: Trace | None
    slo: Slo
    seed: int
    timeout_s: float
    salt: str = field(default_factory=lambda: secrets.token_hex(8))

    def planned(self, rate: float, turn: int) -> list[Planned]:
        if self.trace is not None:
            return plan_trace(self.trace, rate, self.window)
        return plan_poisson(self.seed, rate, turn, self.window, self.shape)


@dataclass(slots=True)
class Sweep:
    """What was measured so far; Ctrl-C leaves it as it is. `say` hears what a person who waits wants to know, `cells` grows."""

    load: Load
    variants: Variants
    say: Callable[[str], None]
    measured: Callable[[Cell], None]  # hears of each cell when it is there
    notes: list[str]  # what a reader of the results should know; others add to it too
    cells: list[Cell] = field(default_factory=list)
    models: dict[str, str] = field(default_factory=dict)  # by variant
    workers: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False

    def __call__(self) -> None:
        """Round after round, each time in the other order, so that neither always has the machine first."""
        try:
            for turn in range(self.load.rounds):
                names = list(self.variants)
                for name in names if turn % 2 == 0 else reversed(names):
                    self._turn(name, turn)
                    if self.is_cut:
                        return
        except KeyboardInterrupt:
            self.is_cut = True

    def _turn(self, name: str, turn: int) -> None:
        self.say(f"round {turn + 1} of {self.load.rounds}: {name}")
        with self.variants[name]() as subject:
            self.models[name], self.workers[name] = subject.model.id, subject.workers
            self._check(subject.model)
            for rate in self._rates(name, turn):
                self._measure(name, subject, rate, turn)
                if self.is_cut:
                    return

    def _rates(self, name: str, turn: int) -> Iterator[float]:
        """Those asked for; of `auto` in the first round what this variant's goodput leads to, later all that any variant had."""
        if self.load.rates:
            yield from self.load.rates
        elif turn:
            yield from sorted({cell.rate for cell in self.cells})
        else:
            while (rate := next_rate(self._goodputs(name))) is not None:
                yield rate

    def _goodputs(self, name: str) -> list[tuple[float, float]]:
        """By rate, in the order in which they were measured."""
        mine = [cell for cell in self.cells if cell.variant == name]
        return [(row.rate, row.goodput) for cell in mine for row in rows_of([cell], self.load.slo)]

    def _measure(self, name: str, subject: Subject, rate: float, turn: int) -> None:
        context = subject.model.context_length
        planned, num_cut = fit(self.load.planned(rate, turn), context)
        self.say(f"{name}: {sent(rate)} for {self.load.window.end_s:g} s")
        if num_cut:
            self._note(
                f"{name} at {rate:g}: {num_cut} of {len(planned)} requests were cut to the model's context of {context} tokens"
            )
        requests = self._messages(planned, subject.model.vocab_size, f"{rate} {turn}")
        result = asyncio.run(Run(subject.target, requests, self.load.window, self.load.timeout_s, subject.watch)())
        self.is_cut = result.is_cut
        if result.duration_s > 0 and (result.outcomes or result.num_unfinished):
            cell = Cell(
                name, rate, turn, result.begin_s, result.duration_s, result.outcomes, result.client, result.num_unfinished,
                result.is_cut,
            )  # fmt: skip
            self.cells.append(cell)
            self.measured(cell)

    def _messages(self, planned: Sequence[Planned], vocab_size: int, cell: str) -> list[tuple[Planned, bytes]]:
        """Every request as it goes out, so that nothing of this is done while the clock runs."""
        if (total := sum(request.num_prompt for request in planned)) > MAX_PROMPT_TOKENS:
            raise ConfigError(
                f"--rates, --duration, --prompt-tokens: {total} tokens of prompts in one run, at most {MAX_PROMPT_TOKENS} are kept; "
                "give less of one of them"
            )
        prompts = Prompts(vocab_size, self.load.salt, cell, self.load.shared_prefix)
        return [
            (request, message(prompts.ids(number, request), request.num_output, number).SerializeToString())
            for number, request in enumerate(planned)
        ]

    def _check(self, model: pb.Model) -> None:
        """A trace is cut to what the model can take; what flags ask for is not."""
        longest = self.load.shape.prompt.most + self.load.shape.output.most
        if self.load.trace is None and longest > model.context_length:
            asked = f"{self.load.shape.prompt} and {self.load.shape.output}"
            raise refuse(
                "--prompt-tokens and --output-tokens", asked, f"at most {model.context_length} together, the context of {model.id}"
            )

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def message(prompt: Sequence[int], num_output: int, seed: int) -> pb.GenerateRequest:
    """Exactly so many tokens, sampled: a greedy answer to random tokens soon repeats itself, and drafts are right as they never are else."""
    return pb.GenerateRequest(
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(temperature=1.0, seed=seed),
        stopping=pb.StoppingParams(max_tokens=num_output, ignore_eos=True),
    )
