"""What a GPU alone shows: graphs, tensors that lie oddly, recompilations, rounding, subnormal numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.device import Cuda, Setting
from gpu.optimizers import everything, gradients, new_params, train
from gpu.record import Record
from mada_optim import MADA

STEPS, CAPTURED_AT = 10, 4


def run(setting: Setting, record: Record) -> None:
    checks: dict[str, Callable[[Setting, dict[str, Any]], None]] = {
        "replayed steps equal steps, fused": partial(replayed_steps, fused=None),
        "replayed steps equal steps, plain": partial(replayed_steps, fused=False),
        "a parameter that the graph leaves out": partial(replayed_steps, fused=None, left_out=2),
        "graphs of different parameters": graphs_in_turn,
        "tensors that are not aligned": misaligned,
        "channels_last": channels_last,
        "no recompilations": recompilations,
        "subnormal averages": subnormal_averages,
        "bfloat16 state": bfloat16_state,
        "a checkpoint in float32": checkpoint_in_float32,
        "a step on another stream": another_stream,
        "capturing needs capturable": refused_capture,
    }
    for name, check in checks.items():
        with record.check(name) as values:
            check(setting, values)


def replayed_steps(setting: Setting, values: dict[str, Any], fused: bool | None, left_out: int | None = None) -> None:
    """Steps replayed from a graph are those of the program, also where a parameter has no gradient meanwhile.

    It has none in the step before the capture either, which completes its last one.
    """
    device, results = setting.device, []
    for captured in (False, True):
        params = new_params(device.name, torch.float32, setting.small)
        optimizer = everything(params, lr=1e-3, capturable=True, fused=fused, hyper_every=2)
        replay: Callable[[], Any] | None = None
        kept = [torch.zeros_like(param) for param in params]
        for step, grads in enumerate(gradients(params, STEPS)):
            in_graph = CAPTURED_AT <= step < STEPS - 1
            for k, (param, grad, place) in enumerate(zip(params, grads, kept, strict=True)):
                place.copy_(grad)
                param.grad = None if CAPTURED_AT - 1 <= step < STEPS - 1 and k == left_out else place
            if captured and in_graph:
                # Capturing does not run: the first replay is this step.
                replay = replay or device.capture(optimizer.step)
                replay()
            else:
                optimizer.step()
        results.append((params, optimizer.coefficients()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1], results
    values["replayed"] = STEPS - 1 - CAPTURED_AT


def graphs_in_turn(setting: Setting, values: dict[str, Any]) -> None:
    """Two graphs that leave out a parameter each, replayed in turn: the counts of steps differ within them."""
    device, results = setting.device, []
    for captured in (False, True):
        params = new_params(device.name, torch.float32, setting.small)
        optimizer = MADA(params, lr=1e-3, hyper_lr=0.0, capturable=True)
        replays: dict[int, Callable[[], Any]] = {}
        kept = [torch.zeros_like(param) for param in params]
        for step, grads in enumerate(gradients(params, STEPS)):
            left_out = (0, 1, 1)[step % 3] if step >= CAPTURED_AT else None
            for k, (param, grad, place) in enumerate(zip(params, grads, kept, strict=True)):
                place.copy_(grad)
                param.grad = None if k == left_out else place
            if captured and left_out is not None:
                if left_out not in replays:
                    replays[left_out] = device.capture(optimizer.step)
                replays[left_out]()
            else:
                optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)
    values["graphs"] = 2


def _same_as_plain(setting: Setting, place: Callable[[Tensor], Tensor], sizes: Sequence[tuple[int, ...]]) -> float:
    """Return the largest difference between fused and plain where ``place`` says how tensors lie."""
    results = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)

        def random(size: tuple[int, ...], generator: torch.Generator = generator) -> Tensor:
            return place(torch.randn(size, generator=generator).to(setting.device.name))

        params = [nn.Parameter(random(size)) for size in sizes]
        optimizer = everything(params, lr=1e-3, fused=fused)
        for _ in range(6):
            for param, size in zip(params, sizes, strict=True):
                param.grad = random(size)
            optimizer.step()
        results.append([param.detach() for param in params])
    difference = max(float((one - other).abs().max()) for one, other in zip(*results, strict=True))
    assert difference <= 2e-5, difference
    return difference


def misaligned(setting: Setting, values: dict[str, Any]) -> None:
    """Tensors that begin 4 bytes behind a multiple of 16, beside some that do not."""

    def shifted(tensor: Tensor) -> Tensor:
        longer = torch.empty(tensor.numel() + 1, device=tensor.device)
        longer[1:] = tensor.flatten()
        return longer[1:].view(tensor.shape) if tensor.dim() == 1 else tensor

    values["difference"] = _same_as_plain(setting, shifted, [(1000,), (33, 17), (5,)])


def channels_last(setting: Setting, values: dict[str, Any]) -> None:
    """One kernel of a convolution in channels_last, in a batch with others."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    values["difference"] = _same_as_plain(setting, place, [(8, 4, 3, 3), (33, 17), (5,)])


