"""HTML and SVG as a tree of tags. Pure. Text is escaped unless it came out of `tag`: nobody's model name becomes markup."""

from __future__ import annotations

from html import escape


class Markup(str):
    """What is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """`class_` is `class`, `stroke_width` is `stroke-width`; an attribute that is None is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if not children and name in ("br", "circle", "line", "meta", "path", "polygon", "polyline", "rect"):
        return Markup(f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def _text(value: object) -> str:
    """Coordinates to a tenth of a pixel: what is finer only makes the file larger."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
