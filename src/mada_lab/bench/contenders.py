"""The optimizers that are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mada_lab.bench.contender import LR, Contender, TrainedModel
from mada_lab.bench.routines import QUINTICS, Routine, batched_quintics, exact, muon_one_by_one, orthogonalize_each
from mada_lab.optimizers.registry import ENTRIES, Entry
from mada_optim import (
    MADA,
    OMADA,
    AVGrad,
    HypergradientOptimizer,
    LearnedScale,
    MADAFamily,
    SearchSettings,
    load_optimizer,
)

Params = Sequence[Tensor]
_ENDLESS = SearchSettings(steps=1_000_000)
ALL = "abcdefk"
TRAINING = "abcj"  # training steps, and what OMADA and Muon are timed on


class GenericFamily(MADAFamily):
    """MADA's family without its own kernels: what a user's family gets."""


def words(buffers: int, kept_grads: int, learning: bool, every: int = 1, delay: int = 0) -> float:
    """float32 numbers for each parameter that one step of ours reads and writes.

    Args:
        buffers: all tensors of the family's state that a step reads.
        kept_grads: how many of them are a gradient, which is not written but exchanged.
        learning: whether a hypergradient is taken.
        every: in each ``every``-th step.
        delay: 1: what is learned is used one step later, so that a step is completed and the next one taken at once.

    >>> words(2, 0, learning=False), words(6, 1, learning=True), words(6, 1, learning=True, delay=1)
    (7.0, 23.0, 16.0)
    """
    plain = (buffers + 2) + (buffers + 1)
    if not learning:
        return float(plain)
    if delay and every == 1:
        return float((buffers + 3) + (buffers - kept_grads) + 2)
    if delay:
        both = (buffers + 3) + (buffers + 1)
        keep = (buffers + 2) + 2
        return (keep + both + (every - 2) * plain) / every
    completion = (buffers + 2) + (buffers - kept_grads)
    keep = (buffers + 2) + 2
    return (completion + keep + (every - 1) * plain) / every


def contenders() -> list[Contender]:
    """The table. A workload says which of them all others are compared with."""
    routines: list[tuple[str, str, Routine]] = [
        (QUINTICS, "torch", batched_quintics),
        ("orthogonalize", "ours", orthogonalize_each),
        ("orthogonalize, Muon's iteration", "ours", partial(orthogonalize_each, ns_steps=5)),
        ("torch.optim.Muon, one by one", "torch", muon_one_by_one),
        ("SVD", "torch", exact),
    ]
    held = {"matrices": LR, "rest": LR}
    three = {"beta1": 5e-4, "beta2": 5e-4, "rho": 0.1}

    def ours(name: str, buffers: int, kept: int, make: Any, every: int | None = 1, workloads: str = "abc") -> Contender:
        delay = make([torch.zeros(1)]).param_groups[0]["hyper_delay"]
        count = words(buffers, kept, every is not None, every or 1, delay)
        return Contender(name, "ours", make, unit=every or 1, words=count, workloads=workloads)

    mada = partial(MADA, lr=LR, hyper_warmup=0)
    paper = partial(load_optimizer("mada-paper"), lr=LR, hyper_warmup=0)
    generic = partial(HypergradientOptimizer, family=GenericFamily(), lr=LR, hyper_warmup=0)
    return [
        Contender("AdamW, fused", "torch", partial(torch.optim.AdamW, lr=LR, fused=True), words=7, workloads=ALL + "j"),
        Contender("AdamW, foreach", "torch", partial(torch.optim.AdamW, lr=LR, foreach=True), workloads=ALL),
        ours("MADA, nothing learned (Adam)", 2, 0, partial(mada, hyper_lr=0.0), every=None, workloads=ALL),
        ours("AVGrad", 3, 0, partial(AVGrad, lr=LR), every=None),
        ours("MADA, β1 β2 ρ", 3, 0, partial(mada, hyper_lr=three)),
        ours("MADA, β1 β2 ρ, hyper_every=10", 3, 0, partial(mada, hyper_lr=three, hyper_every=10), every=10),
        ours("MADA, default", 6, 1, mada, workloads=ALL),
        ours("MADA, everything", 6, 1, paper, workloads=ALL),
        ours("MADA, everything, hyper_every=10", 6, 1, partial(paper, hyper_every=10), every=10),
        Contender("MADA, everything, bfloat16 state", "ours", partial(paper, state_dtype=torch.bfloat16)),
        Contender("generic engine, compiled", "ours", partial(generic, fused=True)),
        Contender("generic engine, plain", "ours", partial(generic, fused=False)),
        Contender("AdamW, fused, searching for its rate", "ours", _searching_adamw),
        Contender("AdamW, fused, at the rate found", "ours", partial(_searching_adamw, held=LR)),
        Contender("OMADA, searching for its rates", "ours", _searching_omada, workloads=TRAINING),
        Contender("OMADA, at the rates found", "ours", partial(_omada, scale=held), workloads=TRAINING),
        Contender("OMADA, no search", "ours", partial(_omada, scale=False), workloads=TRAINING),
        Contender("OMADA, Muon's iteration", "ours", partial(_omada, scale=held, ns_steps=5), workloads="j"),
        *(Contender(name, kind, routine=routine, workloads="ghi") for name, kind, routine in routines),
        *(_of_registry(entry.timed_as, entry) for entry in ENTRIES.values() if entry.timed_as is not None),
        Contender("Adan (pytorch-optimizer)", "peer", partial(_peer, "Adan"), package="pytorch_optimizer"),
        Contender("Lion (pytorch-optimizer)", "peer", partial(_peer, "Lion"), package="pytorch_optimizer"),
        Contender(
            "gdtuo: Adam under SGD",
            "peer",
            start=_gdtuo,
            package="gradient_descent_the_ultimate_optimizer",
            workloads="c",
        ),
    ]


def matrices_apart(params: Sequence[Any]) -> list[dict[str, Any]]:
    """Groups as OMADA and Muon take them. Of tensors alone, all with two dimensions are matrices."""
    if params and isinstance(params[0], dict):
        return list(params)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if (p.dim() == 2) == wanted], "matrices": wanted} for wanted in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _of_registry(name: str, entry: Entry) -> Contender:
    """Return what experiments train with, as a line of the table."""
    assert entry.make is not None
    return Contender(
        name,
        "torch" if entry.package is None else "peer",
        partial(_made_for_matrices, entry.make) if entry.takes_matrices else partial(entry.make, lr=LR),
        package=entry.package,
        workloads=TRAINING if entry.takes_matrices else "abc",
    )


def _made_for_matrices(make: Callable[..., Optimizer], params: Params) -> Optimizer:
    return make(matrices_apart(params), lr=LR)


def _omada(params: Params, **options: Any) -> Optimizer:
    groups = matrices_apart(params)
    if isinstance(options.get("scale"), dict):
        kinds = {"matrices" if group["matrices"] else "rest" for group in groups}
        options["scale"] = {kind: rate for kind, rate in options["scale"].items() if kind in kinds}
    return OMADA(groups, lr=LR, **options)


def _searching_adamw(params: Params, held: float | None = None) -> Optimizer:
    optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
    LearnedScale(optimizer, settings=_ENDLESS, held=held)
    return optimizer


def _searching_omada(params: Params) -> Optimizer:
    optimizer = _omada(params, scale=False)
    LearnedScale(optimizer, settings=_ENDLESS)
    return optimizer


def _peer(name: str, params: Params) -> Optimizer:
    import pytorch_optimizer

    optimizer: Optimizer = getattr(pytorch_optimizer, name)(params, lr=LR)
    return optimizer


def _gdtuo(workload: TrainedModel) -> Callable[[], None]:
    """Train with gdtuo. Its wrapper replaces the module's parameters, so it cannot have tied weights."""
    from gradient_descent_the_ultimate_optimizer import gdtuo

    model = workload.fresh_model(tied=False)
    wrapper = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(alpha=LR, optimizer=gdtuo.SGD(1e-7)))
    wrapper.initialize()

    def step() -> None:
        wrapper.begin()
        loss = workload.loss(model)
        wrapper.zero_grad()
        torch.autograd.backward(loss, create_graph=True)
        wrapper.step()

    return step
