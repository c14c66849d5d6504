"""Axes and what is drawn between them, as SVG. Pure. Colours are classes, so that the page's style decides on light, dark and paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from splitfire.cli.bench.markup import Markup, tag

Point = tuple[float, float]
SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Scale:
    """From values of `low` to `high` to pixels of `begin` to `end`; outside of it they stay at the edge."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    step = next(step for step in _nice_steps((high - low) / most) if (high - low) / step <= most + SLACK)
    return [i * step for i in range(math.ceil(low / step - SLACK), math.floor(high / step + SLACK) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """1, 2 and 5 times powers of ten; fewer of them where that is too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low * (1 - SLACK) <= tick <= high * (1 + SLACK)]
        if len(ticks) <= most:
            break
    return ticks


def _nice_steps(least: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(least))
    return [power, 2 * power, 5 * power, 10 * power]


@dataclass(frozen=True, slots=True)
class Axis:
    """What stands beside a scale."""

    name: str
    ticks: Sequence[float]
    text: Callable[[float], str]


@dataclass(slots=True)
class Plot:
    """One picture. What is added first lies lowest."""

    title: str
    width: float
    height: float
    x: Scale
    y: Scale
    class_: str | None = None
    parts: list[Markup] = field(default_factory=list)

    def axes(self, x: Axis, y: Axis) -> None:
        left, right, top, bottom = self.x.begin, self.x.end, self.y.end, self.y.begin
        for tick in y.ticks:
            at = self.y(tick)
            self.parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
            self.parts.append(tag("text", y.text(tick), x=left - 6, y=at + 3.5, class_="tick", text_anchor="end"))
        for tick in x.ticks:
            at = self.x(tick)
            self.parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            self.parts.append(tag("text", x.text(tick), x=at, y=bottom + 16, class_="tick", text_anchor="middle"))
        self.parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        if x.name:
            self.parts.append(tag("text", x.name, x=(left + right) / 2, y=self.height - 4, class_="name", text_anchor="middle"))
        if y.name:
            self.parts.append(tag("text", y.name, x=2, y=top - 10, class_="name"))

    def line(self, points: Sequence[Point], class_: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(tag("polyline", points=path, class_=f"line {class_}"))

    def band(self, lower: Sequence[Point], upper: Sequence[Point], class_: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in (*lower, *reversed(upper)))
        self.parts.append(tag("polygon", points=path, class_=f"band {class_}"))

    def whisker(self, x: float, low: float, high: float, class_: str, dx: float = 0) -> None:
        at = self.x(x) + dx
        self.parts.append(tag("line", x1=at, x2=at, y1=self.y(low), y2=self.y(high), class_=f"whisker {class_}"))

    def mark(self, point: Point, shape: int, class_: str, tip: str = "") -> None:
        self.parts.append(marker(self.x(point[0]), self.y(point[1]), shape, class_, tip))

    def rule(self, class_: str, label: str, *, x: float | None = None, y: float | None = None) -> None:
        """A line across the picture at one value, named at its end."""
        if x is not None:
            at = self.x(x)
            self.parts.append(tag("line", x1=at, x2=at, y1=self.y.begin, y2=self.y.end, class_=class_))
            anchor = "end" if at > (self.x.begin + self.x.end) / 2 else "start"
            self.parts.append(
                tag(
                    "text",
                    label,
                    x=at + (-4 if anchor == "end" else 4),
                    y=self.y.end + 9,
                    class_="label " + class_,
                    text_anchor=anchor,
                )
            )
        if y is not None:
            at = self.y(y)
            self.parts.append(tag("line", x1=self.x.begin, x2=self.x.end, y1=at, y2=at, class_=class_))
            self.parts.append(tag("text", label, x=self.x.begin + 4, y=at - 5, class_="label " + class_))

    def text(self, point: Point, text: str, class_: str, anchor: str = "start", dx: float = 0, dy: float = 0) -> None:
        x, y = self.x(point[0]) + dx, self.y(point[1]) + dy
        self.parts.append(tag("text", text, x=x, y=y, class_=class_, text_anchor=anchor))

    def svg(self) -> Markup:
        return tag(
            "svg", tag("title", self.title), *self.parts,
            viewBox=f"0 0 {self.width:g} {self.height:g}", width=f"{self.width:g}", height=f"{self.height:g}", role="img", class_=self.class_,
        )  # fmt: skip


def marker(x: float, y: float, shape: int, class_: str, tip: str = "") -> Markup:
    """A circle, a square or a diamond: who sees no colours, or has them printed in grey, still tells variants apart."""
    children = (tag("title", tip),) if tip else ()
    class_ = f"mark {class_}"
    if shape % 3 == 0:
        return tag("circle", *children, cx=x, cy=y, r=4, class_=class_)
    if shape % 3 == 1:
        return tag("rect", *children, x=x - 3.5, y=y - 3.5, width=7, height=7, class_=class_)
    return tag(
        "polygon",
        *children,
        points=f"{x:.1f},{y - 5:.1f} {x + 5:.1f},{y:.1f} {x:.1f},{y + 5:.1f} {x - 5:.1f},{y:.1f}",
        class_=class_,
    )
