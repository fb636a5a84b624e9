"""Any elementwise family, turned into fused kernels by torch.compile: its own update and the derivative of that.

An update computes powers and quotients of coefficients and step counts beside its elementwise arithmetic. Compiled as
it stands, they would be computed again for each element. So a function is traced and cut in three first: what depends
on numbers alone, computed once for all parameters; the elementwise part with the sums in which it ends, which is
compiled; and what is done with the sums. Derivatives are linear in what they are pulled back from, and so is the last
part in the sums: it is done once, on their total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mada_optim.family import Family
from mada_optim.hypergradient import alignment_gradient
from mada_optim.kernels.base import Batch
from mada_optim.kernels.blocks import make_blocks
from mada_optim.kernels.plain import PlainKernels, number_tensor, spread, to_store
from mada_optim.kernels.rounding import noise_seed

SMALLEST = 1 << 13

Tensors = dict[str, Tensor]
# Tensors (changed in place), all coefficients, step, lr, weight decay, seed -> results
Pass = Callable[[Tensors, Tensor, Tensor, Tensor, Tensor, Tensor], list[Tensor]]


class CompiledKernels(PlainKernels):
    """Fused by torch.compile. Large tensors are handed over one by one, small ones put together.

    A function is compiled anew only for other dtypes, constants, or sets of learned coefficients.
    """

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._programs: dict[Any, _Program] = {}

    def settle(self, batch: Batch, values: Tensor, learned: Sequence[str], keep: bool) -> Tensor | None:  # noqa: ARG002
        """See :meth:`Kernels.settle`."""
        learned = [name for name in learned if batch.has_grad]
        names = self.family.buffers(self._q(batch, values))
        total = None
        if learned:
            sums = self._run(
                batch, values, batch.step, self._align(batch, learned), ("grad", "pending_grad", *names), ()
            )
            if sums:  # none where no parameter has an element
                total = spread(self.family, learned, sums[0].to(values.device))
        self._run(batch, values, batch.step, self._advance(batch), ("pending_grad", *names), names)
        return total

    def step(self, batch: Batch, values: Tensor, keep: bool) -> None:
        """See :meth:`Kernels.step`."""
        names = self.family.buffers(self._q(batch, values))
        kept = ("pending_grad",) if keep else names
        read = dict.fromkeys(("param", "grad", *names, *kept))
        self._run(batch, values, batch.step + 1, self._step(batch, keep), tuple(read), ("param", *kept))

    # What is compiled.

    def _align(self, batch: Batch, learned: Sequence[str]) -> Pass:
        def align(tensors: Tensors, values: Tensor, t: Tensor, *_: Tensor) -> list[Tensor]:
            q, state = self._read(batch, tensors, values)
            grad, next_grad = tensors["pending_grad"].to(batch.dtype), self._oriented(batch, tensors["grad"])
            return [alignment_gradient(self.family, state, grad, next_grad, q, learned, t)]

        return align

    def _advance(self, batch: Batch) -> Pass:
        def advance(tensors: Tensors, values: Tensor, t: Tensor, *others: Tensor) -> list[Tensor]:
            q, state = self._read(batch, tensors, values)
            _, advanced = self.family.update(state, tensors["pending_grad"].to(batch.dtype), q, t)
            self._store(batch, tensors, advanced, seed=others[-1])
            return []

        return advance

    def _step(self, batch: Batch, keep: bool) -> Pass:
        def step(
            tensors: Tensors, values: Tensor, t: Tensor, lr: Tensor, weight_decay: Tensor, seed: Tensor
        ) -> list[Tensor]:
            q, state = self._read(batch, tensors, values)
            grad = self._oriented(batch, tensors["grad"])
            direction, advanced = self.family.update(state, grad, q, t)
            shrunk = 1 - lr * weight_decay * self.family.decay_factor(q)
            param = tensors["param"].to(batch.dtype) * shrunk - lr * direction
            self._store(batch, tensors, {"param": param, **({"pending_grad": grad} if keep else advanced)}, seed)
            return []

        return step

    def _read(self, batch: Batch, tensors: Tensors, values: Tensor) -> tuple[dict[str, Any], Tensors]:
        q = self._q(batch, values)
        return q, {name: tensors[name].to(batch.dtype) for name in self.family.buffers(q)}

    @staticmethod
    def _oriented(batch: Batch, grad: Tensor) -> Tensor:
        return -grad.to(batch.dtype) if batch.group["maximize"] else grad.to(batch.dtype)

    def _store(self, batch: Batch, tensors: Tensors, values: Mapping[str, Tensor], seed: Tensor) -> None:
        for name, value in to_store(self.family, batch, values, tensors, seed).items():
            tensors[name].copy_(value)

    # How it is run.

    def _run(
        self,
        batch: Batch,
        values: Tensor,
        step: float | Tensor,
        function: Pass,
        read: Sequence[str],
        written: Sequence[str],
    ) -> list[Tensor]:
        """Apply a function to all parameters of a batch; its results are added up."""
        numbers = [
            values.to(batch.device),
            *(number_tensor(batch, x) for x in (step, batch.group["lr"], batch.group["weight_decay"])),
        ]
        program: _Program | None = None
        scalars: list[Tensor] = []
        totals: list[Tensor] = []
        for number, block in enumerate(make_blocks(batch.roles, elementwise=True, cut=False)):
            shared = {role: block.flat(role) for role in read}
            # An element that a zero gradient follows adds nothing to the hypergradient.
            tensors = {role: _pad(tensor.detach(), role == "grad") for role, (tensor, _) in shared.items()}
            seed = noise_seed(step, batch.index, number)
            if not isinstance(seed, Tensor):
                seed = torch.full((), seed, dtype=torch.int64, device=batch.device)
            if program is None:
                program = self._program(batch, function, tensors, [*numbers, seed])
                scalars = program.before(*numbers)
            sums = program.during(*tensors.values(), seed, *scalars)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
            for role in written:
                tensor, in_place = shared[role]
                if not in_place or tensor.numel() < SMALLEST:
                    block.write_flat(role, tensors[role][: tensor.numel()])
        return [] if program is None else program.after(*scalars, *totals)

    def _program(self, batch: Batch, function: Pass, tensors: Tensors, numbers: list[Tensor]) -> _Program:
        group = batch.group
        baked = {name: group[name] for name in (*self.family.constants, "special", "maximize", "stochastic_rounding")}
        learned = tuple(name for name, alpha in group["hyper_lr"].items() if alpha > 0.0)
        dtypes = tuple((role, tensor.dtype) for role, tensor in tensors.items())
        key = (function.__name__, repr(baked), learned, dtypes, batch.dtype, batch.device)
        if key not in self._programs:
            self._programs[key] = _Program(function, tensors, numbers, batch.dtype)
        return self._programs[key]


def _pad(tensor: Tensor, with_zeros: bool) -> Tensor:
    """Small tensors get to a size from which on torch.compile's kernels for sums do not depend on the size."""
    missing = SMALLEST - tensor.numel()
    if missing <= 0:
        return tensor
    last = tensor[-1:]
    return torch.cat([tensor, (torch.zeros_like(last) if with_zeros else last).expand(missing)])


