"""``native.cpp`` repeats MADA's and OMADA's update. It computes what they say, or is not used."""

from __future__ import annotations

import inspect
import random
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from mada_optim import MADA, Coefficient, HypergradientOptimizer, MADAFamily, OMADAFamily
from mada_optim.families import mada as family
from mada_optim.kernels import select
from mada_optim.kernels.eager import EagerExecutor
from mada_optim.kernels.native import agreement, library
from mada_optim.kernels.native.executor import NativeExecutor
from mada_optim.kernels.traced.compiled import CompiledExecutor

COEFFICIENTS = [coefficient.name for coefficient in OMADAFamily.coefficients]


def test_native_kernels_are_up_to_date():
    """Fails where an update was changed in one of the two places alone."""
    assert agreement.definition() == library.implemented(), (
        "A method of MADAFamily or OMADAFamily that native.cpp repeats has changed, or a name. Change native.cpp, "
        f"write {agreement.definition()} into mada_implements() there, and run these tests: they compare the two."
    )


# ---- Each coefficient and constant counts, and counts as much as in the general path.


@dataclass
class Result:
    """What some steps did to a matrix and a vector."""

    params: list[torch.Tensor]
    hypergradients: dict[str, float]


def result(start: dict[str, float], learned: bool, fused: bool | None, **constants) -> Result:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(3, 4), (5,)]]
    optimizer = HypergradientOptimizer(
        [{"params": params[:1], "matrices": True}, {"params": params[1:]}],
        OMADAFamily(),
        lr=0.1,
        weight_decay=0.1,
        start=start,
        hyper_lr=1e-13 if learned else 0.0,
        hyper_warmup=0,
        fused=fused,
        **constants,
    )
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return Result([param.detach() for param in params], optimizer.hypergradients() or {})


def draw(seed: int) -> dict[str, float]:
    """Coefficients inside their boxes."""
    boxes = {coefficient.name: coefficient.box for coefficient in OMADAFamily.coefficients}
    choose = random.Random(seed)
    return {name: choose.uniform(low + 0.05 * (high - low), high) for name, (low, high) in boxes.items()}


def assert_counts_alike(before: Result, ours: Result, theirs: Result) -> None:
    assert any(float((new - old).abs().max()) > 1e-7 for new, old in zip(ours.params, before.params, strict=True))
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-9, atol=1e-11)
    assert ours.hypergradients == pytest.approx(theirs.hypergradients, rel=1e-7)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "frozen"])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_coefficient_counts(name, seed, learned):
    start = draw(0)
    changed = start | {name: draw(seed)[name]}
    ours, theirs = (result(changed, learned, fused) for fused in (None, False))
    assert_counts_alike(result(start, learned, None), ours, theirs)
    if learned:
        assert ours.hypergradients[name] != 0.0


