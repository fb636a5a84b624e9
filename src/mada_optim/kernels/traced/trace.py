"""A function of tensors and numbers, traced and cut in three.

An update computes powers and quotients of coefficients and step counts beside its elementwise arithmetic. Compiled as
it stands, they would be computed again for each element. So a function is cut into what depends on numbers alone,
computed once for all parameters; the elementwise part with the sums in which it ends; and what is done with the sums.
Derivatives are linear in what they are pulled back from, and so is the last part in the sums: it is done once, on their
total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Tensors = dict[str, Tensor]
# Tensors (changed in place), all coefficients, step, lr, weight decay, place of the noise -> results
Function = Callable[[Tensors, Tensor, Tensor, Tensor, Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Trace:
    """The nodes of a function's three parts, and what they hand on.

    Args:
        traced: all of it.
        tensors: the tensors that it takes, by name.
        place: the last of the numbers that it takes: of the noise, which differs from call to call.
        given: the other numbers.
        before, during, after: what is done with ``given``; with ``tensors`` and ``place``; with the sums. First come
            the constants that a part needs.
        carried: numbers that ``before`` is given or makes and the others need.
        sums: that ``during`` makes.
        results: of the function.
    """

    traced: fx.GraphModule
    tensors: dict[str, fx.Node]
    place: fx.Node
    given: list[fx.Node]
    before: list[fx.Node]
    during: list[fx.Node]
    after: list[fx.Node]
    carried: list[fx.Node]
    sums: list[fx.Node]
    results: list[fx.Node]

    def module(
        self,
        inputs: Sequence[fx.Node],
        nodes: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        dtype: torch.dtype | None = None,
    ) -> fx.GraphModule:
        """A part as a function of its own, from a list of tensors to a list of tensors.

        With ``dtype``, numbers in higher precision are converted to it at once, as each operation on a tensor would do.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(dict.fromkeys(inputs)):
            copies[node] = graph.placeholder(f"x{number}")
            if dtype == torch.float32 and is_number(node) and node.meta["val"].dtype == torch.float64:
                copies[node] = graph.call_method("to", (copies[node], dtype))
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[node] for node in outputs])
        return fx.GraphModule(self.traced, graph)


def trace(function: Function, tensors: Tensors, numbers: Sequence[Tensor]) -> Trace:
    """Trace a function and cut it.

    Args:
        function: to be traced.
        tensors: 1-dimensional, all of the same size; the trace holds for any size.
        numbers: the function's other arguments.

    Raises:
        ValueError: an element depends on a sum over elements.
    """
    # No vector of numbers has this size. The tracer takes equal sizes for the same one, and fixes those of vectors.
    size = 8 + max(number.numel() for number in numbers)
    examples = {name: tensor.new_empty(size) for name, tensor in tensors.items()}
    traced = make_fx(function, tracing_mode="symbolic")(examples, *numbers)
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    varying, given, place = inputs[: len(tensors)], inputs[len(tensors) : -1], inputs[-1]
    results = next(node for node in traced.graph.nodes if node.op == "output").all_input_nodes

    elementwise: set[fx.Node] = {*varying, place}
    summed: set[fx.Node] = set()
    constants: list[fx.Node] = []
    before: list[fx.Node] = []
    during: list[fx.Node] = []
    after: list[fx.Node] = []
    for node in nodes:
        sources = set(node.all_input_nodes)
        if sources & summed:
            summed.add(node)
            after.append(node)
        elif sources & elementwise:
            is_sum = is_number(node) and any(map(_has_elements, sources))
            (summed if is_sum else elementwise).add(node)
            during.append(node)
        elif sources:
            before.append(node)
        else:
            constants.append(node)
    if any(source in elementwise and not is_number(source) for node in after for source in node.all_input_nodes):
        raise ValueError(
            "the family's update is not elementwise: an element depends on a sum over elements; "
            "it must say so by elementwise = False"
        )
    # Each part makes the constants that it needs, which would be read from memory otherwise.
    before, during = ([*_used(constants, part), *part] for part in (before, during))
    after = [*_used(constants, after, results), *after]
    carried = _used([*given, *before], [*during, *after], results)
    sums = _used(during, after, results)
    by_name = dict(zip(tensors, varying, strict=True))
    return Trace(traced, by_name, place, given, before, during, after, carried, sums, results)


def is_number(node: fx.Node) -> bool:
    """Whether a node's value is a 0-dimensional tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 0


def _has_elements(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0


def _used(produced: Iterable[fx.Node], by: Sequence[fx.Node], results: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """Which of the produced values are needed elsewhere."""
    wanted = {source for node in by for source in node.all_input_nodes} | set(results)
    return [node for node in produced if node in wanted]
