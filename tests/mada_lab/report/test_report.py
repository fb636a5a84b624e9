"""The report as an HTML file, made from a small sweep, and the figures for papers beside it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from mada_lab.cli.main import main
from mada_lab.errors import InputError
from mada_lab.report.report_file import write_report
from mada_lab.report.stage_files import write_stage_files
from mada_lab.run.folder import RunFolder
from mada_lab.sweep.experiment_file import load
from mada_lab.sweep.run_stages import run_stages
from mada_lab.sweep.stage_folder import CONFIRM, TUNE

LABEL = 'mada <i> & "co"'
TINY = f"""
title = "Tiny <b>"
[base]
task = {{ kind = "language", layers = 1, heads = 2, width = 16, context = 16, batch = 4, val_windows = 8 }}
steps = 12
eval_every = 4
threads = 1
[axes]
"optimizer.lr" = [1e-3, 1e-2]
seed = [0, 1]
[confirm]
steps = 8
seeds = [0, 1, 2]
[contenders.adamw]
name = "adamw"
axes = {{ "optimizer.lr" = [1e-3, 1e-2, 1e37] }}
[contenders.'{LABEL}']
name = "mada"
options = {{ hyper_warmup = 2 }}
[contenders.omada]
name = "omada"
options = {{ ortho = 0.5 }}
[contenders.wild]
name = "adamw"
axes = {{ "optimizer.lr" = [1e37] }}
[contenders.starts]
name = "mada"
options = {{ hyper_warmup = 2 }}
axes = {{ "optimizer.lr" = [1e-2], "optimizer.betas" = [[0.1, 0.5], [0.1, 0.9], [0.9, 0.5], [0.9, 0.9]] }}
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "file.toml").write_text(TINY, "utf-8")
    stages = {stage: folder / "sweep" / stage for stage in (TUNE, CONFIRM)}
    ending = run_stages(load(folder / "file.toml"), stages, 2, lambda _: None)
    assert not ending.failed
    return folder / "sweep"


