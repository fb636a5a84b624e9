"""Compiles every kernel that some optimizers need for an NVIDIA GPU, which takes none; fails where that fails.

Prints the number of kernels and the versions. With the argument ``all``, it compiles what ``benchmarks/gpu_check.py``
needs: every optimizer, in all its dtypes, with tensors that are aligned and with others. Not with TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

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
SEEN: set[str] = set()


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
        key = repr((self.source, signature, fixed, aligned, options))
        if key in SEEN:
            return
        SEEN.add(key)
        source = ASTSource(function, signature, fixed, aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        # It takes subnormal numbers, which are not 0, for 0, whose root the derivative divides by.
        assert "sqrt.approx" not in ptx
        assert options["enable_fp_fusion"] is False
        if "ALIGNED" in names:
            assert ("ld.global.v" in ptx) == values[names.index("ALIGNED")]  # whether several elements are read at once
        COMPILED.append(ptx)


def some() -> Iterator[tuple[Callable[..., torch.optim.Optimizer], torch.dtype]]:
    """Yield optimizers and dtypes that need every kind of kernel."""
    from test_multi_tensor import Kept, ManyOperations

    paper = load_optimizer("mada-paper")
    yield partial(MADA, hyper_lr=0.0), torch.float32
    yield paper, torch.float32
    yield paper, torch.float64
    yield partial(paper, hyper_delay=1), torch.float32
    yield partial(paper, state_dtype=torch.bfloat16, stochastic_rounding=True), torch.bfloat16
    yield partial(MADA, c=0.5, hyper_lr={"c": 0.1}), torch.float16
    yield OMADA, torch.float32
    yield partial(HypergradientOptimizer, family=ManyOperations()), torch.float32
    yield partial(HypergradientOptimizer, family=Kept()), torch.float32


def every() -> Iterator[tuple[Callable[..., torch.optim.Optimizer], torch.dtype]]:
    """Yield what the program for a GPU runs."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    from gpu.optimizers import named_optimizers, timed_contenders

    for make in named_optimizers().values():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            yield make, dtype
    for contender in timed_contenders():
        if contender.kind == "ours":
            yield contender.make, torch.float32


def main() -> None:
    """Two steps of each optimizer, of which the second settles the first."""
    sys.path[:0] = [str(Path(__file__).parents[depth]) for depth in (0, 2)]
    multi_tensor.load = scalars.load = Compiling
    engine.select_executor = lambda family, *_: select.the(multi_tensor.TritonExecutor)
    wanted, skipped = (every(), (0, 1)) if "all" in sys.argv else (some(), (0,))
    for make, dtype in wanted:
        for elements in skipped:  # in front of the parameter
            x = nn.Parameter(torch.ones(4 + elements, dtype=dtype)[elements:].view(2, 2))
            optimizer = make([x], lr=1e-3)
            optimizer.param_groups[0]["hyper_warmup"] = 0
            for _ in range(2):
                x.grad = torch.ones_like(x)
                optimizer.step()
    print(f"{len(COMPILED)} kernels compiled by Triton {triton.__version__}, traced by torch {torch.__version__}")


if __name__ == "__main__":
    main()
