"""Optimizers of other people that take more than a constructor to stand in a comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import Optimizer

from mada_optim.matrices import Layout

Group = dict[str, Any]
_MECHANIC = "_mechanic"  # its key in the state of the optimizer that it wraps


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon for groups marked ``matrices``, torch's fused AdamW for the others, at the same learning rate.

    Muon's step is scaled to the size of AdamW's (``match_rms_adamw``), which is what makes one learning rate serve
    both. Convolution kernels are handed to it as matrices of (output channels, everything else), each expert of a
    stack as a matrix of its own. Fused projections stay one matrix, as where torch's Muon is used by itself.

    Args:
        groups: parameter groups, as OMADA takes them.
        lr: of both.
        betas, eps, amsgrad: AdamW's.
        momentum, nesterov, ns_steps: Muon's.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        amsgrad: bool = False,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        # Of each matrix: the parameter, where in it the matrix is, and a view of it.
        self._matrices: list[tuple[Tensor, Any, Tensor]] = []
        for_muon, for_adamw = [], []
        for group in groups:
            options = {key: value for key, value in group.items() if key not in ("matrices", "split")}
            if not group.get("matrices"):
                for_adamw.append(options)
                continue
            stacked = Layout.read(group.get("split")).stacked
            flat = []
            for param in group["params"]:
                for index in range(param.size(0)) if stacked else [...]:
                    matrix = nn.Parameter(param.detach()[index].flatten(1))
                    if matrix.data_ptr() != param[index].data_ptr():
                        raise ValueError(
                            f"a kernel of shape {tuple(param.shape)} is not contiguous: Muon needs a matrix"
                        )
                    flat.append(matrix)
                    self._matrices.append((param, index, matrix))
            for_muon.append({**options, "params": flat})
        self.parts: list[Optimizer] = []
        if for_muon:
            arguments: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
            self.parts.append(torch.optim.Muon(for_muon, lr, adjust_lr_fn="match_rms_adamw", **arguments))
        if for_adamw:
            self.parts.append(AdamW(for_adamw, lr, betas, eps, amsgrad=amsgrad, fused=True))

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)
        for param, *_ in self._matrices:
            param.grad = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        for param, index, matrix in self._matrices:
            matrix.grad = None if param.grad is None else param.grad[index].flatten(1)
        for part in self.parts:
            part.step()
        for *_, matrix in self._matrices:
            matrix.grad = None  # it would keep the gradient from being freed before the next one is there

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


class MechanicWithAdamW(Optimizer):
    """Mechanic (mechanic-pytorch) around torch's AdamW: it scales the whole way gone, as LearnedScale does.

    Cutkosky, Defazio and Mehta, "Mechanic: A Learning Rate Tuner", NeurIPS 2023. It keeps its state by parameters,
    which another process cannot know; here by their numbers.

    Args:
        groups: parameter groups.
        lr: of AdamW. Mechanic rescales its steps, so this rate sets little but the weight decay.
        betas, eps: AdamW's.
    """

    def __init__(
        self, groups: Sequence[Group], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        mechanize = import_module("mechanic_pytorch").mechanize
        self.inner: Optimizer = mechanize(AdamW)(groups, lr=lr, betas=betas, eps=eps)
        self._params = [param for group in self.inner.param_groups for param in group["params"]]

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        stored = self.inner.state_dict()
        if _MECHANIC in stored["state"]:
            numbers = {param: number for number, param in enumerate(self._params)}
            kept = stored["state"][_MECHANIC]
            by_number = {numbers.get(key, key) if isinstance(key, Tensor) else key: each for key, each in kept.items()}
            stored["state"] = {**stored["state"], _MECHANIC: by_number}
        return stored

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        state: dict[Any, Any] = self.inner.state
        if _MECHANIC in state:
            kept = copy.deepcopy(state[_MECHANIC])
            state[_MECHANIC] = {self._params[key] if isinstance(key, int) else key: each for key, each in kept.items()}


def imported(path: str, **defaults: Any) -> Callable[..., Optimizer]:
    """Return the constructor of an optimizer in another package, which is imported when it is called.

    Args:
        path: package and class.
        defaults: arguments that the class gets where the user gives none.
    """
    package, _, name = path.rpartition(".")

    def make(groups: Sequence[Group], **arguments: Any) -> Optimizer:
        optimizer: Any = getattr(import_module(package), name)(groups, **{**defaults, **arguments})
        if hasattr(optimizer, "train"):
            optimizer.train()  # a schedule-free one is not ready to step when it is made
        return optimizer  # type: ignore[no-any-return]

    return make
