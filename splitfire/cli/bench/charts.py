"""The report's pictures, from its rows. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from splitfire.cli.bench.markup import Markup, join, tag
from splitfire.cli.bench.numbers import exact, per_second, seconds, sent
from splitfire.cli.bench.plot import Axis, Plot, Scale, linear_ticks, log_ticks, marker
from splitfire.cli.bench.results import Results
from splitfire.cli.bench.statistics import CURVE, Distribution, Row
from splitfire.cli.bench.verdict import IN_TIME

WIDE, HALF, THIRD = 1040.0, 510.0, 338.0
LEAST_S = 1e-4  # of a time on a logarithmic axis: several tokens of one message are 0 apart
BAR_PX, ROW_PX, GROUP_PX = 15.0, 20.0, 10.0
NUM_PHASE_COLOURS = 8
Pick = Callable[[Row], Distribution | None]


def goodput(results: Results) -> Markup:
    """Requests in time against requests sent, both a second: a fleet that keeps up lies on the ideal line."""
    highest = results.rates[-1]
    top = 1.06 * max(highest, *(max(row.goodputs) for row in results.rows))
    plot = Plot("Goodput against request rate", WIDE, 380, Scale(0, 1.03 * highest, 44, WIDE - 150), Scale(0, top, 336, 28), "tall")
    ticks = linear_ticks(0, top)
    plot.axes(
        Axis("requests sent per second", _readable(results.rates, plot.x), _plain),
        Axis("requests in time per second", ticks, _plain),
    )
    plot.line([(0, 0), (highest, highest)], "ideal")
    plot.line([(0, 0), (highest, IN_TIME * highest)], "slo")
    plot.text((highest, highest), "ideal: all in time", "label", dx=10, dy=-3)
    plot.text((highest, IN_TIME * highest), f"{IN_TIME:.0%} in time", "label slo", dx=10, dy=9)
    for index, variant in enumerate(results.variants):
        rows = [row for row in results.rows if row.variant == variant]
        plot.line([(row.rate, row.goodput) for row in rows], f"c{index}")
        for row in rows:
            beside = 4.0 * (index - (len(results.variants) - 1) / 2)  # or one would hide the other's
            plot.whisker(row.rate, min(row.goodputs), max(row.goodputs), f"c{index}", beside)
            tip = f"{variant}, {sent(row.rate)}: {row.num_met} of {row.num_requests} in time, {per_second(row.goodput)}"
            plot.mark((row.rate, row.goodput), index, f"c{index}", tip)
    return plot.svg()


def against_rate(results: Results, name: str, pick: Pick, slo_s: float) -> Markup:
    """The median as a line, p99 as a thin one, what lies between them shaded; one logarithmic axis of time."""
    found = [(row, times) for row in results.rows if (times := pick(row)) is not None]
    if not found:
        return _nothing(name)
    low, high = _span([*(time for _, times in found for time in (times.p50, times.p99)), slo_s])
    x = Scale(results.rates[0] / 1.2, results.rates[-1] * 1.2, 56, HALF - 14, is_log=True)
    plot = Plot(f"{name} against request rate", HALF, 290, x, Scale(low, high, 246, 30, is_log=True))
    plot.axes(Axis("requests sent per second", _readable(results.rates, x), _plain), Axis(name, log_ticks(low, high), exact))
    for index, variant in enumerate(results.variants):
        mine = [(row.rate, times) for row, times in found if row.variant == variant]
        p50, p99 = [(rate, times.p50) for rate, times in mine], [(rate, times.p99) for rate, times in mine]
        plot.band(p50, p99, f"c{index}")
        plot.line(p99, f"c{index} thin")
        plot.line(p50, f"c{index}")
        for rate, times in mine:
            tip = f"{variant}, {sent(rate)}: {_percentiles(times)}"
            plot.mark((rate, times.p50), index, f"c{index}", tip)
            plot.mark((rate, times.p99), index, f"c{index} hollow", tip)
    plot.rule("slo", f"target {exact(slo_s)}", y=slo_s)
    return plot.svg()


def distributions(results: Results, name: str, pick: Pick, slo_s: float) -> list[Markup]:
    """A picture for each rate: the share of samples that took no longer, all with one axis of time."""
    found = [times for row in results.rows if (times := pick(row)) is not None]
    if not found:
        return [_nothing(name)]
    low, high = _span([*(time for times in found for time in (times.curve[1], times.curve[-2])), slo_s])
    return [
        _distribution(results, name, pick, slo_s, rate, Scale(low, high, 40, THIRD - 10, is_log=True)) for rate in results.rates
    ]


def _distribution(results: Results, name: str, pick: Pick, slo_s: float, rate: float, x: Scale) -> Markup:
    plot = Plot(f"{name} at {sent(rate)}", THIRD, 212, x, Scale(0, 1, 178, 34))
    plot.axes(Axis("", log_ticks(x.low, x.high, 5), exact), Axis("", (0, 0.5, 0.9, 1), lambda share: f"{share:.0%}"))
    plot.parts.append(tag("text", sent(rate), x=40, y=14, class_="panel"))
    plot.rule("slo", "", x=slo_s)
    for index, variant in enumerate(results.variants):
        times = next((pick(row) for row in results.rows if (row.rate, row.variant) == (rate, variant)), None)
        if times is None:
            continue
        plot.line(_thinned(zip(times.curve, CURVE, strict=True), plot), f"c{index}")
        for value, share in ((times.p50, 0.5), (times.p90, 0.9), (times.p99, 0.99)):
            plot.mark((value, share), index, f"c{index}", f"{variant}, {sent(rate)}: {_percentiles(times)}")
    return plot.svg()


def phases(results: Results) -> Markup:
    """Where the mean time to the first token went, a bar for each rate and variant. Empty when no fleet told."""
    rows = [row for row in results.rows if row.phases]
    if not rows:
        return Markup()
    names = list(dict.fromkeys(phase.name for row in rows for phase in row.phases))
    colours = {name: f"p{index % NUM_PHASE_COLOURS}" for index, name in enumerate(names)}
    longest = max(sum(phase.seconds for phase in row.phases) for row in rows)
    rates = list(dict.fromkeys(row.rate for row in rows))
    height = 12 + len(rows) * ROW_PX + len(rates) * GROUP_PX
    x = Scale(0, longest * 1.02, 190, WIDE - 80)
    plot = Plot("Phases of the time to the first token, means", WIDE, height + 40, x, Scale(0, 1, height, 8))
    plot.axes(Axis("", linear_ticks(0, longest), exact), Axis("", (), _plain))
    top = 8.0
    for rate in rates:
        mine = [row for row in rows if row.rate == rate]
        plot.parts.append(tag("text", f"{rate:g}/s", x=4, y=top + BAR_PX - 3, class_="panel"))
        for row in mine:
            plot.parts += _bar(row, x, top, colours)
            top += ROW_PX
        top += GROUP_PX
    legend = tag("p", *(tag("span", tag("i", class_=f"swatch {colours[name]}"), name) for name in names), class_="legend")
    return join(plot.svg(), legend)


def _bar(row: Row, x: Scale, top: float, colours: dict[str, str]) -> list[Markup]:
    parts = [tag("text", row.variant, x=x.begin - 8, y=top + BAR_PX - 3, class_="tick", text_anchor="end")]
    begin = 0.0
    for phase in row.phases:
        left, right = x(begin), x(begin + phase.seconds)
        tip = tag("title", f"{row.variant}, {sent(row.rate)}: {phase.name} {seconds(phase.seconds)}")
        parts.append(
            tag("rect", tip, x=left, y=top, width=max(0.5, right - left), height=BAR_PX, class_=f"fill {colours[phase.name]}")
        )
        begin += phase.seconds
    parts.append(tag("text", seconds(begin), x=x(begin) + 6, y=top + BAR_PX - 3, class_="tick"))
    return parts


def legend(variants: Sequence[str]) -> Markup:
    """Each variant's colour and shape."""
    return tag(
        "p",
        *(
            tag("span", tag("svg", marker(8, 8, index, f"c{index}"), viewBox="0 0 16 16", width=16, height=16), variant)
            for index, variant in enumerate(variants)
        ),
        class_="legend",
    )


