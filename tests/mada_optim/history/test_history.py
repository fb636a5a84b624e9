"""The recorder of what an optimizer becomes, and how optimizers show themselves in notebooks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import IDS, TABLE, Net, Row, loss_of, train

from mada_optim import MADA, OMADA, History, LearnedScale, MADAFamily
from mada_optim.history import readings


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_each_row_is_the_optimizer_after_its_step(row: Row):
    model = Net()
    optimizer = row(model.parameters(), lr=0.01)
    history = History(optimizer)
    seen = []
    for step in range(6):
        train(model, optimizer, 1, first=step)
        seen.append({"step": step + 1, **optimizer.coefficients(), "lr": 0.01})
    assert history.rows() == seen
    assert history.to_dict() == {name: [each[name] for each in seen] for name in seen[0]}


def test_the_training_is_the_same_with_and_without_a_history():
    ends = []
    for recorded in (False, True):
        model = Net()
        optimizer = MADA(model.parameters(), lr=0.01, hyper_warmup=2)
        history = History(optimizer) if recorded else None
        train(model, optimizer, 5)
        ends.append((model.state_dict(), optimizer.state_dict()["state"], optimizer.coefficients()))
        assert history is None or len(history) == 5
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_learned_scales_and_the_rates_in_use_of_each_kind():
    model = Net()
    optimizer = OMADA(model, lr=5.0)
    history = History(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - 0.1 * step)
    used = []
    for step in range(5):
        train(model, optimizer, 1, first=step)
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        schedule.step()
    columns = history.to_dict()
    assert list(zip(columns["lr_matrices"], columns["lr_rest"], strict=True)) == [tuple(rates) for rates in used]
    assert columns["scale_matrices"][-1] == pytest.approx(columns["lr_matrices"][-1] / 0.6, rel=0.2)
    assert not {"lr", "lr_0"} & columns.keys()


@pytest.mark.parametrize("first", ["history", "scale"])
def test_an_optimizer_of_torch_with_a_learned_scale_made_before_or_after(first: str):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    makers = {"history": lambda: History(optimizer), "scale": lambda: LearnedScale(optimizer)}
    made = {name: makers[name]() for name in (first, *(name for name in makers if name != first))}
    used = []
    for step in range(3):
        train(model, optimizer, 1, first=step)
        used.append(float(optimizer.param_groups[0]["lr"]))
    assert made["history"].to_dict()["lr"] == used
    assert made["history"].to_dict()["scale_all"][-1] == made["scale"].value


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_in_use_where_the_parameter_group_shows_another(lr: Any, dtype: torch.dtype):
    """A tensor stays what was given; steps of low precision are taken at a rate that makes them visible."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=lr, foreach=False)
    history = History(optimizer)
    scale = LearnedScale(optimizer)
    for step in range(4):
        weight.grad = torch.full_like(weight, 1.0 + step)
        optimizer.step()
    columns = history.to_dict()
    assert columns["lr"] == pytest.approx(columns["scale_all"])
    assert 0 < columns["lr"][-1] == pytest.approx(scale.value)


def test_parameter_groups_without_kinds_have_a_rate_each_and_coefficients_of_their_own():
    params = list(Net().parameters())
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": torch.tensor(0.5), "start": {"rho": 0.5}}]
    optimizer = MADA(groups, hyper_per_group=True)
    history = History(SimpleNamespace(optimizer=optimizer))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    (row,) = history.rows()
    assert (row["lr_0"], row["lr_1"], row["0/rho"], row["1/rho"]) == (0.1, 0.5, 1.0, 0.5)


def test_any_number_of_steps_fits():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    history = History(optimizer, every=3, limit=10)
    weight.grad = torch.ones(1)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = step + 1.0
        optimizer.step()
        assert len(history) <= 10
        if step == 500:
            history.rows()  # reading in between changes nothing
    columns = history.to_dict()
    assert history.steps == 1000
    assert columns["step"] == columns["lr"] == list(range(96, 1000, 96))


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"limit": 1}, {"limit": True}])
def test_arguments_are_checked(options: dict[str, Any]):
    with pytest.raises(ValueError, match="must be a whole number of at least"):
        History(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), **options)


def test_something_else_is_no_optimizer():
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Linear"):
        History(torch.nn.Linear(1, 1))


def test_a_step_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch):
    """Numbers that the device has stay tensors until somebody looks; those of a schedule are copied."""
    model = Net()
    optimizer = MADA(model.parameters(), lr=torch.tensor(0.1), hyper_warmup=0)
    history = History(optimizer)
    train(model, optimizer, 2)
    reads = []
    for name in ("item", "tolist", "__float__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, _n=name, _r=real, **k: (reads.append(_n), _r(*a, **k))[1])
    history._record(optimizer, (), {})
    assert repr(history) == "History(MADA, 3 steps, 3 rows, every=1, limit=2000)"
    assert reads == []
    optimizer.param_groups[0]["lr"].fill_(9.0)
    assert history.rows()[-1]["lr"] == pytest.approx(0.1)
    assert reads


def test_a_history_goes_on_after_a_resume():
    model = Net()
    optimizer = MADA(model.parameters(), lr=0.01, hyper_warmup=2)
    history = History(optimizer, every=2)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), history.state_dict()], file)
    train(model, optimizer, 5, first=5)
    whole = history.rows()
    file.seek(0)
    model = Net(seed=1)
    optimizer = MADA(model.parameters(), lr=0.01, hyper_warmup=2)
    history = History(optimizer)
    for part, state in zip((model, optimizer, history), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(model, optimizer, 5, first=5)
    assert history.rows() == whole
    assert [row["step"] for row in whole] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("make", [OMADA, lambda model: torch.optim.AdamW(model.parameters())])
def test_copies_and_pickles(make: Any, copied: Any):
    model = Net()
    optimizer = make(model)
    history = History(optimizer)
    train(model, optimizer, 3)
    other, (other_history, _) = copied(optimizer), copied((history, optimizer))
    assert other_history.rows() == history.rows()
    for each in (optimizer, other):
        each.step()
    assert (len(history), len(other_history)) == (4, 3)
    other_history.stop()


def test_a_pickled_history_holds_rows_alone():
    optimizer = OMADA(Net())
    history = History(optimizer)
    assert b"LearnedScale" not in pickle.dumps(history)


def test_stop():
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)
    train(model, optimizer, 2)
    history.stop()
    history.stop()
    train(model, optimizer, 2)
    assert len(history) == history.steps == 2


