"""Line charts as SVG text, drawn by hand: small, sharp in print, at home in a page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 26, 12, 38
MOST_POINTS = 400
"""A longer line is drawn by the lowest and highest point of each of so many / 2 pieces: spikes stay."""
SMOOTHED_FROM = 60
COLOURS = 8


@dataclass
class Line:
    """One curve: points (x, y) in order of x; y is finite. `colour` counts the page's colours."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False


def line_chart(lines: Sequence[Line], *, from_zero: bool = False, x_label: str = "step") -> str:
    """An SVG figure of one or more lines, with a legend where there are several.

    The y axis starts at 0 with `from_zero`; else it is logarithmic where all values are positive
    and span more than a factor of 50. Long lines are drawn pale, with their running mean on top.
    Colours are the classes `c0` to `c7` of the page.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        raise ValueError("a chart needs at least one point")
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if from_zero:
        ys.append(0.0)
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > 50
    x_low, x_high = min(0.0, min(xs)), max(xs) or 1.0
    y_ticks = _log_ticks(min(ys), max(ys)) if logarithmic else ticks(min(ys), max(ys))
    y_low, y_high = min(*y_ticks, *ys), max(*y_ticks, *ys)

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        place = (
            math.log(y / y_low) / math.log(y_high / y_low)
            if logarithmic
            else (y - y_low) / (y_high - y_low)
        )
        return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">']
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, 6):
        if x_low <= tick <= x_high:
            x = across(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {HEIGHT - BOTTOM}v4"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(tick)}</text>'
            )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    for line in lines:
        colour = _classes(line)
        path = _path([(across(x), up(y)) for x, y in thinned(line.points)])
        long = len(line.points) >= SMOOTHED_FROM
        title = f"<title>{escape(line.label)}</title>"
        parts.append(
            f'<path class="line {colour}{" pale" if long else ""}" d="{path}">{title}</path>'
        )
        if long:
            path = _path([(across(x), up(y)) for x, y in thinned(smooth(line.points))])
            parts.append(f'<path class="line {colour}" d="{path}">{title}</path>')
        elif len(line.points) <= 30:
            dots = "".join(
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>' for x, y in line.points
            )
            parts.append(f'<g class="dots {colour}">{dots}</g>')
    parts.append("</svg>")
    if len(lines) > 1:
        names = "".join(
            f'<span class="key {_classes(line)}">{escape(line.label)}</span>' for line in lines
        )
        parts.append(f'<p class="legend">{names}</p>')
    return "".join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`, about `count` of them."""
    if not high > low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round((last - first) / 6))
    return [10.0**power for power in range(first, last + every, every)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The centred running mean over a twentieth of the line."""
    half = max(1, len(points) // 40)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        start, stop = max(0, i - half), min(len(points), i + half + 1)
        result.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return result


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of the points: the ends, and each piece's lowest and highest."""
    if len(points) <= MOST_POINTS:
        return list(points)
    pieces = MOST_POINTS // 2 - 1
    kept = {0, len(points) - 1}
    for piece in range(pieces):
        inside = range(piece * len(points) // pieces, (piece + 1) * len(points) // pieces)
        kept.add(min(inside, key=lambda i: points[i][1]))
        kept.add(max(inside, key=lambda i: points[i][1]))
    return [points[i] for i in sorted(kept)]


def short(value: float) -> str:
    """A tick's label: 0.05, 2, 1,500, 20k, 1e-05."""
    size = abs(value)
    if value == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 10 * unit or (size >= unit and unit > 1e3):
            return f"{value / unit:.4g}{name}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _classes(line: Line) -> str:
    return f"c{line.colour % COLOURS}{' dashed' if line.dashed else ''}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
