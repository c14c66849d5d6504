"""The report: one HTML file that needs nothing else, no script and no other address. Pure: results in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from splitfire.cli.bench import charts
from splitfire.cli.bench.markup import Markup, tag
from splitfire.cli.bench.numbers import exact, milliseconds, per_second, three
from splitfire.cli.bench.results import Results
from splitfire.cli.bench.statistics import Distribution, Row
from splitfire.cli.bench.style import STYLE
from splitfire.cli.bench.verdict import IN_TIME, carried_rate, error_lines

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser too sees to it that nothing is fetched
TIMES = ("p50", "p90", "p99")


def page(results: Results) -> str:
    slo = results.slo
    targets = f"TTFT {exact(slo.ttft_s)}, ITL {exact(slo.itl_s)}"
    title = f"{results.model} under load"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        tag("title", f"{title} - splitfire bench serve"),
        tag("style", Markup(STYLE)),
    )
    main = [
        tag("h1", title),
        tag(
            "p",
            f"In time: first token within {exact(slo.ttft_s)}, and {exact(slo.itl_s)} or less between tokens in the answer's mean.",
        ),
        *(tag("p", warning, class_="warn") for warning in results.warnings),
    ]
    if results.rows:
        main += [
            _cards(results),
            tag("p", results.comparison or " ".join(results.sentences), class_="lead"),
            _facts(results),
        ]
        main += _pictures(results)
        main += [tag("h2", "All numbers"), tag("p", f"Times in ms. Targets: {targets}.", class_="about"), _table(results)]
    else:
        main += [tag("p", "Nothing was measured.", class_="none"), _facts(results)]
    main += [*_errors(results.rows), *_notes(results), *_reading()]
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *main)), lang="en") + "\n"


def _cards(results: Results) -> Markup:
    """What each variant carries, to be seen from afar."""
    cards = []
    for index, variant in enumerate(results.variants):
        rows = [row for row in results.rows if row.variant == variant]
        best = max(rows, key=lambda row: row.goodput)
        carried = carried_rate(rows)
        more = " or more" if carried == rows[-1].rate else ""
        limit = f"{IN_TIME:.0%} in time up to {carried:g}/s{more}" if carried else f"under {IN_TIME:.0%} in time at every rate"
        cards.append(
            tag(
                "div",
                tag("span", variant, class_="who"),
                tag("b", per_second(best.goodput)),
                tag("span", f"most requests in time, at {best.rate:g}/s; {limit}"),
                class_=f"card c{index}",
            )
        )
    return tag("div", *cards, class_="cards")


def _facts(results: Results) -> Markup:
    return tag("dl", *(part for name, value in results.head.items() for part in (tag("dt", name), tag("dd", value))), class_="head")


def _pictures(results: Results) -> list[Markup]:
    slo, key = results.slo, charts.legend(results.variants)
    parts = [
        tag("h2", "Goodput against request rate"),
        tag("p", "Requests that met both targets. Whiskers reach from the worst round to the best.", class_="about"),
        key,
        charts.goodput(results),
        tag("h2", "Times against request rate"),
        tag("p", "Filled marks and thick lines: the median. Hollow marks and dashed lines: p99.", class_="about"),
        key,
        tag(
            "div",
            charts.against_rate(results, "time to first token", _ttft, slo.ttft_s),
            charts.against_rate(results, "time between tokens", _itl, slo.itl_s),
            class_="pictures two",
        ),
    ]
    for name, pick, target_s in (("time to first token", _ttft, slo.ttft_s), ("time between tokens", _itl, slo.itl_s)):
        about = (
            f"Share of samples that took no longer; marks at p50, p90 and p99; the dotted line is the target of {exact(target_s)}."
        )
        parts += [tag("h2", f"Distribution of the {name}"), tag("p", about, class_="about"), key]
        parts.append(tag("div", *charts.distributions(results, name, pick, target_s), class_="pictures three"))
    if drawn := charts.phases(results):
        about = "Mean of each phase until the first token was handed to the client's stream, as the router tells it; they do not overlap."
        parts += [tag("h2", "Where the time to the first token went"), tag("p", about, class_="about"), drawn]
    return parts


def _table(results: Results) -> Markup:
    groups = tag(
        "tr",
        *(tag("th", "") for _ in range(6)),
        tag("th", "TTFT", colspan=3, class_="group"),
        tag("th", "ITL", colspan=3, class_="group"),
        *(tag("th", "") for _ in range(3)),
        tag("th", "client", colspan=3, class_="group"),
    )
    titles = ("rate", "variant", "sent", "failed", "in time", "goodput", *TIMES, *TIMES, "tokens/s", "cached", "met TTFT")
    names = [tag("th", title, class_="text" if title == "variant" else None) for title in (*titles, "late p99", "lag p99", "CPU")]
    lines = []
    for index, row in enumerate(results.rows):
        is_first = index == 0 or results.rows[index - 1].rate != row.rate
        lines.append(_line(row, results.variants.index(row.variant), is_first))
    return tag("div", tag("table", tag("thead", groups, tag("tr", *names)), tag("tbody", *lines)), class_="wide")


def _line(row: Row, colour: int, is_first: bool) -> Markup:
    unfinished = f" + {row.num_unfinished} cut" if row.num_unfinished else ""
    late = "bad" if row.is_late else None
    cells = [
        tag("td", f"{row.rate:g}" if is_first else ""),
        tag("td", tag("i", class_=f"dot c{colour}"), row.variant, class_="text"),
        tag("td", f"{row.num_requests}{unfinished}"),
        tag("td", str(row.num_errors), class_="bad" if row.num_errors else None),
        tag("td", f"{row.share_met:.0%}"),
        tag("td", three(row.goodput)),
        *(tag("td", text) for text in (*_times(row.ttft), *_times(row.itl))),
        tag("td", f"{row.tokens_per_s:.0f}"),
        tag("td", f"{row.cached_share:.0%}"),
        tag("td", f"{row.num_met_ttft / row.num_requests:.0%}" if row.num_requests else "-"),
        tag("td", milliseconds(row.late.p99) if row.late else "-", class_=late),
        tag("td", milliseconds(row.lag.p99) if row.lag else "-", class_=late),
        tag("td", f"{row.cpu_share:.0%}"),
    ]
    return tag("tr", *cells, class_="first" if is_first else None)


def _errors(rows: Sequence[Row]) -> list[Markup]:
    lines = error_lines(rows)
    if not lines:
        return []
    return [tag("h2", "Requests that failed"), tag("ul", *(tag("li", line) for line in lines), class_="said")]


def _notes(results: Results) -> list[Markup]:
    if not results.notes:
        return []
    return [tag("h2", "Notes"), tag("ul", *(tag("li", note) for note in results.notes), class_="said")]


def _reading() -> list[Markup]:
    lines = (
        "Requests go out when they are due, at random (Poisson) or as a trace has them, whether or not others were answered; every variant "
        "gets the same ones. TTFT counts from the instant a request was due: when the client was late, that is in it.",
        "ITL is the time between two tokens of an answer as the client reads them; tokens that come in one message share the gap before it. "
        "A request's ITL is the mean of its gaps; percentiles are of all gaps.",
        "Percentiles are exact, of all samples of answered requests; those that failed are counted and never in time. The warm-up is "
        "in no number. Goodput is requests in time over the measured seconds.",
        "Late: how long after it was due a request was sent. Lag: how long something that comes may wait until the client notes it. "
        "Red where they are so large that they say something about the times themselves.",
    )
    return [tag("h2", "How to read it"), *(tag("p", line, class_="about") for line in lines)]


def _times(times: Distribution | None) -> tuple[str, str, str]:
    return ("-", "-", "-") if times is None else (milliseconds(times.p50), milliseconds(times.p90), milliseconds(times.p99))


def _ttft(row: Row) -> Distribution | None:
    return row.ttft


def _itl(row: Row) -> Distribution | None:
    return row.itl
