"""Plots as PNG files: the only file that knows matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError

MANY = 6
"""With more curves the legend stands beside the panel."""


def need_matplotlib(where: str) -> None:
    """Raise UserError, beginning with `where`, when plots cannot be made."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: needs matplotlib: pip install 'dist-train[plots]'") from error


def line_plot(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    *,
    x_label: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Write curves as a PNG file, one panel under the other.

    Args:
        panels: (label of the y axis, {curve: (xs, ys)}) of each.
        marks: places on the x axis by name: in the colour of the curve of that name, or black with the name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(panels) + 0.4), layout="constrained")
    axes: Any = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (y_label, curves) in zip(axes, panels, strict=True):
        colours = {}
        for name, (xs, ys) in curves.items():
            marker = "." if len(xs) <= 60 else None
            (drawn,) = axis.plot(xs, ys, label=name, linewidth=1.5, marker=marker)
            colours[name] = drawn.get_color()
        for name, x in (marks or {}).items():
            look = {"color": colours[name]} if name in colours else {"color": "k", "label": name}
            axis.axvline(x, linestyle="--", linewidth=1, **look)
        if log_x:
            axis.set_xscale("log")
        if log_y and any(y > 0 for _, ys in curves.values() for y in ys):
            axis.set_yscale("log")
        if len(curves) > 1 or marks:
            outside: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
            axis.legend(**(outside if len(curves) > MANY else {}))
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(x_label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def reliability_plot(path: Path, bins: Sequence[Mapping[str, Any]]) -> None:
    """Write a reliability diagram as a PNG file: of each bin of the confidence the share that is right, against the
    diagonal; how many rows it has stands below. Bins as `ensembles.reliability` gives them."""
    from matplotlib.figure import Figure

    filled = [row for row in bins if row["count"]]
    figure = Figure(figsize=(5, 6), layout="constrained")
    axes: Any = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    lows = [row["from"] for row in filled]
    wide = [row["to"] - row["from"] for row in filled]
    heights = [row["accuracy"] for row in filled]
    axes[0].bar(lows, heights, wide, align="edge", edgecolor="k", label="accuracy")
    confidences = [row["confidence"] for row in filled]
    axes[0].plot(confidences, heights, "r.", label="at the mean confidence")
    axes[0].plot([0, 1], [0, 1], "k--", linewidth=1)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="upper left")
    axes[1].bar(lows, [row["count"] for row in filled], wide, align="edge", edgecolor="k")
    axes[1].set_yscale("log")
    axes[1].set_ylabel("rows")
    axes[1].set_xlabel("confidence")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def contour_plot(
    path: Path,
    xs: Sequence[float],
    ys: Sequence[float],
    levels: Sequence[Sequence[float]],
    way: Sequence[Sequence[float]],
) -> None:
    """Write a map as a PNG file: `levels` (one row a y) as contours, and on it the points (x, y) of a way to (0, 0).

    The steps from contour to contour are equal factors where all levels are positive and far apart.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axis: Any = figure.subplots()
    low, high = min(map(min, levels)), max(map(max, levels))
    look: dict[str, Any] = {"levels": 25}
    if 0 < 20 * low < high:
        look = {"levels": [low * (high / low) ** (i / 25) for i in range(26)], "norm": LogNorm()}
    shown = axis.contourf(xs, ys, levels, cmap="viridis", **look)
    figure.colorbar(shown, label="loss", format="%.2g")
    axis.plot([x for x, _ in way], [y for _, y in way], "w.-", linewidth=1.5)
    axis.plot([0], [0], "r*", markersize=12)
    axis.set_xlabel("first direction of the way")
    axis.set_ylabel("second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def heat_maps(path: Path, maps: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> None:
    """Write matrices of values in [-1, 1] as a PNG file, four (title, matrix) a row."""
    from matplotlib.figure import Figure

    across = min(4, len(maps))
    down = -(-len(maps) // across)
    figure = Figure(figsize=(2.6 * across + 0.8, 2.7 * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, matrix) in zip(axes, maps, strict=False):
        shown = axis.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes.tolist(), shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def labelled_map(
    path: Path,
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    y_label: str,
    x_label: str,
) -> None:
    """Write a matrix of shares in [0, 1] as a PNG file, with a name for each row and column."""
    from matplotlib.figure import Figure

    size = (0.5 * len(columns) + 2.2, 0.4 * len(rows) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    axis: Any = figure.subplots()
    shown = axis.imshow(matrix, vmin=0, vmax=1, cmap="Greys", interpolation="nearest")
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    figure.colorbar(shown, label="weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
