"""Plots as PNG files: the only file that knows matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.errors import UserError


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
    mark: tuple[float, str] | None = None,
) -> None:
    """Write curves as a PNG file, one panel under the other.

    Args:
        panels: (label of the y axis, {curve: (xs, ys)}) of each.
        mark: a place on the x axis and what it is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(panels) + 0.4), layout="constrained")
    axes: Any = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (y_label, curves) in zip(axes, panels, strict=True):
        for name, (xs, ys) in curves.items():
            axis.plot(xs, ys, label=name, linewidth=1.5, marker="." if len(xs) <= 60 else None)
        if log_x:
            axis.set_xscale("log")
        if log_y and any(y > 0 for _, ys in curves.values() for y in ys):
            axis.set_yscale("log")
        if mark is not None:
            axis.axvline(mark[0], color="black", linestyle="--", linewidth=1, label=mark[1])
        if len(curves) > 1 or mark is not None:
            axis.legend()
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(x_label)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def contour_plot(
    path: Path,
    xs: Sequence[float],
    ys: Sequence[float],
    levels: Sequence[Sequence[float]],
    way: Sequence[Sequence[float]],
) -> None:
    """Write a map as a PNG file: `levels` (one row a y) as contours, and on it the points (x, y) of a way to (0, 0)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axis: Any = figure.subplots()
    shown = axis.contourf(xs, ys, levels, levels=25, cmap="viridis")
    figure.colorbar(shown, label="loss")
    axis.plot([x for x, _ in way], [y for _, y in way], "w.-", linewidth=1.5)
    axis.plot([0], [0], "r*", markersize=12)
    axis.set_xlabel("first direction of the way")
    axis.set_ylabel("second")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
