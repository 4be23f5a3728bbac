"""Reports and charts: the figures are the rows', names are text and not markup, nothing is fetched."""

from __future__ import annotations

import base64
import math
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dist_train.components import CATALOGUE
from dist_train.errors import UserError
from dist_train.pictures import charts, png
from dist_train.pictures.charts import Line, line_chart
from dist_train.report import RunRecord, verdict, write_report
from dist_train.run_directory import RunDirectory

RECIPE = """
name: {name}
evaluate: {{best: accuracy, mode: max}}
callbacks: {{ema: {{decay: 0.999}}}}
hub: {{token: hunter2}}
"""


def make_run(
    root: Path, name: str = "resnet", rows: int = 40, loss=lambda t: math.exp(-4 * t)
) -> RunDirectory:
    directory = RunDirectory.create_at(root / name)
    directory.write_recipe(RECIPE.format(name=f'"{name}"'))
    for number in range(1, rows + 1):
        t = number / rows
        row = {"step": 10 * number, "epoch": number / 8, "seconds": number / 2, "loss": loss(t)}
        row |= {"learning_rate": 0.1, "samples_per_second": 5000.0, "data_wait": 0.01}
        if number % 10 == 0:
            row |= {"evaluate/accuracy": 0.9 + 0.05 * t, "evaluate/loss": 0.5 - 0.1 * t}
        directory.append_row(row)
    return directory


def sentences(directory: RunDirectory) -> str:
    return " ".join(verdict(RunRecord.read(directory.path)))


