"""Every corner of the box, spikes of the learning rate, and tensors that lie oddly in memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TABLE, Net, Row, loss_of
from torch import Tensor, nn

from mada_optim import MADA, HypergradientOptimizer, MADAFamily

BOX = {coefficient.name: coefficient.box for coefficient in MADAFamily.coefficients}


@pytest.mark.parametrize("corner", [*product((0, 1), repeat=len(BOX))], ids=lambda corner: "".join(map(str, corner)))
def test_a_training_that_starts_in_a_corner_of_the_box_stays_finite(corner: tuple[int, ...]):
    """All six are learned, by steps that reach across the box; at the end the learning rate is a hundred times as high
    for one step."""
    start = {name: BOX[name][end] for name, end in zip(BOX, corner, strict=True)}
    model = Net(torch.float32)
    betas = start.pop("beta1"), start.pop("beta2")
    optimizer = MADA(model.parameters(), 1e-2, betas, hyper_lr=10.0, hyper_warmup=0, **start)
    first = [loss_of(model, step).item() for step in range(5)]
    for step in range(25):
        optimizer.param_groups[0]["lr"] = 1.0 if step == 20 else 1e-2
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        for name, value in optimizer.coefficients().items():
            assert BOX[name][0] <= value <= BOX[name][1]
        if step == 19:
            assert sum(loss_of(model, other).item() for other in range(5)) < sum(first)
    tensors = [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)
    assert optimizer.skipped_hypergradients == 0


HUGE = {torch.float64: 307, torch.float32: 38, torch.bfloat16: 38, torch.complex64: 38}


@settings(max_examples=60, deadline=None)
@given(
    row=st.sampled_from(TABLE),
    dtype=st.sampled_from([*HUGE]),
    implementation=st.sampled_from([{}, {"fused": False}]),
    exponents=st.lists(st.floats(-1, 1), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_gradients_whose_square_overflows_move_a_parameter_by_no_more_than_others(
    row: Row, dtype, implementation, exponents, seed
):
    """As large as numbers can be, or as small. AdamW's parameters stay finite there; so do ours, and the buffers."""
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.zeros(30, dtype=dtype))
    optimizer = row([param], lr=1e-2, weight_decay=0.0, **implementation)
    for exponent in exponents:
        before = param.detach().clone()
        param.grad = (
            torch.randn(30, generator=generator, dtype=torch.float64) * 10 ** (exponent * HUGE[dtype] / 1.5)
        ).to(dtype)
        param.grad[:3] = 10 ** float(HUGE[dtype])
        optimizer.step()
        # Adam's bound on an element's move: √t, times 1 + 2 β3 for the differences; rounding to bfloat16.
        assert (param.detach() - before).abs().max() < 0.01 * 3 * 8
    assert all(bool(buffer.isfinite().all()) for buffer in optimizer.state[param].values())
    boxes = {coefficient.name: coefficient.box for coefficient in optimizer.family.coefficients}
    for name, value in optimizer.coefficients().items():
        assert not row.learns or boxes[name][0] <= value <= boxes[name][1]
    assert optimizer.skipped_hypergradients <= len(exponents)


@pytest.mark.parametrize("implementation", [{}, {"fused": False}], ids=["fused", "plain"])
@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_gradients_that_are_not_finite_are_not_hidden(row: Row, implementation):
    pattern = torch.tensor([1.0, float("inf"), -float("inf"), float("nan")])
    # Enough elements for the loops that compilers make of several elements at once.
    param = nn.Parameter(torch.ones(4 * 33))
    optimizer = row([param], **implementation)
    param.grad = pattern.repeat(33)
    optimizer.step()
    assert param.isnan().tolist() == [False, True, True, True] * 33