@pytest.mark.parametrize("name", [name for name in OMADAFamily.constants if name != "matrices"])
def test_each_constant_counts(name):
    values = {"eps": 0.3, "lion_betas": (0.4, 0.7), "ortho_momentum": 0.5, "row_beta": 0.5, "split": 3}
    values |= {"ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "adjust_lr_fn": "original"}
    changed = {name: values[name]}
    ours, theirs = (result(draw(0), True, fused, **changed) for fused in (None, False))
    assert_counts_alike(result(draw(0), True, None), ours, theirs)


# ---- Families that were edited.


BOOST = Coefficient("boost", 1.5, (0.5, 3.0), 0.1)


def boosted(self, state, grad, q, step, update=MADAFamily.update):
    direction, new = update(self, state, grad, q, step)
    return q.get("boost", 2.0) * direction, new


def add_coefficient(monkeypatch) -> None:
    """As issues describe it: a coefficient of MADA's family, and a branch in its update."""
    monkeypatch.setattr(MADAFamily, "coefficients", (*MADAFamily.coefficients, BOOST))
    monkeypatch.setattr(MADAFamily, "update", boosted)


def change_update(monkeypatch) -> None:
    monkeypatch.setattr(MADAFamily, "update", boosted)


def change_helper(monkeypatch) -> None:
    monkeypatch.setattr(MADAFamily, "_long_term", lambda self, mean, v, t: mean + 0.5 * (v - mean))


def change_function(monkeypatch) -> None:
    def cut(grad):
        return grad.clamp(-0.1, 0.1)

    cut.__module__ = family.__name__
    monkeypatch.setattr(family, "cut", cut)


def add_buffer(monkeypatch) -> None:
    buffers = MADAFamily.buffers
    monkeypatch.setattr(MADAFamily, "buffers", lambda self, q: (*buffers(self, q), "another"))


def add_constant(monkeypatch) -> None:
    monkeypatch.setattr(MADAFamily, "constants", {**MADAFamily.constants, "another": 1.0})


def change_where_it_is_frozen(monkeypatch) -> None:
    for kind in (MADAFamily, OMADAFamily):
        changed = [replace(one, frozen_at=(0.0, 1.0)) if one.name == "c" else one for one in kind.coefficients]
        monkeypatch.setattr(kind, "coefficients", tuple(changed))


EDITS = [
    add_coefficient,
    change_update,
    change_helper,
    change_function,
    change_where_it_is_frozen,
    add_buffer,
    add_constant,
]


@pytest.fixture(autouse=True)
def _fresh():
    agreement.why_outdated.cache_clear()
    yield
    agreement.why_outdated.cache_clear()


def trained(fused: bool | None) -> tuple[torch.Tensor, dict[str, float]]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6))
    optimizer = MADA([param], lr=0.1, rho=0.5, hyper_warmup=0, fused=fused)
    for _ in range(4):
        param.grad = torch.randn(6)
        optimizer.step()
    return param.detach(), optimizer.coefficients()


@pytest.mark.parametrize("edit", EDITS)
def test_of_an_edited_family_the_general_path_is_taken(edit, monkeypatch):
    edit(monkeypatch)
    with pytest.warns(UserWarning, match="native.cpp does not implement MADAFamily.*CONTRIBUTING.md") as caught:
        ours = trained(None)
    assert [warning.filename for warning in caught] == [__file__]
    theirs = trained(False)
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_without_a_warning_outside_of_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(agreement, "_CHECKOUT", tmp_path)
    change_update(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(trained(None)[0], trained(False)[0])


def test_kernels_of_an_edited_family(monkeypatch):
    group = dict(MADA([nn.Parameter(torch.ones(1))]).param_groups[0])
    choices = ((None, NativeExecutor, EagerExecutor), (True, NativeExecutor, CompiledExecutor))
    for fused, expected, _ in choices:
        assert type(select.select_executor(MADAFamily(), group | {"fused": fused}, torch.device("cpu"))) is expected
    agreement.why_outdated.cache_clear()
    change_update(monkeypatch)
    monkeypatch.setattr(agreement, "warn", lambda message: None)
    for fused, _, expected in choices:
        assert type(select.select_executor(MADAFamily(), group | {"fused": fused}, torch.device("cpu"))) is expected


def with_other_comments(self, mean: torch.Tensor, v, t) -> torch.Tensor:
    """Other words."""
    # And more of them.
    return (
        mean
        + (v - mean)
        / t  # here, too
    )  # fmt: skip


def test_only_what_is_computed_counts(monkeypatch):
    before = agreement.definition()
    source = inspect.getsource(with_other_comments).replace("with_other_comments", "_long_term")
    original = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda one: source if one.__name__ == "_long_term" else original(one))
    assert agreement.definition() == before
    source = source.replace("+ (v", "- (v")
    assert agreement.definition() != before


def test_without_a_source_there_is_nothing_to_compare(monkeypatch):
    """As in a program that was packed up."""

    def none(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", none)
    assert agreement.definition() is None
    assert agreement.why_outdated(MADAFamily()) is None