class Page(HTMLParser):
    """What a reader and a browser find in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.text = ""
        self.html = path.read_text("utf-8")
        self.keys: dict[str, list[str]] = {}
        self._waiting: list[str] = []
        self._captions: list[str] = []
        self._caption_of: dict[str, str] = {}
        self._inside: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "br"):
            self._inside.append(tag)
        name = dict(attributes).get("id", "")
        if re.fullmatch(r"s\d+-\d+(-\d+)?", name):
            block = "-".join(name.split("-")[:2])
            self.keys[block] = self.keys.get(block, []) + self._waiting
            self._caption_of[name] = "".join(self._captions[-1:])
            self._waiting = []
        if tag == "figcaption":
            self._captions.append("")
        if tag == "button":
            self._waiting.append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if "button" in self._inside:
            self._waiting[-1] += data
        if "figcaption" in self._inside:
            self._captions[-1] += data
        if "script" not in self._inside and "style" not in self._inside:
            self.text += data

    def figures(self) -> dict[str, dict[str, Any]]:
        """Data and layout of each, by the id of its element."""
        found = {}
        for call in re.finditer(r'Plotly\.newPlot\(\s*"(s\d+-\d+(?:-\d+)?)",\s*', self.html):
            data, end = json.JSONDecoder().raw_decode(self.html, call.end())
            layout, _ = json.JSONDecoder().raw_decode(self.html, self.html.index("{", end))
            found[call[1]] = {"data": data, "layout": layout}
        return found

    def captions(self) -> dict[str, list[str]]:
        """Titles of the small figures, by the name of their block."""
        blocks: dict[str, list[str]] = {}
        for name, caption in self._caption_of.items():
            blocks.setdefault("-".join(name.split("-")[:2]), []).append(caption)
        return blocks

    def figure(self, y: str) -> dict[str, Any]:
        """The first with this title of its y axis."""
        return next(figure for figure in self.figures().values() if _title(figure["layout"]["yaxis"]) == y)


def _title(axis: Mapping[str, Any]) -> str:
    return str(axis.get("title", {}).get("text", ""))


@pytest.fixture(scope="module")
def page(out: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([out], path)
    return Page(path)


@contextmanager
def without(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        path.write_bytes(content)


def traces(figure: Mapping[str, Any], **wanted: object) -> list[Any]:
    return [trace for trace in figure["data"] if all(trace.get(name) == value for name, value in wanted.items())]


# The file.


def test_tables_are_those_of_the_stages(out: Path, page: Page) -> None:
    assert page.tables == [
        table for stage in (TUNE, CONFIRM) for table in write_stage_files(out / stage).tables().values()
    ]
    assert len(page.tables) == 4 + 3
    assert any(row[0] == LABEL for row in page.tables[0])


def test_it_says_what_was_run(page: Page) -> None:
    assert page.text.count("Tiny <b>: tune") == 2  # in the contents and over the section
    assert page.text.count("† The best learning rate is at the edge of its grid") == 2
    for text in ("layers 1", "steps 12", "steps 8", "0, 1, 2", f"torch {torch.__version__}", "cores"):
        assert text in page.text


def test_diverged_runs_are_said(page: Page) -> None:
    assert "adamw: 2 of 2 runs at learning rate 1e+37 diverged: adamw-lr1e+37-seed0, adamw-lr1e+37-seed1" in page.text
    assert "Not shown, for at each learning rate a run diverged: wild." in page.text
    assert "wild: 3 of 3 runs are not there: what they build on diverged or is not over" in page.text
    assert "INCOMPLETE: 21 of 24 runs are over." in page.text


def test_missing_runs_are_said(out: Path, tmp_path: Path) -> None:
    with without(out / TUNE / "runs" / "omada-lr0.01-seed1" / "result.json"):
        write_report([out / TUNE], tmp_path / "report.html")
    text = Page(tmp_path / "report.html").text
    assert "omada: 1 of 4 runs are not over: omada-lr0.01-seed1" in text
    assert "runs23 of 24 are over" in text


def test_a_stage_that_has_just_begun(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / TUNE, tmp_path / TUNE)
    (tmp_path / CONFIRM).mkdir()
    shutil.copy(out / CONFIRM / "stage.json", tmp_path / CONFIRM)
    write_report([tmp_path], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "adamw: 3 of 3 runs are not over" in page.text
    assert len(page.tables) == 4


def test_labels_are_no_markup(page: Page) -> None:
    assert LABEL in page.text
    assert "<i>" not in page.html.split("</script>", 1)[1]
    names = {trace.get("name") for figure in page.figures().values() for trace in figure["data"]}
    assert escape(LABEL, quote=False) in names


def test_nothing_is_fetched(page: Page) -> None:
    assert {link for link in page.links if not link.startswith("#")} == {"data:,"}
    style = page.html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    options = re.findall(r'\{"responsive".+?\}', page.html)
    assert len(options) == len(page.figures())
    assert all(json.loads(each)["showSendToCloud"] is False for each in options)


def test_the_same_metrics_give_the_same_file(out: Path, page: Page, tmp_path: Path) -> None:
    write_report([out], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == page.html


def test_a_run_alone(out: Path, tmp_path: Path) -> None:
    folder = out / TUNE / "runs" / "omada-lr0.01-seed1"
    write_report([folder], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert (
        page.text.split("<title>")[0].count("omada, learning rate 0.01, seed 1") == 2
    )  # the page's title and its heading
    assert [table[0][0] for table in page.tables] == ["optimizer"] * 2
    assert all(cell != "-" for table in page.tables for row in table for cell in row)
    assert "interval" not in page.text
    assert "runs1 of 1 are over" in page.text
    training = traces(page.figure("loss"), name="training")[0]
    assert training["y"] == [line["loss"] for line in RunFolder(folder).metrics() if "loss" in line]
    with without(folder / "result.json"):
        write_report([folder], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "omada: the run is not over, it is at step 12" in page.text
    assert "runs0 of 1 are over" in page.text


def test_several_folders(out: Path, tmp_path: Path) -> None:
    write_report([out / CONFIRM, out / TUNE / "runs" / "adamw-lr0.01-seed1"], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.text.split("<h1>")[0].strip().startswith("2 experiments")
    assert len({name.split("-")[0] for name in page.figures()}) == 2


def test_experiments_together(out: Path, tmp_path: Path) -> None:
    write_report([out, out / TUNE, out / TUNE / "runs" / "adamw-lr0.01-seed1"], tmp_path / "all.html")
    page = Page(tmp_path / "all.html")
    header, reference, *rows = page.tables[0]
    assert header == ["optimizer", "Tiny <b>", "Tiny <b>", "lower", "higher"]
    for stage in (CONFIRM, TUNE):
        write_stage_files(out / stage)
    entries = [json.loads((out / stage / "results.json").read_text("utf-8"))["results"] for stage in (CONFIRM, TUNE)]
    losses = [next(entry for entry in each if entry["optimizer"] == "adamw") for each in entries]

    def mark(entry: Mapping[str, Any]) -> str:
        return "" if entry["best_lr_edge"] is None else " †"

    shown = [f"{each['val_loss']:.4f} ± {each['val_loss_ci95']:.4f}{mark(each)}" for each in losses]
    assert reference[1:] == [*shown, "-", "-"]
    assert [row[0] for row in rows] == [LABEL, "omada", "starts", "wild"]  # of which nothing is in the first
    for row in rows:
        cells = [next((entry for entry in each if entry["optimizer"] == row[0]), {}) for each in entries]
        sure = [(cell["difference"], cell["difference_ci95"]) for cell in cells if "difference" in cell]
        assert row[1:3] == [
            f"{cell['difference']:+.4f} ± {cell['difference_ci95']:.4f}{mark(cell)}" if "difference" in cell else "-"
            for cell in cells
        ]
        assert row[3] == f"{sum(mean + half < 0 for mean, half in sure)} of {len(sure)}"
        assert row[4] == f"{sum(mean - half > 0 for mean, half in sure)} of {len(sure)}"
    assert re.search(
        r"† The best learning rate is at the edge of its grid.* \([\d.]+, the \w+\) in Tiny <b>", page.text
    )
    assert rows[3][1:] == ["-", "-", "0 of 0", "0 of 0"]  # every run of it diverged


def test_another_reference(out: Path, tmp_path: Path) -> None:
    write_report([out / TUNE, out / CONFIRM], tmp_path / "all.html", "omada")
    page = Page(tmp_path / "all.html")
    assert page.tables[0][1][0] == "omada"
    assert "Difference to omada and to the best" in page.text
    with pytest.raises(InputError, match="reference must be one of 'adamw', .*, got 'sgd'"):
        write_report([out], tmp_path / "all.html", "sgd")


def test_as_markdown(out: Path, page: Page, tmp_path: Path) -> None:
    write_report([out], tmp_path / "all.md")
    lines = (tmp_path / "all.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]
    assert [row for row in rows if row[0] != "---"] == [row for table in page.tables for row in table]
    assert lines[0] == "# Tiny <b>"
    assert "## Tiny <b>: confirm" in lines
    assert "- wild: 3 of 3 runs are not there: what they build on diverged or is not over" in lines


def test_errors(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder must be that of a sweep, a stage or a run, .*, got '.*nowhere'"):
        write_report([out, tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "stage").mkdir()
    shutil.copy(out / CONFIRM / "stage.json", tmp_path / "stage")
    with pytest.raises(InputError, match=r"no run of .*stage is over yet"):
        write_report([tmp_path / "stage"], tmp_path / "report.html")
    (tmp_path / "run").mkdir()
    shutil.copy(out / TUNE / "runs" / "adamw-lr0.01-seed1" / "config.json", tmp_path / "run")
    with pytest.raises(InputError, match=r"the run of .*run has not begun"):
        write_report([tmp_path / "run"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(InputError, match=r"out must be a file that can be written, got .*: Is a directory"):
        write_report([out], tmp_path)


def test_command(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(out / TUNE)]) == 0
    assert capsys.readouterr().out == f"Written: {out / TUNE / 'report.html'}\n"
    assert main(["report", str(out), "--out", "all.html"]) == 0
    assert (tmp_path / "all.html").exists()
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["report", str(out)]) == 0
    assert (tmp_path / "report.html").exists()
    for module in ("report_file", "html_page"):
        monkeypatch.delitem(sys.modules, f"mada_lab.report.{module}")
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    assert main(["report", str(out)]) == 2
    assert capsys.readouterr().err == "mada: plotly.io is missing: pip install 'mada-optim[lab]'\n"


# Its figures.


def test_curves(out: Path, page: Page) -> None:
    lr = page.tables[0][1][1].removesuffix(" †")
    stored = [RunFolder(out / TUNE / "runs" / f"adamw-lr{lr}-seed{seed}").metrics() for seed in (0, 1)]
    values = [[line["val_loss"] for line in metrics if "val_loss" in line] for metrics in stored]
    figure = page.figure("validation loss")
    band, mean = traces(figure, name=f"adamw, lr {lr}")
    assert mean["x"] == [0, 4, 8, 12]
    assert mean["y"] == pytest.approx([statistics.fmean(pair) for pair in zip(*values, strict=True)])
    highs, lows = ([pick(pair) for pair in zip(*values, strict=True)] for pick in (max, min))
    assert band["y"] == pytest.approx(highs + lows[::-1])
    assert mean["legendgroup"] == band["legendgroup"]
    assert not traces(figure, legendgroup="3")  # the wild one has none


def test_finals(out: Path, page: Page) -> None:
    figure = page.figure("final validation loss")
    assert figure["layout"]["xaxis"]["type"] == "log"
    mean, points, crosses = traces(figure, name="adamw")
    results = [json.loads(path.read_text()) for path in sorted(out.glob(f"{TUNE}/runs/adamw-lr0.0*/result.json"))]
    assert sorted(points["y"]) == sorted(result["val_loss"] for result in results)
    assert points["x"].count(1e-3) == points["x"].count(1e-2) == 2
    assert mean["y"][2] is None
    assert crosses["x"] == [1e37, 1e37]
    assert crosses["yaxis"] == "y2"
    assert crosses["hovertext"][1] == "diverged, lr 1e+37, seed 1, β from 0.9, 0.99"


def test_finals_of_the_second_stage_are_over_contenders(page: Page) -> None:
    figure = page.figures()["s1-1"]
    assert "type" not in figure["layout"]["xaxis"]
    places = {trace["x"][0] for trace in figure["data"]}
    assert any(place.startswith(escape(LABEL, quote=False)) for place in places)


def test_contours_and_paths(page: Page) -> None:
    figures = page.figures()
    contour = traces(figures["s0-2-0"], type="contour")[0]
    assert len(contour["z"]) == 2
    assert [_title(figures[f"s0-{i}-0"]["layout"]["coloraxis"]["colorbar"]) for i in (2, 3)] == [
        "final training loss",
        "final validation loss",
    ]
    titles = page.captions()["s0-4"]
    assert set(titles) >= {"β1", "β3", "κ-matrices", "κ-rest"}
    together = [figures[f"s0-4-{i}"]["layout"] for i in range(len(titles))]
    logarithmic = {title for title, layout in zip(titles, together, strict=True) if "type" in layout["yaxis"]}
    assert logarithmic == {"κ-matrices", "κ-rest"}
    names = {trace["name"] for name, figure in figures.items() if name.startswith("s0-5-") for trace in figure["data"]}
    assert names == {f"β1 {one}, β2 {two}" for one in (0.1, 0.9) for two in (0.5, 0.9)}


def test_keys_and_titles_are_text_of_the_page(page: Page) -> None:
    """plotly cuts what is longer than its figure."""
    assert all(figure["layout"]["showlegend"] is False for figure in page.figures().values())
    assert not any("annotations" in figure["layout"] for figure in page.figures().values())
    assert f"{LABEL}, lr 0.01" in page.keys["s0-0"]
    assert set(page.keys["s0-5"]) == {f"β1 {one}, β2 {two}" for one in (0.1, 0.9) for two in (0.5, 0.9)}
    assert "starts, lr 0.01" in page.captions()["s0-2"]


def test_figures_for_papers(out: Path) -> None:
    write_stage_files(out / TUNE)
    assert {path.name for path in (out / TUNE).glob("coefficients.*")} == {"coefficients.png", "coefficients.svg"}
    svg = (out / TUNE / "coefficients.svg").read_text("utf-8")
    for text in ("κ-matrices", "κ-rest", "starts, lr 0.01", "β1 0.1, β2 0.5", escape(LABEL, quote=False)):
        assert text in svg


# In a browser.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 120  # only so that nothing hangs for ever
# How much wider than its window is the page; which texts are cut in a narrow one; what a click on a key hides.
MEASURE = """
<script>
{
  const all = (selector) => [...document.querySelectorAll(selector)];
  const found = document.body.dataset;
  found.wide = document.documentElement.scrollWidth - innerWidth;
  const box = document.querySelector("main");
  box.style.width = "372px";
  const right = box.getBoundingClientRect().right;
  const isCut = (element) =>
    element.getBoundingClientRect().right > right + 1 || element.scrollWidth > element.clientWidth + 1;
  found.cut = all(".keys button, .keys span, figcaption, h3").filter(isCut).length;
  const columns = (grid) => getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  found.columns = all(".small").map(columns);
  const plot = document.querySelector(".block .js-plotly-plot");
  const key = document.querySelector(".block .keys button");
  const press = (kind) => {
    key.dispatchEvent(new MouseEvent(kind, { bubbles: true }));
    return plot.data.map((trace) => Number(trace.visible !== false)).join("");
  };
  found.keys = [press("click"), press("click"), press("dblclick"), press("dblclick")];
}
</script></body>
"""


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document that a browser without a network makes of a file, and what it writes on its console."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1000,800"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=60000"]
    command = [CHROMIUM, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_in_a_browser(page: Page, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>missing()</script>")
    assert "missing is not defined" in browse(bad, tmp_path / "profile")[1][0]
    file = tmp_path / "report.html"
    file.write_text(page.html.replace("</body>\n</html>", f"{MEASURE}</html>"), "utf-8")
    document, console = browse(file, tmp_path / "profile")
    assert console == []
    drawn = re.findall(r'id="(s\d+-\d+(?:-\d+)?)".*?<svg class="main-svg"', document, re.DOTALL)
    assert drawn == list(page.figures())

    def measured(name: str) -> str:
        (value,) = re.findall(rf'data-{name}="([^"]*)"', document)
        return str(value)

    assert int(measured("wide")) <= 0
    assert measured("cut") == "0"
    assert set(measured("columns").split(",")) == {"1"}
    groups = [trace["legendgroup"] for trace in page.figures()["s0-0"]["data"]]
    hidden = "".join(str(int(group != groups[0])) for group in groups)
    alone = "".join(str(int(group == groups[0])) for group in groups)
    everything = "1" * len(groups)
    assert measured("keys").split(",") == [hidden, everything, alone, everything]
    _, *parts = re.split(r'id="(s\d+-\d+(?:-\d+)?)"', document)
    by_figure = dict(zip(parts[::2], parts[1::2], strict=True))
    of_scale = f"s0-4-{page.captions()['s0-4'].index('κ-rest')}"
    ticks = re.findall(r'class="ytick"><text[^>]*>([^<]+)</text>', by_figure[of_scale])
    assert len(ticks) > 1
    low, high = page.figures()[of_scale]["layout"]["yaxis"]["range"]
    assert all(10**low <= float(text) <= 10**high for text in ticks)  # 0.2, where plotly by itself writes 2
