"""Compiles every kernel that some optimizers need for an NVIDIA GPU, which takes none; fails where that fails.

Prints the number of kernels. Not with TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import sys
from functools import partial

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mada_optim import MADA, OMADA, HypergradientOptimizer, load_optimizer
from mada_optim.engine import group_step as engine
from mada_optim.kernels import select
from mada_optim.kernels.triton import launch, multi_tensor, scalars

POINTERS = {torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
COMPILED: list[str] = []


class Compiling:
    """In place of a kernel."""

    def __init__(self, source: str) -> None:
        self.source = source

    def launch(self, device, programs, arguments, constants=(), **options) -> None:
        """Compile it for arguments of these types, and do nothing."""
        function = launch.load(self.source)._function
        tree = ast.parse(self.source)
        names = [x.arg for item in tree.body if getattr(item, "name", "") == "run" for x in item.args.args]
        values = [*arguments, *constants]
        kinds = [POINTERS[x.dtype] if isinstance(x, torch.Tensor) else "i32" for x in arguments]
        signature = dict(zip(names, [*kinds, *["constexpr"] * len(constants)], strict=True))
        fixed = {(k,): value for k, value in enumerate(values) if k >= len(arguments)}
        aligned = {(k,): [["tt.divisibility", 16]] for k, x in enumerate(arguments) if isinstance(x, torch.Tensor)}
        source = ASTSource(function, signature, fixed, aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        # It takes subnormal numbers, which are not 0, for 0, whose root the derivative divides by.
        assert "sqrt.approx" not in ptx
        COMPILED.append(ptx)


def main() -> None:
    """Two steps of each optimizer, of which the second settles the first."""
    sys.path.insert(0, __file__.rsplit("/", 1)[0])
    from test_multi_tensor import Kept, ManyOperations

    multi_tensor.load = scalars.load = Compiling
    engine.select_executor = lambda family, *_: select.the(multi_tensor.TritonExecutor)
    paper = load_optimizer("mada-paper")
    many, kept = (partial(HypergradientOptimizer, family=family) for family in (ManyOperations(), Kept()))
    for make, dtype in (
        (partial(MADA, hyper_lr=0.0), torch.float32),
        (paper, torch.float32),
        (paper, torch.float64),
        (partial(paper, state_dtype=torch.bfloat16, stochastic_rounding=True), torch.bfloat16),
        (partial(MADA, c=0.5, hyper_lr={"c": 0.1}), torch.float16),
        (OMADA, torch.float32),
        (many, torch.float32),
        (kept, torch.float32),
    ):
        x = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        optimizer = make([x], lr=1e-3, hyper_warmup=0)
        for _ in range(2):
            x.grad = torch.ones_like(x)
            optimizer.step()
    print(f"{len(COMPILED)} kernels compiled")


if __name__ == "__main__":
    main()
