"""W7, speculative edits: `python -m benchmarks.speculation [--model DIR] [--quick]`. Ten minutes on two cores for a small model.

The model's own greedy answers, edited, are given as predicted outputs. Each batch is generated without speculation (the
opponent), with the controller, and with every fixed width, in turn, by one runner over one pool, without a prefix cache;
steps that compute prompts are not counted. Ceilings come from the cost table measured at start (edits.py). And what
following a text of 64k tokens costs, token by token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from benchmarks.edits import Ceiling, Edited, ceiling_of, edit
from benchmarks.report import QUICK_RESULTS, RESULTS, Row, half_spread, write
from models.train_pico import END, is_held_out, source_files
from splitfire.core.flags import parse_settings
from splitfire.core.hashing import chain_root
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.settings import WorkerSettings
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drafting import Speculator
from splitfire.engine.engine import Engine
from splitfire.engine.scheduler import Budget
from splitfire.engine.sequence import Purpose, SeqId, SequenceSpec
from splitfire.engine.speculation.acceptance import Acceptance, Shares
from splitfire.engine.speculation.controller import Controller, Offer, Pick
from splitfire.engine.speculation.costs import CostPoint, StepCosts
from splitfire.engine.speculation.lookup import Lookup
from splitfire.engine.speculation.measure import SHAPES, measure_steps
from splitfire.engine.speculation.speculator import BatchSpeculator, Sources
from splitfire.worker.loading import LoadedModel, load_model

SIMILARITIES = (1.0, 0.95, 0.9, 0.75, 0.5, 0.0)
SPEED_UPS = {1.0: 8.0, 0.95: 5.0, 0.9: 3.5}  # at batch 1: the targets
EDITS = Sources(lookup=False)  # answers that repeat themselves would be fast without any prediction
FIXED_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
PROMPT_TOKENS = 64
MIN_REQUESTS = 8  # one after another where the batch is smaller
HISTORY = 65536


class FixedWidth(Controller):
    """So many tokens of whatever a text drafter offers, whatever that brings."""

    def __init__(self, costs: StepCosts, width: int) -> None:
        super().__init__(costs)
        self._width = width

    def is_worthwhile(self, num_sequences: int) -> bool:
        return True

    def least_survival(self, num_sequences: int) -> float:
        return 0.0

    def choose(self, num_sequences: int, offers: Seq[Offer], modelled: Seq[Offer], room: int) -> dict[SeqId, Pick]:
        return {o.seq_id: Pick(o.source, min(self._width, len(o.survival))) for o in offers}


@dataclass(frozen=True, slots=True)
class Ran:
    """One batch: how fast it decoded, its tokens, and how many drafts of how many were right."""

    tokens_per_s: float
    tokens: tuple[tuple[int, ...], ...]
    num_drafted: int
    num_accepted: int


class Bench:
    """One loaded model and the engines over it."""

    def __init__(self, loaded: LoadedModel, num_output: int) -> None:
        self.loaded = loaded
        self.num_output = num_output
        # More exactly than a worker that is about to serve: the ceiling is made of it.
        self.points = measure_steps(loaded.engine.runner, SHAPES, 20.0, 64, time.perf_counter)
        self.vocab_size = loaded.model.config.vocab_size
        self._next_id = 0

    def costs(self) -> StepCosts:
        return StepCosts(self.points)

    def run(
        self, batch: int, prompts: Seq[Seq[int]], predicted: Seq[Seq[int]], controller: Controller | None, sources: Sources = EDITS
    ) -> Ran:
        """`batch` of them at a time. A fresh engine and speculator, so that nothing is known from before."""
        runner = self.loaded.engine.runner
        blocks = BlockPool(runner.pool.num_blocks, caches_prefixes=False)
        speculator: Speculator | None = None
        if controller is not None:
            speculator = BatchSpeculator(controller, time.perf_counter, sources)
        engine = Engine(runner, blocks, Budget(512, batch), time.perf_counter, speculator)
        specs = [self._spec(prompt, given) for prompt, given in zip(prompts, predicted, strict=True)]
        tokens: dict[SeqId, list[int]] = {spec.seq_id: [] for spec in specs}
        for spec in specs:
            engine.add(spec)
        seconds, num_tokens = 0.0, 0
        while engine.has_work:
            began = time.perf_counter()
            result = engine.step()
            took = time.perf_counter() - began
            for update in result.updates:
                tokens[update.seq_id] += (token.token_id for token in update.tokens)
            if not any(update.times for update in result.events):  # no first token: nobody's prompt was computed in it
                seconds += took
                num_tokens += sum(len(update.tokens) for update in result.updates)
        counts = engine.draft_counts().values()
        return Ran(
            num_tokens / seconds,
            tuple(tuple(tokens[spec.seq_id]) for spec in specs),
            sum(c.num_drafted for c in counts),
            sum(c.num_accepted for c in counts),
        )

    def _spec(self, prompt: Seq[int], predicted: Seq[int]) -> SequenceSpec:
        self._next_id += 1
        return SequenceSpec(
            SeqId(self._next_id), tuple(prompt), (), 0, SamplingParams(temperature=0.0), StopParams(self.num_output),
            Purpose.GENERATE, chain_root(b"", b"bench", ""), predicted=tuple(predicted),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One similarity at one batch size."""

    name: str
    similarity: float
    batch: int
    edited: Seq[Edited]
    prompts: Seq[Seq[int]]
    ceiling: Ceiling
    sources: Sources


