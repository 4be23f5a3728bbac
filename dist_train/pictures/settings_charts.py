"""Charts of many trials as SVG text: one setting against a figure, and all settings side by side.

Places are numbers from 0 to 1; labels say what the ends and the middle mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dist_train.pictures.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, short, ticks

Labels = Sequence[tuple[float, str]]


def scatter(points: Sequence[tuple[float, float]], best: int, labels: Labels, x_label: str) -> str:
    """A dot for each (place, figure); the one of index `best` stands out."""
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return LEFT + x * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{up(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for place, label in labels:
        parts.append(
            f'<text x="{across(place):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
    )
    for index, (x, y) in enumerate(points):
        kind = "dot best" if index == best else "dot"
        parts.append(f'<circle class="{kind}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"/>')
    return "".join([*parts, "</svg>"])


def parallel(
    lines: Sequence[Sequence[float | None]], best: int, axes: Sequence[tuple[str, Labels]]
) -> str:
    """A line for each trial over one axis a setting; None where a trial does not have it. The last axis is the figure,
    by which lines are pale or strong: 1 is the best."""
    gap = (WIDTH - LEFT - RIGHT) / max(1, len(axes) - 1)

    def point(axis: int, place: float) -> str:
        return f"{LEFT + axis * gap:.1f} {HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">']
    order = sorted(range(len(lines)), key=lambda index: (index == best, lines[index][-1] or 0.0))
    for index in order:
        there = [(axis, place) for axis, place in enumerate(lines[index]) if place is not None]
        path = "M" + "L".join(point(axis, place) for axis, place in there)
        kind = "trial best" if index == best else "trial"
        strength = 1.0 if index == best else 0.08 + 0.6 * (lines[index][-1] or 0.0) ** 3
        parts.append(f'<path class="{kind}" opacity="{strength:.2f}" d="{path}"/>')
    for axis, (name, labels) in enumerate(axes):
        parts.append(f'<path class="axis" d="M{point(axis, 0)}L{point(axis, 1)}"/>')
        anchor = "end" if axis == len(axes) - 1 and axis else "middle"
        x = LEFT + axis * gap
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 6 - 14 * (axis % 2)}" text-anchor="{anchor}">{escape(name)}</text>'
        )
        for place, label in labels:
            y = HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)
            parts.append(
                f'<text x="{x - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            )
    return "".join([*parts, "</svg>"])