class Page(HTMLParser):
    """What a page holds: its text, its addresses, whether its tags are balanced."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_report_holds_the_final_figures(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    folder = directory.checkpoints / "step-00000400"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(2048))
    path = write_report([directory.path])
    assert path == directory.path / "report.html"
    page = Page(path.read_text())
    assert "0.95 (best 0.95 at 400)" in page.text
    assert "Evaluation accuracy: best 0.95 at step 400 (the last evaluation)." in page.text
    assert "callbacks.ema.decay 0.999" in page.text
    assert "hunter2" not in path.read_text()
    assert "400 2.0 KiB checkpoints/step-00000400" in page.text
    assert page.text.count("Learning rate") == 1


LARGER_IS_BETTER = {
    *("accuracy", "top_2", "top_5", "r2", "elbo", "importance_bound"),
    *("covered_modes", "label_agreement", "bleu"),
}


@pytest.mark.parametrize("metric", CATALOGUE["metric"])
def test_the_best_of_every_metric(tmp_path: Path, metric: str) -> None:
    directory = RunDirectory.create_at(tmp_path / "run")
    directory.write_recipe("name: tiny")
    for step, value in ((1, 0.5), (2, 0.25), (3, 0.75), (4, 0.5)):
        directory.append_row({"step": step, f"evaluate/test/{metric}": value})
    best = "0.75 at step 3" if metric in LARGER_IS_BETTER else "0.25 at step 2"
    said = "0.5 at step 4" if metric == "kl" else f"best {best}; it ended at 0.5"
    assert sentences(directory) == f"Evaluation test/{metric}: {said}."


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    png.save_grid(directory.samples / "grid.png", np.zeros((4, 1, 8, 8)))
    directory.append_row(
        {"step": 410, "images": {"grid": "samples/grid.png", "out": "../../etc/passwd"}}
    )
    html = write_report([directory.path]).read_text()
    page = Page(html)
    pictures = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert len(pictures) == 1
    assert (
        base64.b64decode(pictures[0].partition(",")[2])
        == (directory.samples / "grid.png").read_bytes()
    )
    assert all(link.startswith(("data:", "checkpoints/")) for link in page.links)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert "url(" not in html and "@import" not in html


def test_the_newest_plot_of_each_kind_is_shown(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    for number, name in enumerate(("scale-00000000", "scale-00000200", "landscape")):
        png.save_grid(directory.plots / f"{name}.png", np.full((1, 1, 4, 4), number / 2))
    page = Page(write_report([directory.path]).read_text())
    shown = [base64.b64decode(link.partition(",")[2]) for link in page.links if "base64" in link]
    wanted = [directory.plots / f"{name}.png" for name in ("landscape", "scale-00000200")]
    assert shown == [file.read_bytes() for file in wanted]


def test_ranks_of_all_matrices_share_a_chart(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    for step in (500, 510):
        directory.append_row({"step": step, "effective_rank/a": 3.0, "effective_rank/b": 2.0})
    page = Page(write_report([directory.path]).read_text())
    assert page.text.count("Effective rank") == 1
    assert "effective rank a" in page.text and "effective rank b" in page.text


def test_names_are_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    directory = RunDirectory.create_at(tmp_path / "run")
    directory.write_recipe(f"name: '{evil}'\n")
    directory.append_row({"step": 1, f"{evil}/loss": 1.0, "evaluate/\"'&<b>": 2.0})
    other = make_run(tmp_path, "a<b>&c")
    for runs in ([directory.path], [directory.path, other.path]):
        page = Page(write_report(runs, tmp_path / "out.html").read_text())
        assert not page.tags & {"script", "b"}
        assert evil.replace("/", " ") in page.text


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name) for name in ("first", "second")]
    page = Page(
        write_report([run.path for run in runs], tmp_path / "both" / "report.html").read_text()
    )
    assert "2 runs" in page.text
    assert "first evaluate loss" in page.text and "second evaluate loss" in page.text


def test_what_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one"):
        write_report([])
    with pytest.raises(UserError, match="not a run directory"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="nothing to report"):
        write_report([make_run(tmp_path, rows=0).path])


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda t: 2 - t, "from 1.962 to 1.012 and is still falling at the end. A longer run"),
        (lambda t: max(1.0, 2 - 4 * t), "and is flat over the last quarter."),
        (lambda t: 1 + t, "and is rising over the last quarter."),
        (lambda t: 1 / t if t < 0.5 else math.nan, "diverged: it was nan at step 200."),
    ],
)
def test_verdicts_on_a_loss(tmp_path: Path, loss, says: str) -> None:
    assert says in sentences(make_run(tmp_path, loss=loss))


def test_verdict_on_over_fitting(tmp_path: Path) -> None:
    directory = RunDirectory.create_at(tmp_path / "run")
    directory.write_recipe("name: x\n")
    for step in range(1, 101):
        row = {"step": step, "loss": 1 - step / 200, "data_wait": 0.4}
        directory.append_row(
            row | ({"evaluate/loss": 1 + (step - 40) ** 2 / 1e4} if step % 20 == 0 else {})
        )
    said = sentences(directory)
    assert "Over-fitting since step 40: the evaluation loss rose from 1 to 1.36" in said
    assert "longer run" not in said
    assert "40% of the time went into waiting for data." in said


def test_opposed_players_need_not_fall(tmp_path: Path) -> None:
    directory = RunDirectory.create_at(tmp_path / "run")
    directory.write_recipe("name: x\n")
    for step in range(1, 21):
        directory.append_row({"step": step, "critic/loss": step / 9, "generator/loss": -step / 9})
    said = sentences(directory)
    assert "The critic loss went from" in said and "judge by the samples" in said


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.13, 2.3, [0, 0.5, 1, 1.5, 2, 2.5]),
        (-5, 5, [-6, -4, -2, 0, 2, 4, 6]),
        (7, 7, [2, 4, 6, 8, 10, 12]),
        (1e-9, 5e-9, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_a_line_is_where_its_points_are() -> None:
    svg = line_chart([Line("a", [(0, 0.0), (50, 1.0), (100, 0.5)])])
    root = ElementTree.fromstring(svg)
    (path,) = [
        p for p in root.iter("{http://www.w3.org/2000/svg}path") if "line" in p.get("class", "")
    ]
    numbers = [float(n) for n in re.findall(r"[-\d.]+", path.get("d", ""))]
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    assert numbers == [
        charts.LEFT,
        bottom,
        middle,
        top,
        charts.WIDTH - charts.RIGHT,
        (bottom + top) / 2,
    ]


@pytest.mark.parametrize("points", [[(0, 0.0)], [(1, -3.0), (2, -3.0)], [(1, 1e-12), (2, 1e12)]])
def test_charts_of_odd_data_are_well_formed(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(line_chart([Line("<&>", points)]))
    assert "nan" not in line_chart([Line("a", points)])


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(i), math.sin(i / 100)) for i in range(50_000)]
    points[31_234] = (31_234.0, 99.0)
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS and thin == sorted(thin)
    assert thin[0] == points[0] and thin[-1] == points[-1] and (31_234.0, 99.0) in thin


def decode(data: bytes) -> np.ndarray:
    """A PNG as our writer makes them: one IDAT, filter 0."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, _, colour = struct.unpack(">IIBB", data[16:26])
    length = struct.unpack(">I", data[33:37])[0]
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + length]), dtype=np.uint8).reshape(
        height, -1
    )
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape((height, width) if colour == 0 else (height, width, -1))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_holds_the_pixels(tmp_path: Path, channels: int) -> None:
    images = np.random.default_rng(0).random((5, channels, 3, 4))
    png.save_grid(tmp_path / "deep" / "grid.png", images)
    canvas = decode((tmp_path / "deep" / "grid.png").read_bytes())
    assert canvas.shape[:2] == (2 * 5 - 2, 3 * 6 - 2)
    second_row = canvas[5:8, 6:10].reshape(3, 4, channels)
    assert np.array_equal(second_row, np.rint(images[4].transpose(1, 2, 0) * 255).astype(np.uint8))
    pytest.importorskip("PIL")
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "grid.png")), canvas)


def test_png_takes_tensors_and_refuses_other_shapes(tmp_path: Path) -> None:
    import torch

    png.save_grid(tmp_path / "a.png", torch.full((1, 1, 2, 2), 2.0, requires_grad=True))
    assert (decode((tmp_path / "a.png").read_bytes()) == 255).all()
    for shape in ((1, 2, 2, 2), (0, 1, 2, 2), (2, 2)):
        with pytest.raises(ValueError, match="expected"):
            png.grid(np.zeros(shape))
