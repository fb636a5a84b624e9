"""NaN, zeros, gaps and late arrivals: defined, and never a NaN that was not in the gradients."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import IDS, TABLE, Net, Row, loss_of, train
from torch import nn

from mada_optim import MADA, load_optimizer

LEARNING = [row for row in TABLE if row.learns]
LEARNING_IDS = [row.name for row in LEARNING]


def all_finite(optimizer: torch.optim.Optimizer) -> bool:
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [group["coefficients"] for group in optimizer.param_groups]
    return all(bool(torch.isfinite(t).all()) for t in tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", LEARNING, ids=LEARNING_IDS)
def test_a_gradient_that_is_not_finite_never_reaches_the_coefficients(row: Row, bad):
    """Parameters follow torch: they become NaN. The coefficients stay where they were, and the event is counted."""
    model = Net()
    optimizer = row(model.parameters(), lr=1e-3)
    train(model, optimizer, 6)
    for step in range(6, 12):
        before = optimizer.coefficients()
        loss_of(model, step).backward()
        model.out.weight.grad[0, 0] = bad
        optimizer.step()
        if step >= 6 + optimizer.param_groups[0]["hyper_delay"]:  # a hypergradient of good gradients may have waited
            assert optimizer.coefficients() == before
    delay = optimizer.param_groups[0]["hyper_delay"]
    assert optimizer.skipped_hypergradients == (2 if row.name == "mada-every-3" else 6) - delay
    assert torch.isfinite(optimizer.param_groups[0]["hyper_momentum_buffer"]).all()


@pytest.mark.parametrize("fused", [None, False])
def test_learning_goes_on_after_a_hypergradient_that_overflowed(fused):
    """In float32 a product of large finite gradients overflows; the next hypergradients are finite again."""
    x = nn.Parameter(torch.ones(4))
    optimizer = MADA([x], lr=1e-3, gamma=0.5, hyper_lr={"gamma": 0.1}, hyper_warmup=0, fused=fused)
    moved = []
    for scale in (1.0, -1.0, 3e38, 1.0, -1.0, 1.0, -1.0):
        before = optimizer.coefficients()
        x.grad = torch.full_like(x, scale)
        optimizer.step()
        moved.append(optimizer.coefficients() != before)
    assert not moved[2]
    assert optimizer.skipped_hypergradients == 1
    assert any(moved[3:])


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_zero_gradients_and_rows_that_are_never_used(row: Row):
    model = Net()
    unused = model.embedding.weight.detach()[9:].clone()
    optimizer = row(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(12):
        optimizer.zero_grad()
        (0.0 * loss_of(model, step)).backward()
        optimizer.step()
    assert all_finite(optimizer)
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 12)
    assert all_finite(optimizer)
    assert torch.equal(model.embedding.weight[9:], unused)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_parameter_without_a_gradient_is_left_alone(row: Row):
    """Its buffers and its own step count stay; when gradients come again, it goes on as if nothing had been between."""
    x, y, alone = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer, reference = row([x, y], lr=1e-2), row([alone], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    if row.learns:  # the coefficients of two trainings differ; hold them, and keep the pending steps
        for o in (optimizer, reference):
            step_sizes = o.param_groups[0]["hyper_lr"]
            step_sizes.update({name: 1e-300 for name, alpha in step_sizes.items() if alpha > 0.0})
    for step in range(20):
        x.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        y.grad = None
        if step % 3 != 1:
            y.grad = torch.randn(3, generator=generator, dtype=torch.float64)
            alone.grad = y.grad.clone()
            reference.step()
        optimizer.step()
    torch.testing.assert_close(y, alone, rtol=0, atol=1e-14)
    assert int(optimizer.state[y]["step"]) == 13
    assert int(optimizer.state[x]["step"]) == 20


def test_a_parameter_that_never_has_a_gradient_has_no_state():
    model = Net()
    model.norm.requires_grad_(False)
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    assert model.norm.weight not in optimizer.state
    model.norm.requires_grad_(True)
    train(model, optimizer, 3, first=3)
    assert int(optimizer.state[model.norm.weight]["step"]) == 3


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_tensors_without_elements_and_scalars(row: Row):
    empty, scalar = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))
    optimizer = row([empty, scalar], lr=1e-2)
    for _ in range(8):
        optimizer.zero_grad()
        (scalar**2 + empty.sum()).backward()
        optimizer.step()
    assert all_finite(optimizer)
    assert scalar.dtype == torch.float32
    assert scalar < 2.0


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"fused": True, "capturable": True}], ids=str)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_nothing_but_tensors_without_elements(row: Row, options):
    """As a process may have of tensors that are spread over several."""
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = row([empty], lr=1e-2, **options)
    before = optimizer.coefficients()
    for _ in range(8):
        empty.sum().backward()
        optimizer.step()
    assert optimizer.coefficients() == before
    assert int(optimizer.state[empty]["step"]) == 8


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_a_group_added_in_the_middle(row: Row):
    model, late = Net(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = row(model.parameters(), lr=1e-3)
    train(model, optimizer, 6)
    coefficients = optimizer.coefficients()
    optimizer.add_param_group({"params": [late], "lr": 1e-2})
    assert optimizer.coefficients(1) == coefficients
    for step in range(6, 12):
        optimizer.zero_grad()
        (loss_of(model, step) + (late**2).sum()).backward()
        optimizer.step()
    assert all_finite(optimizer)
    assert int(optimizer.state[late]["step"]) == 6
    assert (late < 1.0).all()
    assert optimizer.coefficients(1) == optimizer.coefficients(0)


def test_no_gradient_at_all_is_no_step_of_the_coefficients():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0, hyper_delay=0)
    train(model, optimizer, 3)
    before = optimizer.coefficients()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.coefficients() == before
    assert optimizer.skipped_hypergradients == 0


@pytest.mark.parametrize("row", LEARNING, ids=LEARNING_IDS)
def test_memory_does_not_grow_and_no_graph_survives(row: Row):
    model = Net()
    optimizer = row(model.parameters(), lr=1e-3)
    train(model, optimizer, 200)
    gc.collect()
    tensors, objects, memory = count_tensors(), len(gc.get_objects()), resident_bytes()
    train(model, optimizer, 300, first=200)
    gc.collect()
    assert count_tensors() == tensors
    assert len(gc.get_objects()) - objects < 30
    # The graph of one hypergradient holds some 100 kB.
    assert resident_bytes() - memory < 8e6
    kept = [t for state in optimizer.state.values() for t in state.values()]
    kept += [value for group in optimizer.param_groups for value in group.values() if isinstance(value, torch.Tensor)]
    assert all(t.grad_fn is None and not t.requires_grad for t in kept)
    assert all(p.grad_fn is None and p.is_leaf for p in model.parameters())


def resident_bytes() -> int:
    """Memory of this process now; where the system does not say, its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_tensors() -> int:
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_the_graph_of_a_loss_is_freed_when_the_loss_is():
    model = Net()
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 2)
    loss = loss_of(model, 2)
    node = weakref.ref(loss)
    loss.backward()
    optimizer.step()
    del loss
    gc.collect()
    assert node() is None


