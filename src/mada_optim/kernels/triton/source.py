"""Traced functions written out as Triton kernels: functions of tensors, of any number at once, and of numbers.

The kernel of tensors gets a table of 64-bit numbers, a column for each parameter: how many elements it has, the place
of its noise, and where its tensors begin in memory. A program of the kernel works on one tile, ``TILE`` elements of one
parameter, ``BLOCK`` at a time. It leaves one number for each result and tile, since a sum over all would depend on the
order of programs. What a trace does with its sums is linear in them, so it is done with the elements, before they are
summed: a derivative would be the sum of several sums otherwise, each with registers of its own.

A kernel of numbers is one program that computes one number after the other. That is little work, but as torch's
operators it would be a hundred launches.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mada_optim.kernels.traced.trace import Trace, is_number
from mada_optim.kernels.triton.expressions import HEADER, SAME, UnsupportedError, Writer, cast_to, type_name

aten = torch.ops.aten

# Rows of the table, and after them the tensors.
NUMEL, PLACE, COUNT, FIRST_TENSOR = range(4)
# Numbers of a parameter's step that kernels are given; the last is for alignment.
HEAD = 4

# Bytes that a thread reads at once.
ALIGNMENT = 16

# Neighbours that are added up at once: those of one thread, whose registers would not suffice for one sum each.
FOLD = 4
# Sums of tiles that are added up at once.
LANES = 1024
# One program for each result: it adds up what the tiles left, in an order of its own.
ADD_UP = """import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def run(partial, count, results, LANES: tl.constexpr):
    row = partial + tl.program_id(0) * count
    lane = tl.arange(0, LANES)
    lanes = tl.zeros([LANES], tl.float64)
    for start in range(0, count, LANES):
        lanes += tl.load(row + start + lane, mask=start + lane < count, other=0.0)
    tl.store(results + tl.program_id(0), tl.sum(lanes))
