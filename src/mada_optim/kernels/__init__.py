"""How a step is carried out: passes over the parameters, as fast as the device allows.

:mod:`~mada_optim.kernels.passes` says what a step does to every element, as pure functions. Executors carry that out:
``eager`` with torch's operators, on pieces that fit the cache; ``traced`` by torch.compile; ``triton`` in Triton, for
all parameters at once; ``native`` in C++, where MADA's family is written out in closed form. ``select`` picks one.
"""

from mada_optim.kernels.batch import Batch
from mada_optim.kernels.executor import Executor
from mada_optim.kernels.passes import CompleteAndTake, CompletePending, Pass, TakeStep
from mada_optim.kernels.select import check_fused, select_executor

__all__ = [
    "Batch",
    "CompleteAndTake",
    "CompletePending",
    "Executor",
    "Pass",
    "TakeStep",
    "check_fused",
    "select_executor",
]
