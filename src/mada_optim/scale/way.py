"""The way that a parameter has gone, and its scalar product with the gradient.

With x_1 where the search began, a parameter lies at x = x_1 - κ W. For parameters in float32 and float64, x_1 is kept
and W follows from it. In bfloat16 and float16 a small step is lost to rounding, and with it the way. There the
optimizer takes a step of a visible length, W is kept in float32, and the parameter is put at x_1 - κ W afterwards.

Ways are measured in pieces that fit the cache, so no temporary has the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mada_optim.tensors.blocks import Block, make_blocks
from mada_optim.tensors.distributed import fill, local, tell_autograd

PIECE = 1 << 16  # elements
# Of a larger parameter some rows are measured, of the largest one in so many. So all that has a place in it is met:
# inputs that are always 0, rare words, experts, and what repeats within a few rows, which an even number could miss.
SPARSEST = 7
LOW_PRECISION = (torch.bfloat16, torch.float16)
VISIBLE = 2.0**-4
"""Scale of the steps that an optimizer takes on low-precision parameters during the search."""

TENSORS = ("scale_initial", "scale_mean", "scale_gone")
"""Names in a state_dict of what is kept of a parameter."""


@dataclass
class Way:
    """What the search keeps of a parameter: DTensors where it is one, pairs of reals where it is complex.

    Args:
        initial: x_1, in the parameter's dtype.
        mean: W̄, the running mean of W, in bfloat16.
        gone: W in float32, where the parameter's group has low precision; else None.
    """

    initial: Tensor
    mean: Tensor
    gone: Tensor | None

    @classmethod
    def begin(cls, param: Tensor, visible: bool) -> Way:
        """A way that begins where the parameter is; ``visible``: whether W is kept."""
        here = _real(param)
        return cls(
            initial=here.clone(),
            mean=torch.zeros_like(here, dtype=torch.bfloat16),
            gone=torch.zeros_like(here, dtype=torch.float32) if visible else None,
        )

    def fits(self, param: Tensor, visible: bool) -> bool:
        """Whether the parameter has the dtype, device and shape that it had when the way began."""
        here = _real(param)
        mine = (self.initial.dtype, self.initial.device, self.initial.shape, self.gone is not None)
        return mine == (here.dtype, here.device, here.shape, visible)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept by name, for a state_dict."""
        kept = dict(zip(TENSORS, (self.initial, self.mean, self.gone), strict=True))
        return {name: tensor for name, tensor in kept.items() if tensor is not None}

    @classmethod
    def load(cls, param: Tensor, tensors: Mapping[str, Tensor]) -> Way:
        """A way from what :meth:`tensors` returned, without aliasing it."""
        way = cls.begin(param, visible="scale_gone" in tensors)
        for name, target in way.tensors().items():
            fill(target, tensors[name])
        return way

    def collect_visible_step(self, param: Tensor, scale: float) -> None:
        """Add a step to W that was VISIBLE times as long as it counts, and put the parameter at x_1 - κ W."""
        if self.gone is None:
            return
        x, initial, gone = (local(tensor) for tensor in (_real(param), self.initial, self.gone))
        before = (initial - scale * gone).to(x.dtype)
        gone.add_(before.to(gone.dtype) - x, alpha=1 / VISIBLE)
        x.copy_(initial - scale * gone)
        tell_autograd([param])


def check_way(param: Tensor, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError where tensors of a state_dict are not the way of a parameter, or not all of it."""
    shape = _real(param).shape
    for name in (*TENSORS[:2], *tensors) if tensors else ():
        actual = tuple(tensors[name].shape) if name in tensors else None
        if actual != tuple(shape):
            raise ValueError(f"state_dict has {name} of shape {actual} {where}, expected {tuple(shape)}")


def follow(
    params: Sequence[Tensor], ways: Sequence[Way], scale: float, new_scale: float, swing: float, window: float
) -> Tensor | None:
    """Measure ways by the gradients, and move the parameters from x_1 - κ W to x_1 - κ' W. Changes W̄.

    Of a large parameter some rows are measured, down to one in seven, which then counts for seven.

    Args:
        params: parameters that agree in device, dtype, and whether they have a gradient, at x_1 - κ W. Changed.
        ways: of the parameters; all or none of them with W.
        scale: κ.
        new_scale: κ'.
        swing: share σ with which swings of W about W̄ count.
        window: decay of W̄.

    Returns:
        ⟨g, σ W + (1-σ) W̄⟩ over the elements of this process, 0-dimensional; None without a gradient.
    """
    roles = [_roles(param, way) for param, way in zip(params, ways, strict=True)]
    for tensors in roles if "gone" in roles[0] else ():
        # What others wrote into the parameter since the last step (loaded weights, a mask) moves x_1.
        begun = tensors["initial"]
        begun.add_(tensors["param"] - (begun - scale * tensors["gone"]).to(begun.dtype))
    total: Tensor | None = None
    for block, share in _measured(roles):
        if "gone" in block.members[0]:
            way = block.read("gone")
        else:
            way = torch.sub(block.read("initial"), block.read("param")).mul_(1 / scale)
        average = block.read("mean").to(way.dtype).lerp_(way, 1 - window)
        block.write("mean", average)
        if "grad" in block.members[0]:
            along = average.lerp_(way, swing).reshape(-1)
            part = share * torch.dot(block.read("grad").to(way.dtype).reshape(-1), along)
            total = part if total is None else total + part
    here, initial = ([tensors[role] for tensors in roles] for role in ("param", "initial"))
    if "gone" in roles[0]:
        for x, first, tensors in zip(here, initial, roles, strict=True):
            x.copy_(first - new_scale * tensors["gone"])
    elif new_scale != scale:
        torch._foreach_lerp_(here, initial, 1 - new_scale / scale)
    tell_autograd(params)
    return total


def _roles(param: Tensor, way: Way) -> dict[str, Tensor]:
    tensors = {"param": param, "initial": way.initial, "mean": way.mean}
    if way.gone is not None:
        tensors["gone"] = way.gone
    if param.grad is not None:
        tensors["grad"] = param.grad.resolve_conj()
    return {role: local(_real(tensor)) for role, tensor in tensors.items()}


def _measured(roles: Sequence[dict[str, Tensor]]) -> Iterator[tuple[Block, float]]:
    """Pieces that are measured, and for how much each counts."""
    small = [tensors for tensors in roles if tensors["param"].numel() <= PIECE]
    for block in make_blocks(small, elementwise=True, size=PIECE):
        yield block, 1.0
    for tensors in roles:
        numel = tensors["param"].numel()
        if numel > PIECE:
            rows = _rows(tensors)
            share = numel / rows["param"].numel()
            yield from ((block, share) for block in make_blocks([rows], elementwise=True, size=PIECE))


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a parameter's tensors, about PIECE elements or more; or columns, and so on, where it has few rows."""
    example = tensors["param"]
    every = min(SPARSEST, example.numel() // PIECE)
    every -= 1 - every % 2
    dim = next((dim for dim, size in enumerate(example.shape) if size >= every), 0)
    chosen = (slice(None),) * dim + (slice(None, None, every),)
    return {role: tensor[chosen] for role, tensor in tensors.items()}


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