class _Program:
    """A function cut in three; see the module.

    ``before`` takes the numbers; ``during`` the tensors, the seed and what ``before`` returned; ``after`` what
    ``before`` returned and the sums that ``during`` returned.

    Args:
        function: to be traced.
        tensors: 1-dimensional, all of the same size; the program will take any size from ``SMALLEST``.
        numbers: the function's other arguments; the last, the seed, differs from call to call.
        dtype: of the arithmetic.
    """

    def __init__(self, function: Pass, tensors: Tensors, numbers: Sequence[Tensor], dtype: torch.dtype) -> None:
        examples = {name: torch.empty_like(tensor[:2].repeat(4)) for name, tensor in tensors.items()}
        traced = make_fx(function, tracing_mode="symbolic")(examples, *numbers)
        nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
        inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
        varying, given = [*inputs[: len(tensors)], inputs[-1]], inputs[len(tensors) : -1]
        results = next(node for node in traced.graph.nodes if node.op == "output").all_input_nodes

        elementwise: set[fx.Node] = set(varying)
        summed: set[fx.Node] = set()
        stages: list[list[fx.Node]] = [[], [], []]
        for node in nodes:
            sources = set(node.all_input_nodes)
            if sources & summed:
                summed.add(node)
                stages[2].append(node)
            elif sources & elementwise:
                is_sum = _is_number(node) and any(map(_has_elements, sources))
                (summed if is_sum else elementwise).add(node)
                stages[1].append(node)
            else:
                stages[0].append(node)
        if any(
            source in elementwise and not _is_number(source) for node in stages[2] for source in node.all_input_nodes
        ):
            raise ValueError(
                "the family's update is not elementwise: an element depends on a sum over elements; "
                "it must say so by elementwise = False"
            )

        carried = _used([*given, *stages[0]], [*stages[1], *stages[2]], results)
        sums = _used(stages[1], stages[2], results)
        during = _module(traced, [*varying, *carried], stages[1], sums, dtype)
        self.during = torch.compile(during, dynamic=True, fullgraph=True)
        # Numbers on a GPU, where each of some hundred operations would be a launch.
        on_numbers = partial(torch.compile, fullgraph=True) if numbers[0].is_cuda else _as_it_is
        self.before = on_numbers(_module(traced, given, stages[0], carried))
        self.after = on_numbers(_module(traced, [*carried, *sums], stages[2], results))


def _as_it_is(module: fx.GraphModule) -> fx.GraphModule:
    return module


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def _has_elements(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0


def _used(produced: Iterable[fx.Node], by: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """Which of the produced values are needed elsewhere."""
    wanted = {source for node in by for source in node.all_input_nodes} | set(results)
    return [node for node in produced if node in wanted]


def _module(
    traced: fx.GraphModule,
    inputs: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    dtype: torch.dtype | None = None,
) -> fx.GraphModule:
    """Part of a traced function as a function of its own, from a list of tensors to a list of tensors.

    With ``dtype``, numbers in higher precision are converted to it at once, as each operation on a tensor would do.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(dict.fromkeys(inputs)):
        copies[node] = graph.placeholder(f"x{number}")
        if dtype == torch.float32 and _is_number(node) and node.meta["val"].dtype == torch.float64:
            copies[node] = graph.call_method("to", (copies[node], dtype))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return fx.GraphModule(traced, graph)