def _span(times: Iterable[float]) -> tuple[float, float]:
    """Of a logarithmic axis that holds all of them, with room at both ends."""
    positive = [max(time, LEAST_S) for time in times]
    return min(positive) / 1.25, max(positive) * 1.25


def _readable(rates: Sequence[float], x: Scale, least_px: float = 22.0) -> list[float]:
    """The rates themselves, without those whose numbers would stand on one another; the greatest stays."""
    kept: list[float] = []
    for rate in reversed(rates):
        if not kept or x(kept[-1]) - x(rate) >= least_px:
            kept.append(rate)
    return kept


def _thinned(points: Iterable[tuple[float, float]], plot: Plot) -> list[tuple[float, float]]:
    """Without points that lie within half a pixel of the one before."""
    kept: list[tuple[float, float]] = []
    at = (-1.0, -1.0)
    for x, y in points:
        pixel = plot.x(x), plot.y(y)
        if math.dist(pixel, at) >= 0.5:
            kept.append((x, y))
            at = pixel
    return kept


def _percentiles(times: Distribution) -> str:
    return f"p50 {seconds(times.p50)}, p90 {seconds(times.p90)}, p99 {seconds(times.p99)}, {times.count} samples"


def _nothing(name: str) -> Markup:
    return tag("p", f"No {name}: nothing was answered.", class_="none")


def _plain(value: float) -> str:
    return f"{value:g}"
