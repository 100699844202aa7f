"""Line charts as inline SVG: no script, no font, no file beside the page they are in.

Colours are the page's CSS variables (--series-0 ...), so a chart follows its light or dark mode.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 900, 440
LEFT, RIGHT, TOP, BOTTOM = 58, 240, 14, 46  # margins; names stand in the right one
LABEL_GAP = 17

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve, with its name at the end of it and perhaps a dot of its own."""

    name: str
    points: Sequence[Point]
    color: int
    dashed: bool = False
    dot: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line to be passed."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    log2: bool = False

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high = self._scale(self.low), self._scale(self.high)
        return (self._scale(value) - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        if self.log2:
            first, last = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high))
            return [2.0**power for power in range(first, last + 1)]
        rough = (self.high - self.low) / 6 or 1
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _scale(self, value: float) -> float:
        return math.log2(value) if self.log2 else value


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    levels: Sequence[Level] = (),
    mark: tuple[float, str] | None = None,
) -> str:
    """Draw `series` over `levels`; `mark` is a vertical line with its name."""

    def at(point: Point) -> Point:
        across = WIDTH - LEFT - RIGHT
        down = HEIGHT - TOP - BOTTOM
        return LEFT + across * x.place(point[0]), TOP + down * (1 - y.place(point[1]))

    body = _frame(x, y, at)
    frame = len(body)
    if mark:
        across, _ = at((mark[0], y.low))
        body.append(_line(across, TOP, across, HEIGHT - BOTTOM, "mark"))
        body.append(_text(across + 5, TOP + 11, mark[1], "note"))
    names: list[tuple[float, str, str]] = []  # height, class, text
    for level in levels:
        _, height = at((x.low, level.value))
        body.append(_line(LEFT, height, WIDTH - RIGHT, height, "level"))
        names.append((height, "level-name", f"{level.name} {level.value:#.4g}"))
    curves = []
    for one in series:
        where = " ".join(f"{a - LEFT:.1f},{b - TOP:.1f}" for a, b in map(at, one.points))
        style = f'style="stroke:var(--series-{one.color})"'
        kind = "curve dashed" if one.dashed else "curve"
        curves.append(f'<polyline class="{kind}" points="{where}" {style}/>')
        end = one.dot or one.points[-1]
        across, height = at(end)
        if one.dot:
            fill = f'style="fill:var(--series-{one.color})"'
            body.append(f'<circle class="dot" cx="{across:.1f}" cy="{height:.1f}" r="4.5" {fill}/>')
        names.append((height, f"name-{one.color}", f"{one.name} {end[1]:#.4g}"))
    body += _names(names)
    # A nested svg cuts off what lies outside it: a loss begins far above the plot.
    plot = (
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}">{"".join(curves)}</svg>'
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body[:frame])}{plot}{''.join(body[frame:])}</svg>"
    )


def _frame(x: Axis, y: Axis, at: Callable[[Point], Point]) -> list[str]:
    """Grid, ticks and the names of the axes."""
    body = []
    for value in y.ticks():
        _, height = at((x.low, value))
        body.append(_line(LEFT, height, WIDTH - RIGHT, height, "grid"))
        body.append(_text(LEFT - 8, height + 4, f"{value:.4g}", "tick right"))
    for value in x.ticks():
        across, _ = at((value, y.low))
        body.append(_line(across, HEIGHT - BOTTOM, across, HEIGHT - BOTTOM + 5, "axis"))
        text = f"{value:.0f}" if x.log2 else _short(value)
        body.append(_text(across, HEIGHT - BOTTOM + 19, text, "tick middle"))
    body.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 7, x.label, "label middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body.append(
        f'<text class="label middle" transform="translate(13 {middle:.0f}) rotate(-90)">'
        f"{escape(y.label)}</text>"
    )
    return body


def _names(names: list[tuple[float, str, str]]) -> list[str]:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    names = sorted(names)
    heights = [height for height, _, _ in names]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    overflow = max(0.0, heights[-1] - (HEIGHT - BOTTOM)) if heights else 0.0
    if overflow:
        heights[-1] -= overflow
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - LABEL_GAP)
    body = []
    for (wanted, kind, text), height in zip(names, heights, strict=True):
        left = WIDTH - RIGHT
        body.append(_line(left + 6, wanted, left + 16, height, "leader"))
        body.append(_text(left + 19, height + 4, text, kind))
    return body


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _short(value: float) -> str:
    """1,500,000 as 1.5M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
