"""A few shapes of SVG, enough for two charts: no library, and equal numbers give equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, told apart with every common colour blindness.
BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, RED, PURPLE, GREY, INK = "#E69F00", "#D55E00", "#CC79A7", "#BBBBBB", "#1A1A1A"
FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"


def number(value: float) -> str:
    """One digit behind the point, and none where it is zero."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


@dataclass(frozen=True)
class Scale:
    """Maps numbers from ``low`` to ``high`` to places from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1, dash: str = "") -> str:
    """A straight line."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{number(width)}"{dashes}/>'


def path(points: Sequence[tuple[float, float]], colour: str, width: float = 2) -> str:
    """A line through points."""
    places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{number(width)}"/>'


def area(points: Sequence[tuple[float, float]], colour: str) -> str:
    """A filled shape with a thin white edge, so that neighbours stay apart without colours."""
    places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polygon points="{places}" fill="{colour}" stroke="#FFFFFF" stroke-width="0.6"/>'


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """A filled rectangle."""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect {place} fill="{colour}"/>'


def dot(x: float, y: float, radius: float, fill: str, edge: str) -> str:
    """A circle."""
    place = f'cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"'
    return f'<circle {place} fill="{fill}" stroke="{edge}" stroke-width="1.4"/>'


def label(x: float, y: float, text: str, anchor: str = "start", size: int = 12, bold: bool = False) -> str:
    """A text that stands, ends or is centred at a place."""
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place}{weight} fill="{INK}">{escape(text)}</text>'


def sideways(x: float, y: float, text: str) -> str:
    """A text that reads upwards, centred at a place."""
    place = f'x="{number(x)}" y="{number(y)}" text-anchor="middle" font-size="12"'
    return f'<text {place} transform="rotate(-90 {number(x)} {number(y)})" fill="{INK}">{escape(text)}</text>'


def drawing(width: int, height: int, title: str, shapes: Sequence[str]) -> str:
    """The whole picture on white, with a title for those who hear it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join([f"<title>{escape(title)}</title>", box(0, 0, width, height, "#FFFFFF"), *shapes])
    return f'{head} role="img" font-family="{FONT}">\n{body}\n</svg>\n'