"""


def write_for_tensors(parts: Trace, roles: Sequence[str], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> str:
    """The kernel ``run(table, count, tiles, numbers, partial, TILE, BLOCK, ALIGNED)``: parts ``during`` and ``after``.

    ``count`` is the number of parameters; ``tiles``, shape (tiles, 2), says of each tile which parameter's it is, and
    which of these; ``numbers`` are ``parts.carried`` as float64, a row for each count of steps; ``partial``, shape
    (results, tiles), is for ``parts.results``, numbers and the components of vectors, summed over a tile. Tensors are
    read faster where all of a parameter's are aligned to ``ALIGNMENT`` bytes; with ``ALIGNED``, the kernel is for the
    tiles of these parameters, without for all others.

    Args:
        parts: what is computed.
        roles: of the tensors in the table.
        dtypes: of those that the function takes.
        dtype: of the arithmetic.

    Raises:
        UnsupportedError: it cannot be written.
    """
    writer = _TensorWriter(parts, dtypes, dtype)
    numbers = writer.read(parts.carried, "numbers")
    elements, results = writer.elements(), writer.results()
    lines = [
        "def run(",
        "    table, count, tiles, numbers, partial, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr",
        "):",
        "    tile = tl.program_id(0).to(tl.int64)",
        "    of = table + tl.load(tiles + 2 * tile)",
        "    first = tl.load(tiles + 2 * tile + 1).to(tl.int64) * TILE",
        f"    last = tl.minimum(first + TILE, tl.load(of + {NUMEL} * count))",
        f"    place = tl.load(of + {PLACE} * count)",
        f"    numbers += tl.load(of + {COUNT} * count) * {count_numbers(parts.carried)}",
    ]
    for k, (role, stored) in enumerate(dtypes.items()):
        lines += [
            f"    address{k} = tl.load(of + {FIRST_TENSOR + roles.index(role)} * count)  # {role!r}",
            f"    at{k} = address{k}.to(tl.pointer_type({type_name(stored)}))",
            f"    at{k} = tl.multiple_of(at{k}, {ALIGNMENT} if ALIGNED else 1)",
        ]
    lines += _indented(numbers, 1)
    addresses = " | ".join(f"address{k}" for k in range(len(dtypes)))
    lines += [f"    if (({addresses}) % {ALIGNMENT} == 0) != ALIGNED:", "        return"]
    lines += _indented(writer.constants(), 1)
    lines += [f"    sum{k} = tl.zeros([BLOCK // {FOLD}], {type_name(dtype)})" for k in range(len(results))]
    # Only the last block need ask for each element whether it is there: so asked, elements are read one by one.
    lines += [
        "    whole = first + (last - first) // BLOCK * BLOCK",
        "    for start in range(first, whole, BLOCK):",
        "        i = start + tl.arange(0, BLOCK)",
        *_indented(writer.block(elements, results, masked=False), 2),
        "    if whole < last:",
        "        i = whole + tl.arange(0, BLOCK)",
        "        there = i < last",
        *_indented(writer.block(elements, results, masked=True), 2),
    ]
    at = "partial + {k} * tl.num_programs(0) + tile"
    lines += [f"    tl.store({at.format(k=k)}, tl.sum(sum{k}.to(tl.float64)))" for k in range(len(results))]
    return HEADER + "\n".join([_jit("count"), *lines, ""])


def write_before(parts: Trace) -> str:
    """The kernel ``run(values, heads, numbers)`` for the part ``before``, a program for each count of steps.

    ``values`` and a row of ``heads`` are ``parts.given``: the first, and all others; a row of ``numbers`` is for
    ``parts.carried``. All are float64.
    """
    writer = _NumberWriter()
    first, *others = parts.given
    lines = [f"heads += tl.program_id(0) * {HEAD}", f"numbers += tl.program_id(0) * {count_numbers(parts.carried)}"]
    lines += [*writer.read([first], "values"), *writer.read(others, "heads"), *writer.lines(parts.before)]
    lines += writer.write(parts.carried, "numbers")
    return _number_kernel("values, heads, numbers", [*writer.constants(), *lines])


def write_for_numbers(traced: fx.GraphModule) -> str:
    """The kernel ``run(at0, at1, ...)`` for a function of small tensors, some of which it changes by ``copy_``."""
    writer = _NumberWriter()
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    others = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    lines = [line for k, node in enumerate(inputs) for line in writer.read([node], f"at{k}")]
    lines += writer.lines(others)
    return _number_kernel(", ".join(f"at{k}" for k in range(len(inputs))), [*writer.constants(), *lines])


def _number_kernel(arguments: str, lines: Iterable[str]) -> str:
    return HEADER + "\n".join([_jit(), f"def run({arguments}):", *_indented(lines, 1), ""])


def _jit(*counts: str) -> str:
    """The decorator; for other ``counts`` nothing is compiled anew."""
    return f"@triton.jit(do_not_specialize={list(counts)!r})"


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


class _NumberWriter(Writer):
    """Writes operations on numbers, and on short vectors of them component by component."""

    def __init__(self) -> None:
        super().__init__()
        self._pointers: dict[fx.Node, str] = {}

    def name(self, node: fx.Node) -> str:
        """A new name for a number."""
        self.names[node] = name = f"x{len(self.names)}"
        return name

    def read(self, nodes: Sequence[fx.Node], pointer: str) -> list[str]:
        """Lines that read numbers, or vectors, that lie one after the other."""
        lines: list[str] = []
        for node in nodes:
            self._pointers[node] = f"{pointer} + {len(lines)}"
            lines += [
                f"{name} = tl.load({self._pointers[node]} + {k}){cast_to(self.dtype(node))}"
                for k, name in enumerate(self._new(node))
            ]
        return lines

    def write(self, nodes: Sequence[fx.Node], pointer: str) -> list[str]:
        """Lines that store numbers, or vectors, one after the other, as float64."""
        names = [name for node in nodes for name in self._all(node)]
        return [f"tl.store({pointer} + {k}, {name}.to(tl.float64))" for k, name in enumerate(names)]

    def lines(self, nodes: Iterable[fx.Node]) -> list[str]:
        """Lines that compute the nodes."""
        return [line for node in nodes for line in self._lines(node)]

    def _lines(self, node: fx.Node) -> list[str]:
        target = node.target
        arguments: Any = node.args
        if target is aten.unbind.int:
            self.names[node] = self._all(arguments[0])
        elif target is aten.stack.default:
            self.names[node] = [name for source in arguments[0] for name in self._all(source)]
        elif target is operator.getitem:
            self.names[node] = self._all(arguments[0])[arguments[1]]
        elif target is aten.select.int:
            self.names[node] = self._all(arguments[0])[arguments[2]]
        elif target is aten.all.default:
            base = self.name(node)
            return [f"{base} = " + " & ".join(f"({name} != 0)" for name in self._all(arguments[0]))]
        elif target is aten.copy_.default:
            return [
                f"tl.store({self._pointers[arguments[0]]} + {k}, {name})"
                for k, name in enumerate(self._all(arguments[1]))
            ]
        elif target in SAME:
            self.names[node] = self.names[arguments[0]]
        else:
            return [f"{name} = {self._of(k, node)}" for k, name in enumerate(self._new(node))]
        return []

    def _new(self, node: fx.Node) -> list[str]:
        """New names for a node's components, of which a number is the only one."""
        base, value = self.name(node), node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() > 1:
            raise UnsupportedError(f"{node.target} gives {value}")
        if value.dim():
            self.names[node] = [f"{base}_{k}" for k in range(value.shape[0])]
        return self._all(node)

    def _of(self, component: int, node: fx.Node) -> str | None:
        self.component = component
        return self.expression(node)

    def _all(self, node: Any) -> list[str]:
        if not isinstance(node, fx.Node) or node not in self.names:
            raise UnsupportedError(f"operand {node!r}")
        names = self.names[node]
        return [names] if isinstance(names, str) else names