def held_out(tokenizer: Tokenizer, count: int) -> list[int]:
    """So many tokens of text that pico was not trained on, from the beginning again when it ends."""
    ids: list[int] = []
    for path in filter(is_held_out, source_files()):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
        if len(ids) >= count:
            return ids[:count]
    return (ids * (count // len(ids) + 1))[:count]


def cases(bench: Bench, tokenizer: Tokenizer, batches: Seq[int], similarities: Seq[float]) -> list[Case]:
    text = held_out(tokenizer, PROMPT_TOKENS * max(MIN_REQUESTS, *batches))
    end = tokenizer.token_to_id(END)
    made = []
    for batch in batches:
        count = max(MIN_REQUESTS, batch)
        prompts = [[end or 0, *text[PROMPT_TOKENS * i : PROMPT_TOKENS * (i + 1)]] for i in range(count)]
        answers = bench.run(batch, prompts, [()] * count, None).tokens
        for similarity in similarities:
            edited = [edit(answer, similarity, bench.vocab_size, Random(f"{similarity}-{i}")) for i, answer in enumerate(answers)]
            ceiling = ceiling_of(edited, batch, bench.costs())
            name = f"{100 * similarity:.0f} % similar, batch {batch}"
            made.append(Case(name, similarity, batch, edited, prompts, ceiling, EDITS))
            if similarity == 0.0:
                made.append(Case(f"{name}, lookup too", similarity, batch, edited, prompts, ceiling, Sources()))
    return made


def measure(bench: Bench, case: Case, num_turns: int, widths: Seq[int]) -> list[Row]:
    """Without, with, and every width in turn."""
    predicted = [each.token_ids for each in case.edited]
    without, ours, drafted, same = [], [], [], []
    fixed: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(num_turns):
        plain = bench.run(case.batch, case.prompts, predicted, None)
        ran = bench.run(case.batch, case.prompts, predicted, Controller(bench.costs()), case.sources)
        without.append(plain.tokens_per_s)
        ours.append(ran.tokens_per_s)
        drafted.append(ran.num_accepted / max(ran.num_drafted, 1))
        pairs = [(a, b) for mine, theirs in zip(ran.tokens, plain.tokens, strict=True) for a, b in zip(mine, theirs, strict=True)]
        same.append(sum(a == b for a, b in pairs) / len(pairs))
        for width in widths:
            fixed[width].append(
                bench.run(case.batch, case.prompts, predicted, FixedWidth(bench.costs(), width), case.sources).tokens_per_s
            )
    return rows_of(case, without, ours, fixed, [statistics.median(drafted), statistics.median(same)])


def rows_of(case: Case, without: Seq[float], ours: Seq[float], fixed: dict[int, list[float]], shares: Seq[float]) -> list[Row]:
    speed, plain = statistics.median(ours), statistics.median(without)
    ratios = [a / b for a, b in zip(ours, without, strict=True)]
    ratio = statistics.median(ratios)
    is_single = case.batch == 1
    bound = SPEED_UPS.get(case.similarity, 0.98) if is_single or case.similarity == 0.0 else None
    if case.similarity == 0.0:
        bound = min(0.98, 1.0 - half_spread(ratios))
    target = f"at least {bound:.2f}x" if bound is not None else ""
    row = Row(case.name, "tokens/s", "tokens/s", speed, plain, "without", ratio, target, None, half_spread(ours))
    rows = [replace(row, met=None if bound is None else ratio >= bound)]
    for name, ceiling in (("ceiling, fixed width", case.ceiling.fixed), ("ceiling, knowing where", case.ceiling.knowing)):
        is_bound = is_single and name.endswith("width") and case.similarity > 0.0
        share = ratio / ceiling
        rows.append(
            Row(case.name, "speed-up", "x", ratio, ceiling, name, share, "at least 0.85" if is_bound else "",
                share >= 0.85 if is_bound else None, half_spread(ratios))
        )  # fmt: skip
    if fixed:
        medians = {0: plain, **{width: statistics.median(values) for width, values in fixed.items()}}
        width = max(medians, key=lambda each: medians[each])
        share = speed / medians[width]
        rows.append(
            Row(case.name, "tokens/s", "tokens/s", speed, medians[width], f"fixed width {width}", share, "at least 0.97", share >= 0.97,
                half_spread(ours))
        )  # fmt: skip
    accepted, same = shares
    rows.append(Row(case.name, "drafts accepted", "", accepted, None, "", None, "", None, 0.0))
    rows.append(Row(case.name, "tokens equal to those without", "", same, None, "", None, "", None, 0.0))
    return rows


def latencies(tokenizer: Tokenizer, num_tokens: int) -> list[Row]:
    """What following one's own text costs when 64k tokens of it are known: a code file after many, and one that never repeats."""
    rows = []
    code = held_out(tokenizer, HISTORY + num_tokens)
    random = Random(1)
    for name, text in (("code", code), ("random", [random.randrange(49152) for _ in code])):
        drafter = Lookup(Acceptance(Shares()))
        drafter.follow(text, HISTORY)
        updates, proposals, num_drafted = [], [], []
        for at in range(HISTORY, len(text)):
            known = text[: at + 1] if at % 64 == 0 else text  # `follow` only reads what is new
            began = time.perf_counter()
            drafter.follow(known, 1)
            followed = time.perf_counter()
            draft = drafter.draft(16) if drafter.look() else ()
            ended = time.perf_counter()
            updates.append(1e6 * (followed - began))
            proposals.append(1e6 * (ended - followed) - len(draft))
            num_drafted.append(len(draft))
        mean, p99 = statistics.mean(updates), sorted(proposals)[int(0.99 * len(proposals))]
        case = f"64k tokens of {name}"
        rows += [
            Row(case, "update, mean", "µs/token", mean, None, "", None, "at most 2", mean <= 2.0, half_spread(updates)),
            Row(case, "search and draft, p99, less 1 µs a token", "µs", p99, None, "", None, "at most 20", p99 <= 20.0, 0.0),
        ]
    return rows


def table(points: Seq[CostPoint]) -> list[Row]:
    """The cost table, for who wants to know what the ceilings are made of."""
    plain = {p.num_sequences: p.seconds for p in points if p.num_sequences == p.num_rows}
    return [
        Row(f"{p.num_sequences} sequences, {p.num_rows} rows", "step", "ms", 1e3 * p.seconds, 1e3 * plain[p.num_sequences], "without drafts",
            plain[p.num_sequences] / p.seconds, "", None, 0.0)
        for p in sorted(points, key=lambda p: (p.num_sequences, p.num_rows))
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pico", help="pico or a model directory, such as build/checkpoints/smol135")
    parser.add_argument("--batch", type=int, nargs="+", help="sequences at a time; 1 4 16 32")
    parser.add_argument("--similarity", type=float, nargs="+", help="of what is predicted; 1 0.95 0.9 0.75 0.5 0")
    parser.add_argument("--output", type=int, default=256, help="tokens an answer")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--no-widths", action="store_true", help="without the sweep of fixed widths")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--name", default="", help="of the result file, after speculation-MODEL: speculation-MODEL-NAME.json")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("worker", nargs="*", help="further flags of a worker, after --")
    asked = parser.parse_args()
    if asked.quick:
        asked.output, asked.turns = 64, 1
    batches = asked.batch or ([1] if asked.quick else [1, 4, 16, 32])
    similarities = asked.similarity or ([0.9, 0.0] if asked.quick else SIMILARITIES)
    flags = [f"--model={asked.model}", "--speculate=off", "--no-prefix-cache", "--log-level=warning", *asked.worker]
    loaded = load_model(
        parse_settings(WorkerSettings, [*flags, *([f"--threads={asked.threads}"] if asked.threads else [])], prog="bench")
    )
    tokenizer = Tokenizer.from_file(str(loaded.model.tokenizer_path))
    bench = Bench(loaded, asked.output)
    rows = table(bench.points)
    for case in cases(bench, tokenizer, batches, similarities):
        rows += measure(bench, case, asked.turns, () if asked.no_widths else FIXED_WIDTHS)
    rows += latencies(tokenizer, 2000 if asked.quick else 20_000)
    name = "-".join(filter(None, ["speculation", Path(asked.model).name, asked.name]))
    write(name, rows, directory=QUICK_RESULTS if asked.quick else RESULTS)


if __name__ == "__main__":
    main()