def recompilations(setting: Setting, values: dict[str, Any]) -> None:
    """None for other shapes, numbers of parameters, rates, counts and coefficients."""
    from triton import knobs

    compiled: list[object] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **kernel: compiled.append(kernel)  # type: ignore[assignment]
    counts = []
    try:
        for size in (10, 1000, 1) if setting.small else (10, 100_000, 1 << 22, 1):
            params = [nn.Parameter(torch.randn(size + i).to(setting.device.name)) for i in range(1 + size % 7)]
            # No other check learns these two alone, so these kernels are new.
            optimizer = MADA(params, lr=1.0 / size, rho=0.5, hyper_lr={"rho": 0.1, "beta1": 5e-4}, hyper_warmup=0)
            for _ in range(4):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            counts.append(len(compiled))
    finally:
        knobs.runtime.jit_post_compile_hook = before
    values["kernels after each size"] = str(counts)
    assert len(set(counts)) == 1, counts
    assert counts[0] > 0 or not isinstance(setting.device, Cuda)


def subnormal_averages(setting: Setting, values: dict[str, Any]) -> None:
    """Averages of squares that have fallen below the smallest normal number do not spoil the hypergradient."""
    x = nn.Parameter(torch.ones(1 << 6 if setting.small else 1 << 14, device=setting.device.name))
    optimizer = MADA([x], lr=1e-3, hyper_lr={"c": 0.1, "beta2": 1e-3}, hyper_warmup=0)
    for step in range(6):
        x.grad = torch.ones_like(x)
        if step >= 2:
            x.grad[::2] = 0.0
            optimizer.state[x]["exp_avg_sq"][::2] = 1e-40
        optimizer.step()
    values["hypergradients skipped"] = int(optimizer.skipped_hypergradients)
    assert optimizer.skipped_hypergradients == 0
    assert bool(x.isfinite().all())


def bfloat16_state(setting: Setting, values: dict[str, Any]) -> None:
    """Stochastic rounding is right on average: elements scatter around those of float32 state, and their mean stays."""
    rounded, exact = (
        train(everything, setting.device, torch.float32, setting.small, state_dtype=dtype)[0][-1]
        for dtype in (torch.bfloat16, None)
    )
    apart = rounded - exact
    values |= {"mean difference": float(apart.mean()), "standard deviation": float(apart.std())}
    if not setting.small:  # the mean of few elements is not small
        assert abs(float(apart.mean())) < 1e-6
    assert 0 < float(apart.std()) < 1e-4


def checkpoint_in_float32(setting: Setting, values: dict[str, Any]) -> None:
    """Coefficients that were stored in float32 go on in the precision of the device."""
    params = new_params(setting.device.name, torch.float32, setting.small)
    steps = list(gradients(params, 6))
    optimizers = [everything(params, lr=1e-3) for _ in range(2)]
    for optimizer, grads in ((optimizers[0], steps[:3]), (optimizers[1], steps[3:])):
        if optimizer is optimizers[1]:
            stored = optimizers[0].state_dict()
            for group in stored["param_groups"]:
                group["coefficients"] = group["coefficients"].float()
            optimizer.load_state_dict(stored)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad
            optimizer.step()
    coefficients = optimizers[1].coefficients()
    values |= {"β1": coefficients["beta1"], "hypergradients skipped": int(optimizers[1].skipped_hypergradients)}
    assert optimizers[1].skipped_hypergradients == 0
    assert abs(coefficients["beta1"] - 0.9) < 0.05, coefficients
    assert all(bool(param.isfinite().all()) for param in params)


def another_stream(setting: Setting, values: dict[str, Any]) -> None:
    """What was made on one stream is right where it is used on another one."""
    if not isinstance(setting.device, Cuda):
        values["note"] = "only on a GPU"
        return
    expected, _ = train(everything, setting.device, torch.float32, setting.small)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        params, _ = train(everything, setting.device, torch.float32, setting.small)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(params, expected, rtol=0, atol=0)


def refused_capture(setting: Setting, values: dict[str, Any]) -> None:
    """A step that would be frozen in a graph is refused."""
    if not isinstance(setting.device, Cuda):
        values["note"] = "only on a GPU"
        return
    x = nn.Parameter(torch.ones(8, device=setting.device.name))
    optimizer = everything([x], lr=1e-3)
    for _ in range(3):
        x.grad = torch.ones_like(x)
        optimizer.step()
    message = "nothing"
    try:
        setting.device.capture(optimizer.step)
    except RuntimeError as error:
        message = str(error)
    assert "capturable" in message, f"capturing raised {message}"