# Quotients of numbers, rounded correctly.
_QUOTIENTS = {torch.float32: "tl.div_rn({0}, {1})", torch.float64: "{0} / {1}"}


class _TensorWriter(_NumberWriter):
    """The elementwise part of a function, and what is done with its sums, done with the elements.

    Numbers take part in the precision of the arithmetic, as torch has it where a tensor meets a number.
    """

    def __init__(self, parts: Trace, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
        super().__init__()
        self._parts, self._dtype = parts, dtype
        self._places = {parts.tensors[role]: k for k, role in enumerate(dtypes)}
        self._loads: list[int] = []

    def narrow(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if dtype == torch.float64 else dtype

    def elements(self) -> list[str]:
        """Lines that compute on one block; ``{mask}`` stands where a mask belongs."""
        self.names[self._parts.place] = "place"
        for node, k in self._places.items():
            if any(user.target is not aten.copy_.default or user.args[0] is not node for user in node.users):
                self.names[node] = f"old{k}"
                self._loads.append(k)
        lines = [line for node in self._parts.during if (line := self._line(node))]
        return [*lines, *self.lines(self._parts.after)]

    def results(self) -> list[str]:
        """Return the names of what is summed, after :meth:`elements`."""
        return [name for node in self._parts.results for name in self._all(node)]

    def block(self, elements: Sequence[str], results: Sequence[str], masked: bool) -> list[str]:
        """Lines for one block of elements ``i``, which are ``there`` or not where ``masked``."""
        lines = [f"old{k} = tl.load(at{k} + i{', mask=there, other=0' if masked else ''})" for k in self._loads]
        lines += [line.replace("{mask}", ", mask=there" if masked else "") for line in elements]
        for k, name in enumerate(results):
            summed = f"tl.where(there, {name}, 0.0)" if masked else name
            summed = f"tl.broadcast_to({summed}, [BLOCK]).to({type_name(self._dtype)})"
            lines.append(f"sum{k} += tl.sum(tl.reshape({summed}, [BLOCK // {FOLD}, {FOLD}]), 1)")
        return lines

    def _line(self, node: fx.Node) -> str:
        if any(isinstance(self.names.get(source), list) for source in node.all_input_nodes):
            raise UnsupportedError(f"a vector of numbers: {node.all_input_nodes}")
        if node.target is aten.copy_.default:
            arguments: Any = node.args
            to, value = arguments
            if to is value:
                return ""
            if to not in self._places or not isinstance(value, fx.Node) or is_number(value) or node.users:
                raise UnsupportedError(f"{node.target} of {node.args}")
            dtype = type_name(to.meta["val"].dtype)
            return f"tl.store(at{self._places[to]} + i, {self.names[value]}.to({dtype}){{mask}})"
        if node in self._parts.sums:
            summed = node.all_input_nodes[0]
            if node.target is not aten.sum.default or is_number(summed):
                raise UnsupportedError(str(node.target))
            self.names[node] = self.names[summed]
            return ""
        if not isinstance(node.meta.get("val"), Tensor):
            return ""  # sizes are of no use here
        text = self.expression(node)
        if text is None:
            self.names[node] = self.names[node.all_input_nodes[0]]
            return ""
        return f"{self.name(node)} = {text}"

    def expression(self, node: fx.Node) -> str | None:
        if node.target is aten.arange.default:
            return "i"
        if node.target is aten.view.dtype:
            dtype = self.dtype(node)
            return f"{self.value(node.args[0], dtype)}.to({type_name(dtype)}, bitcast=True)"
        if node.target is aten.div.Tensor and self._is_by_number(node):
            one, value, number = (self.value(x, self._dtype) for x in (1.0, *node.args))
            return f"{value} * {_QUOTIENTS[self._dtype].format(one, number)}"
        return super().expression(node)

    def _is_by_number(self, quotient: fx.Node) -> bool:
        """Whether elements are divided by a number, both in the precision of the arithmetic.

        Its reciprocal is the same for all elements. To multiply by it is one instruction, to divide takes about six.
        """
        arguments: Any = quotient.args
        elements, number = arguments
        dtypes = {self.dtype(node) for node in quotient.all_input_nodes}
        return number in self._parts.carried and not is_number(elements) and dtypes == {self._dtype}


def count_numbers(nodes: Iterable[fx.Node]) -> int:
    """How many numbers they are; vectors are several."""
    return sum(int(node.meta["val"].numel()) for node in nodes)
