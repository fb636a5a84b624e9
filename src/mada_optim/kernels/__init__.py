"""How a step is carried out: the update and its hypergradient for many tensors, as fast as the device allows.

:class:`~mada_optim.kernels.base.Kernels` says what has to be done. ``plain`` does it with torch's operators on pieces
that fit the cache, for any family, anywhere; ``compiled`` has torch.compile turn the same functions into fused kernels;
``multi_tensor`` has ``triton_source`` write them in Triton, for all parameters at once, for GPUs; ``native`` holds
MADA's family in closed form, in C++, for the CPU. :func:`select_kernels` picks.
"""

from mada_optim.kernels.base import Batch, Kernels
from mada_optim.kernels.select import check_fused, select_kernels

__all__ = ["Batch", "Kernels", "check_fused", "select_kernels"]