def test_the_history_keeps_no_optimizer_and_no_model_alive():
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)
    train(model, optimizer, 1)
    kept = weakref.ref(model.hidden.weight)
    del model, optimizer
    gc.collect()
    assert kept() is None
    assert len(history.rows()) == 1


# The picture.


def drawn(optimizer_class: Any, **options: Any) -> list[Any]:
    pytest.importorskip("matplotlib")
    model = Net()
    optimizer = optimizer_class(model.parameters(), **options)
    history = History(optimizer)
    train(model, optimizer, 8)
    return _plot(history)


def _plot(history: History) -> list[Any]:
    file = io.BytesIO()
    axes = history.plot(file)  # type: ignore[arg-type]
    assert file.getvalue().startswith(b"\x89PNG")
    return axes


def test_the_picture_of_coefficients_and_rates():
    top, below = drawn(MADA, lr=0.01, hyper_warmup=0)
    assert top.get_title(loc="left") == "What MADA became"
    assert (top.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("coefficient", "learning rate in use", "step")
    assert {text.get_text().split("  ")[0] for text in top.texts} == {each.label for each in MADAFamily.coefficients}
    assert len(top.lines) == len(MADAFamily.coefficients)
    assert below.get_yscale() == "log"


def test_the_picture_of_an_optimizer_that_has_no_coefficients():
    (axes,) = drawn(torch.optim.AdamW, lr=0.01)
    assert [text.get_text() for text in axes.texts] == ["lr  max 0.01"]


def test_a_rate_of_zero_is_left_out_of_a_logarithmic_axis():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    history = History(optimizer)
    weight.grad = torch.ones(1)
    for rate in (1.0, 0.1, 0.0):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    (axes,) = _plot(history)
    assert list(axes.lines[0].get_xdata()) == [1, 2]


def test_the_picture_is_pyplots_without_a_file(monkeypatch: pytest.MonkeyPatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)
    with pytest.raises(ValueError, match="no step has been recorded yet"):
        history.plot()
    train(model, optimizer, 2)
    axes = history.plot()
    assert pyplot.fignum_exists(axes[0].figure.number)
    pyplot.close(axes[0].figure)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)
    train(model, optimizer, 1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mada-optim\[plot\]'"):
        history.plot()


def test_the_library_imports_no_extra():
    code = "import sys, mada_optim; print([n for n in sys.argv[1:] if n in sys.modules])"
    command = [sys.executable, "-c", code, "matplotlib", "rich", "IPython", "mada_lab"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"


# In notebooks.


class Cells(HTMLParser):
    """Tags that are open, and the texts of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_optimizers_in_notebooks(row: Row):
    model = Net()
    optimizer = row(model.parameters(), lr=0.25)
    train(model, optimizer, 2)
    cells = Cells(optimizer._repr_html_()).cells
    for name, value in optimizer.coefficients().items():
        (place,) = [index for index, cell in enumerate(cells) if cell.split(" ")[-1] == name]
        assert cells[place + 1] == f"{value:g}"
        learned = optimizer.param_groups[0]["hyper_lr"][name]
        assert cells[place + 2] == (f"learned, hyper_lr {learned:g}" if learned else "fixed")
    assert cells[-2:] == ["lr", "0.25"]


def test_scales_and_histories_in_notebooks():
    model = Net()
    optimizer = OMADA(model, lr=9.0)
    history = History(optimizer)
    assert "OMADA, 0 steps, 0 rows" in history._repr_html_()
    train(model, optimizer, 2)
    cells = Cells(optimizer._repr_html_()).cells
    assert "so far, after 2 steps" in cells
    assert cells[-4::2] == ["matrices", "rest"]
    optimizer.scale.hold()
    found = Cells(optimizer.scale._repr_html_()).cells
    values = {str(kind): f"{value:.3g}" for kind, value in optimizer.scale.values.items()}
    assert found[:2] == ["learning rate", "found in 2 steps"]
    assert dict(zip(found[2::2], found[3::2], strict=True)) == values
    assert Cells(history._repr_html_()).cells[:3] == ["", "step 1", "step 2"]


def test_a_schedules_first_rate_is_printed_as_it_was_given():
    optimizer = OMADA(Net(), lr=0.25)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    assert repr(optimizer).count("    initial_lr: 0.25\n    lr: 0.25\n") == 2


def test_what_an_optimizer_without_a_learning_rate_says():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = None  # as in Adafactor of transformers
    assert readings.learning_rates(optimizer) == {}


def test_a_closure():
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(history) == 1


def test_a_picture_in_a_file(tmp_path: Path):
    pytest.importorskip("matplotlib")
    model = Net()
    optimizer = MADA(model.parameters())
    history = History(optimizer)
    train(model, optimizer, 2)
    history.plot(tmp_path / "became.svg")
    assert "What MADA became" in (tmp_path / "became.svg").read_text("utf-8")
