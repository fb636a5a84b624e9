"""Which paths of the coefficients stand together in figures."""

from __future__ import annotations

from pathlib import Path

from tiny import stored_run as run
from tiny import tiny_config

from mada_lab.report.coefficient_panels import panels
from mada_lab.report.stage_figures import draw_coefficients
from mada_lab.run.train import train
from mada_lab.sweep.contender_runs import ContenderRuns

ADAM = {"beta1": 0.9, "rho": 1.0}


def path(steps: int = 3, **changes: float) -> list[dict[str, float]]:
    """From Adam's point, or with other coefficients; ρ sinks."""
    start = {**ADAM, **changes}
    return [{**start, "rho": start["rho"] - 0.001 * step} for step in range(steps)]


def test_contenders_that_learn_stand_together() -> None:
    learning = [ContenderRuns(label, [run(0, path()), run(1, path())]) for label in ("a", "b")]
    still = ContenderRuns("still", [run(0, [ADAM] * 3)])
    none = ContenderRuns("none", [run(0)])
    (panel,) = panels([learning[0], still, none, learning[1]])
    assert panel.title == ""
    assert panel.groups == {0: "a, lr 0.1", 3: "b, lr 0.1"}
    assert len(panel.lines) == 4
    assert panel.moving == ["rho"]
    assert panel.fixed == "β1 = 0.9"
    assert panel.lines[0].points["rho"] == [(1, 1.0), (2, 0.999), (3, 0.998)]
    assert panels([still, none]) == []


def test_only_the_shown_learning_rate() -> None:
    runs = [run(0, path(), lr=lr, val=val) for lr, val in ((0.1, 1.0), (0.2, 0.5), (0.3, None))]
    assert [line.run for line in panels([ContenderRuns("a", runs)])[0].lines] == ["lr0.2-seed0"]
    # Where each has a diverged run, it is shown nevertheless, and said so.
    (line,) = panels([ContenderRuns("a", [run(0, path(), val=None)])])[0].lines
    assert line.diverged


def test_one_contender_is_coloured_by_seed() -> None:
    (panel,) = panels([ContenderRuns("a", [run(0, path()), run(1, path())])])
    assert (panel.title, panel.groups) == ("a, lr 0.1", {0: "seed 0", 1: "seed 1"})
    again = [run(0, path()), run(0, path())]
    assert list(panels([ContenderRuns("a", again)])[0].groups.values()) == ["lr0.1-seed0"] * 2


def test_a_contender_with_several_starts_is_coloured_by_them() -> None:
    runs = [run(seed, path(beta1=beta1), betas=(beta1, 0.9)) for beta1 in (0.5, 0.1) for seed in (0, 1)]
    together, alone = panels([ContenderRuns("starts", runs), ContenderRuns("a", [run(0, path())])])
    assert together.title == "a, lr 0.1"
    assert alone.ordered
    assert alone.groups == {0: "β1 0.1", 1: "β1 0.5"}
    assert len(alone.lines) == 4
    assert alone.fixed == "β1 = 0.1 or 0.5"


def test_many_contenders_and_long_runs() -> None:
    all_panels = panels([ContenderRuns(f"c{i}", [run(0, path(1001))]) for i in range(9)])
    assert [len(panel.groups) for panel in all_panels] == [7, 2]
    points = all_panels[0].lines[0].points["rho"]
    assert len(points) <= 201
    assert (points[0][0], points[-1][0]) == (1, 1001)


def test_a_figure_with_a_coefficient_that_only_some_have(tmp_path: Path) -> None:
    more = ContenderRuns("more", [run(0, [{**point, "scale": 0.1 * (i + 1)} for i, point in enumerate(path())])])
    starts = ContenderRuns("starts", [run(0, path(beta1=beta1), val=None) for beta1 in (0.1, 0.5)])
    found = panels([ContenderRuns("a", [run(0, path())]), more, starts])
    assert found[0].moving == ["rho", "scale"]
    draw_coefficients(found, tmp_path / "coefficients", "A title")
    assert (tmp_path / "coefficients.png").exists()
    svg = (tmp_path / "coefficients.svg").read_text("utf-8")
    for text in ("A title", "ρ", "κ", "a, lr 0.1", "more, lr 0.1", "starts, lr 0.1", "β1 0.5"):
        assert f">{text}</text>" in svg
    assert ">β2<" not in svg


def test_the_figure_of_a_run_with_omada(tmp_path: Path) -> None:
    train(tiny_config("omada", steps=10), tmp_path / "run")
    svg = (tmp_path / "run" / "figure.svg").read_text("utf-8")
    assert all(f">{text}  " in svg for text in ("κ-matrices", "κ-rest"))