# Layouts.

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*REAL, torch.complex64]


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: its dimensions in another order, every ``step``-th element from ``offset`` on."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int

    def place(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of ``values`` that lies so, and the NaN-filled memory that it is a part of."""
        sizes = [values.shape[dim] * self.steps[dim] + self.offset for dim in self.order]
        memory = torch.full(sizes, float("nan"), dtype=values.dtype)
        view = memory.permute([self.order.index(dim) for dim in range(values.dim())])
        for dim, (size, step) in enumerate(zip(values.shape, self.steps, strict=True)):
            view = view[(slice(None),) * dim + (slice(self.offset, self.offset + size * step, step),)]
        view.copy_(values)
        return view, memory


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    order = draw(st.permutations(range(dims)))
    steps = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    return Layout(tuple(order), tuple(steps), draw(st.integers(0, 2)))


@st.composite
def cases(draw: st.DrawFn) -> list[list[tuple[tuple[int, ...], Layout, Layout, bool]]]:
    """Parameter groups, some of them empty, of (shape, layout, layout of the gradient, whether that is expanded)."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=3))
        groups.append([(s, draw(layouts(len(s))), draw(layouts(len(s))), draw(st.booleans())) for s in shapes])
    return groups if any(groups) else [*groups, [((2, 3), Layout((1, 0), (2, 1), 1), Layout((0, 1), (1, 1), 0), True)]]


@settings(max_examples=150, deadline=None)
@given(
    row=st.sampled_from(TABLE),
    groups=cases(),
    dtype=st.sampled_from(DTYPES),
    per_group=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_steps_on_odd_layouts_are_steps_on_contiguous_copies(row: Row, groups, dtype, per_group, seed):
    """And what lies around and between the elements of a parameter is not touched.

    The coefficients' step sizes are too small to move them: hypergradients are sums over elements, which another order
    rounds otherwise, and learning would carry that into the parameters.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)

    odd, plain, memories = [], [], []
    for group in groups:
        values = [random(shape) for shape, *_ in group]
        placed = [layout.place(value) for value, (_, layout, _, _) in zip(values, group, strict=True)]
        odd.append([nn.Parameter(view) for view, _ in placed])
        plain.append([nn.Parameter(value.clone()) for value in values])
        memories += [(memory, memory.isnan().sum()) for _, memory in placed]
        assert all(p.data_ptr() == view.data_ptr() for p, (view, _) in zip(odd[-1], placed, strict=True))

    def make(params: list[list[nn.Parameter]]) -> HypergradientOptimizer:
        settings_of = [{"params": p, "lr": 1e-2 / (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(params)]
        optimizer = row(settings_of, **({"hyper_warmup": 0, "hyper_per_group": per_group} if row.learns else {}))
        for options in optimizer.param_groups:
            options["hyper_lr"] = {name: 1e-30 if alpha else 0.0 for name, alpha in options["hyper_lr"].items()}
        return optimizer

    optimizers = make(odd), make(plain)
    for _ in range(3):
        for group, ours, theirs in zip(groups, odd, plain, strict=True):
            for (shape, _, layout, expanded), a, b in zip(group, ours, theirs, strict=True):
                gradient = random(()).expand(shape) if expanded else random(shape)
                a.grad = gradient if expanded else layout.place(gradient)[0]
                b.grad = gradient.clone(memory_format=torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(
        [p.detach() for group in odd for p in group], [p.detach() for group in plain for p in group], **tolerance
    )
    # A term of the sum may be of the order of η |g| / (1-β2) before it cancels against another.
    of_groups = [sum(p.grad.abs().sum().item() for p in group) * 1e-2 / (i + 1) for i, group in enumerate(plain)]
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    for index, of_group in enumerate(of_groups):
        terms = (of_group if per_group else sum(of_groups)) / (1 - row.q["beta2"])
        ours, theirs = (optimizer.hypergradients(index) for optimizer in optimizers)
        assert ours == (theirs and pytest.approx(theirs, rel=0, abs=32 * torch.finfo(computed_in).eps * terms))
    for memory, gaps in memories:
        assert memory.isnan().sum() == gaps