def test_closure():
    model = Net()
    optimizer = MADA(model.parameters(), lr=1e-2, hyper_warmup=0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(30)]
    assert losses[-1] < losses[0]


def run(make, params: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> None:
    optimizer = make(params)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = (
                gradient.to(param.dtype).reshape(param.shape) if gradient.dim() == 0 else gradient.to(param.dtype)
            )
        optimizer.step()


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
}


@settings(max_examples=60, deadline=None)
@given(
    row=st.sampled_from(TABLE),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_shape_layout_dtype_and_scale(row, shapes, layout, dtype, scale, seed):
    """Layouts change nothing; low precision follows float64; finite gradients keep everything finite."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    gradients = [[(scale * torch.randn(t.shape, generator=generator)).to(dtype) for t in start] for _ in range(7)]
    plain = [nn.Parameter(t.clone()) for t in start]
    laid_out = [nn.Parameter(LAYOUTS[layout](t.clone())) for t in start]
    strides = [param.stride() for param in laid_out]

    def make(params):
        optimizers.append(row(params, lr=1e-3, **({"hyper_lr": 1e-4} if row.learns else {})))
        return optimizers[-1]

    optimizers: list = []
    run(make, plain, gradients)
    run(make, laid_out, [[LAYOUTS[layout](g) for g in step] for step in gradients])
    assert all(all_finite(optimizer) for optimizer in optimizers)
    for a, b, stride in zip(plain, laid_out, strides, strict=True):
        assert a.dtype == b.dtype == dtype
        assert b.stride() == stride
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_low_precision_parameters_are_the_rounded_result_of_float32_arithmetic(row: Row, dtype):
    """One float32 twin, rounded after each step as the stored parameter is."""
    generator = torch.Generator().manual_seed(0)
    low = nn.Parameter(torch.randn(50, generator=generator).to(dtype))
    full = nn.Parameter(low.detach().float())
    optimizer, reference = row([low], lr=1e-2), row([full], lr=1e-2)
    for _ in range(20):
        low.grad = torch.randn(50, generator=generator).to(dtype)
        full.grad = low.grad.float()
        optimizer.step()
        reference.step()
        with torch.no_grad():
            full.copy_(full.to(dtype))
    assert torch.equal(low.float(), full)
    # float32 sums in another order: how many elements a processor reads at once depends on their dtype.
    assert optimizer.coefficients() == pytest.approx(reference.coefficients(), abs=1e-6)


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_complex_parameters_are_pairs_of_real_ones(row: Row):
    z = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))
    pair = nn.Parameter(torch.view_as_real(z.detach()).clone())
    optimizer, reference = row([z], lr=1e-2), row([pair], lr=1e-2)
    for _ in range(15):
        z.grad = torch.randn_like(z)
        pair.grad = torch.view_as_real(z.grad).clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), pair.detach(), rtol=0, atol=1e-14)
    assert optimizer.coefficients() == pytest.approx(reference.coefficients())


def test_a_gradient_that_autograd_conjugates_lazily():
    results = []
    for resolve in (False, True):
        z = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
        optimizer = MADA([z], lr=1e-2, hyper_warmup=0)
        for _ in range(4):
            optimizer.zero_grad()
            (z.conj() * torch.tensor([1 + 1j, 2 - 1j])).sum().abs().backward()
            assert z.grad.is_conj()
            if resolve:
                z.grad = z.grad.resolve_conj()
            optimizer.step()
        results.append((z.detach(), optimizer.coefficients()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_a_gradient_whose_sign_autograd_leaves_for_later(shape):
    """As that of an imaginary part behind torch.conj; its memory holds the opposite."""
    results = []
    for make in (torch.optim.AdamW, load_optimizer("adamw")):
        real, imaginary = (nn.Parameter(torch.full(shape, value)) for value in (1.0, -1.0))
        optimizer = make([real, imaginary], lr=0.05)
        for _ in range(50):
            optimizer.zero_grad()
            (torch.complex(real, imaginary).conj() - (3 - 2j)).abs().square().sum().backward()
            assert imaginary.grad.is_neg() or shape == (3,)
            optimizer.step()
        results.append((real.detach(), imaginary.detach()))
    torch.testing.assert_close(*results)


def test_a_parameter_whose_memory_holds_the_opposite():
    results = []
    for make in (torch.optim.AdamW, load_optimizer("adamw")):
        param = nn.Parameter(torch._neg_view(torch.linspace(-1, 1, 5)))
        optimizer = make([param], lr=0.1)
        for _ in range(3):
            param.grad = param.detach().resolve_neg().clone()
            optimizer.step()
        results.append(param.detach().resolve_neg())
    torch.testing.assert_close(*results)


def test_tied_weights_are_one_parameter():
    model = Net()
    model.hidden2 = nn.Linear(6, 9)
    model.hidden2.weight = model.hidden.weight
    optimizer = MADA(model.parameters(), hyper_warmup=0)
    train(model, optimizer, 3)
    assert model.hidden2.weight is model.hidden.weight
    assert int(optimizer.state[model.hidden.weight]["step"]) == 3


@pytest.mark.parametrize("fused", [None, False])
def test_another_default_device(fused):
    """What is made in a step is made where the parameters and counts are."""
    results = []
    for device in ("meta", "cpu"):
        x = nn.Parameter(torch.ones(5))
        optimizer = MADA([x], hyper_warmup=0, fused=fused)
        for _ in range(3):
            x.grad = torch.full((5,), 0.3)
            with torch.device(device):
                optimizer.step()
        assert float(optimizer.state[x]["step"]) == 3
        results.append((x.detach(), optimizer.coefficients()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]
