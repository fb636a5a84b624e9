"""Traced functions written out as Triton kernels: of tensors, for any number of parameters at once, and of numbers.

The kernel of tensors gets a table of 64-bit numbers, a column for each parameter: how many elements it has, the seeds
of its noise, and where its tensors begin in memory. A program of the kernel works on one tile, ``TILE`` elements of one
parameter, ``BLOCK`` at a time. What ends in a sum is left as one number for each tile, since a sum over all would
depend on the order of programs.

A kernel of numbers is one program that computes one number after the other, and adds up what the tiles left. That is
little work, but as torch's operators it would be a hundred launches.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from mada_optim.kernels.trace import Trace, is_number

aten = torch.ops.aten

# Rows of the table; the seeds of a step t and of step t+1, and after them the tensors.
NUMEL, SEED, _, FIRST_TENSOR = range(4)

# Neighbours that are added up at once: those of one thread, whose registers would not suffice for one sum each.
FOLD = 4
# Sums of tiles that are added up at once.
LANES = 1024

TYPES = {
    torch.bool: "tl.int1",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}

_HEADER = """import triton
import triton.language as tl


@triton.jit
def power(x, y):
    size = tl.where(y == 0, 1.0, tl.exp(y * tl.log(tl.abs(x))))
    odd = tl.floor(y) != 2 * tl.floor(y / 2)
    return tl.where(x < 0, tl.where(tl.floor(y) != y, float("nan"), tl.where(odd, -size, size)), size)


"""

_UNARY = {
    aten.neg.default: "-{0}",
    aten.abs.default: "tl.abs({0})",
    aten.sqrt.default: "{root}({0})",
    aten.rsqrt.default: "1.0 / {root}({0})",
    aten.reciprocal.default: "1.0 / {0}",
    aten.exp.default: "tl.exp({0})",
    aten.log.default: "tl.log({0})",
    aten.sigmoid.default: "1.0 / (1.0 + tl.exp(-{0}))",
    aten.tanh.default: "2.0 / (1.0 + tl.exp(-2.0 * {0})) - 1.0",
    aten.relu.default: "tl.where({0} < 0.0, 0.0, {0})",
    # NaN is neither above nor below: its sign is 0, as torch's.
    aten.sign.default: "({0} > 0).to({type}) - ({0} < 0).to({type})",
    aten.sgn.default: "({0} > 0).to({type}) - ({0} < 0).to({type})",
    aten.logical_not.default: "{0} == 0",
    aten.bitwise_not.default: "~{0}",
}
# Of three operands, most of which derivatives need.
_TERNARY = {
    aten.masked_fill.Scalar: "tl.where({1}, {2}, {0})",
    aten.threshold_backward.default: "tl.where({1} <= {2}, 0.0, {0})",
}
_BINARY = {
    "sigmoid_backward": "{0} * (1.0 - {1}) * {1}",
    "tanh_backward": "{0} * (1.0 - {1} * {1})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rsub": "{1} - {0}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "pow": "power({0}, {1})",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "__rshift__": "{0} >> {1}",
    "__lshift__": "{0} << {1}",
    "logical_and": "({0} != 0) & ({1} != 0)",
    "logical_or": "({0} != 0) | ({1} != 0)",
    # Of a NaN and a number, torch takes the NaN.
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
}
# Exponents that are constants.
_POWERS: dict[Any, str] = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "{root}({0})", -1: "1.0 / {0}"}
# Not what rounds subnormal numbers to 0, which are not 0 when they are compared.
_ROOTS = {torch.float32: "tl.sqrt_rn", torch.float64: "tl.sqrt"}
_OF_INTEGERS = (aten.neg.default, aten.abs.default, aten.sign.default, aten.sgn.default)
_OF_BOOLS = (aten.logical_not.default, aten.bitwise_not.default)
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow")
# Derivatives do these in place, on what nothing else reads.
_IN_PLACE = {
    aten.logical_and_.default: aten.logical_and.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
}
_SAME = (aten.detach.default, aten.clone.default, aten.alias.default, aten.view.default, aten.lift_fresh_copy.default)
_CONSTANT = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
_WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_CLAMP = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


class UnsupportedError(Exception):
    """An operation for which there is no Triton here."""


def write_for_tensors(
    parts: Trace, roles: Sequence[str], dtypes: Mapping[str, torch.dtype], dtype: torch.dtype, later: bool
) -> str:
    """The kernel ``run(table, count, tiles, numbers, partial, TILE, BLOCK, ALIGNED)`` for the part ``during``.

    ``count`` is the number of parameters; ``tiles``, shape (tiles, 2), says of each tile which parameter's it is, and
    which of these; ``numbers`` are ``parts.carried`` as float64; ``partial``, shape (sums, tiles), is for
    ``parts.sums``.

    Args:
        parts: what is computed.
        roles: of the tensors in the table.
        dtypes: of those that the function takes.
        dtype: of the arithmetic.
        later: whether the noise is that of step t+1.

    Raises:
        UnsupportedError: it cannot be written.
    """
    writer = _TensorWriter(parts, dtypes, dtype)
    elements, count = writer.elements(), len(parts.sums)
    lines = [
        "def run(",
        "    table, count, tiles, numbers, partial, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr",
        "):",
        "    tile = tl.program_id(0).to(tl.int64)",
        "    of = table + tl.load(tiles + 2 * tile)",
        "    first = tl.load(tiles + 2 * tile + 1).to(tl.int64) * TILE",
        f"    last = tl.minimum(first + TILE, tl.load(of + {NUMEL} * count))",
        f"    seed = tl.load(of + {SEED + later} * count)",
    ]
    for k, (role, stored) in enumerate(dtypes.items()):
        row = FIRST_TENSOR + roles.index(role)
        lines += [f"    at{k} = tl.load(of + {row} * count).to(tl.pointer_type({type_name(stored)}))  # {role!r}"]
    lines += ["    if ALIGNED:"]
    lines += [f"        at{k} = tl.multiple_of(at{k}, 16)" for k in range(len(dtypes))]
    lines += _indented([*writer.read(parts.carried, "numbers"), *writer.constants()], 1)
    lines += [f"    sum{k} = tl.zeros([BLOCK // {FOLD}], {type_name(dtype)})" for k in range(count)]
    # Only the last block need ask for each element whether it is there: so asked, elements are read one by one.
    lines += ["    whole = first + (last - first) // BLOCK * BLOCK"]
    lines += ["    for start in range(first, whole, BLOCK):", "        i = start + tl.arange(0, BLOCK)"]
    lines += _indented(writer.block(elements, masked=False), 2)
    lines += ["    if whole < last:", "        i = whole + tl.arange(0, BLOCK)", "        there = i < last"]
    lines += _indented(writer.block(elements, masked=True), 2)
    at = "partial + {k} * tl.num_programs(0) + tile"
    lines += [f"    tl.store({at.format(k=k)}, tl.sum(sum{k}.to(tl.float64)))" for k in range(count)]
    return _HEADER + "\n".join([_jit("count"), *lines, ""])


def write_before(parts: Trace) -> str:
    """The kernel ``run(values, others, numbers)`` for the part ``before``.

    ``values`` and ``others`` are ``parts.given``: the first, and all others as one tensor; ``numbers`` is for
    ``parts.carried``. All are float64.
    """
    writer = _NumberWriter()
    first, *others = parts.given
    lines = [*writer.read([first], "values"), *writer.read(others, "others"), *writer.lines(parts.before)]
    lines += writer.write(parts.carried, "numbers")
    return _number_kernel("values, others, numbers", [*writer.constants(), *lines])


def write_after(parts: Trace) -> str:
    """The kernel ``run(numbers, partial, count, results)`` for the part ``after``.

    ``numbers`` and ``partial`` are as :func:`write_for_tensors` has them, ``count`` is the number of tiles.
    """
    writer = _NumberWriter()
    lines = ["lane = tl.arange(0, LANES)"]
    for k, node in enumerate(parts.sums):
        lines += [
            f"lanes{k} = tl.zeros([LANES], tl.float64)",
            "for start in range(0, count, LANES):",
            f"    lanes{k} += tl.load(partial + {k} * count + start + lane, mask=start + lane < count, other=0.0)",
            f"{writer.name(node)} = tl.sum(lanes{k})",
        ]
    lines += [*writer.read(parts.carried, "numbers"), *writer.lines(parts.after)]
    lines += writer.write(parts.results, "results")
    return _number_kernel("numbers, partial, count, results, LANES: tl.constexpr", [*writer.constants(), *lines])


def write_for_numbers(traced: fx.GraphModule) -> str:
    """The kernel ``run(at0, at1, ...)`` for a function of small tensors, some of which it changes by ``copy_``."""
    writer = _NumberWriter()
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    others = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    lines = [line for k, node in enumerate(inputs) for line in writer.read([node], f"at{k}")]
    lines += writer.lines(others)
    return _number_kernel(", ".join(f"at{k}" for k in range(len(inputs))), [*writer.constants(), *lines])


def _number_kernel(arguments: str, lines: Iterable[str]) -> str:
    jit = _jit("count") if "count" in arguments else _jit()
    return _HEADER + "\n".join([jit, f"def run({arguments}):", *_indented(lines, 1), ""])


def _jit(*counts: str) -> str:
    """The decorator; for other ``counts`` nothing is compiled anew."""
    return f"@triton.jit(do_not_specialize={list(counts)!r})"


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["    " * depth + line for line in lines]


class _Writer:
    """Expressions. A node's value has a name, or one for each component where it is a vector of numbers."""

    def __init__(self) -> None:
        self._names: dict[fx.Node, str | list[str]] = {}
        self._constants: dict[tuple[str, torch.dtype], str] = {}
        self._component = 0

    def constants(self) -> list[str]:
        """Lines that define the constants of what has been written."""
        lines = []
        for (value, dtype), name in self._constants.items():
            text = value if value[-1].isdigit() else f'float("{value}")'  # inf, nan
            lines.append(f"{name} = tl.full([], {text}, {type_name(dtype)})")
        return lines

    def expression(self, node: fx.Node) -> str | None:
        """What computes a node, or one component of it; None where that has a name already."""
        target, dtype = node.target, self.dtype(node)
        if target in _IN_PLACE:
            changed = node.all_input_nodes[0]
            if changed.op == "placeholder" or len(changed.users) > 1:
                raise UnsupportedError(f"{target}, of what is used elsewhere")
            target = _IN_PLACE[target]
        if node.meta["val"].dim() > 1:
            raise UnsupportedError(f"{target} gives {node.meta['val']}")
        if target in _SAME:
            return None
        if target is aten._to_copy.default:
            return self._value(node.args[0], dtype) + _as(dtype)
        if target is aten.scalar_tensor.default:
            return self._value(node.args[0], dtype)
        if target in _CONSTANT or target is aten.full_like.default:
            return self._value(_CONSTANT.get(target, node.args[-1]), dtype)
        if target in _WHERE:
            condition, one, other = node.args
            sides = f"{self._value(one, dtype)}, {self._value(other, dtype)}"
            return f"tl.where({self._value(condition, torch.bool)}, {sides})"
        if target in _CLAMP:
            return self._clamp(node, dtype)
        if target in _UNARY:
            return self._unary(node, dtype)
        if target in _TERNARY:
            return _TERNARY[target].format(*(self._value(x, dtype) for x in node.args))
        return self._binary(node, target)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """In which a node is computed."""
        dtype: torch.dtype = node.meta["val"].dtype
        return self._narrow(dtype) if is_number(node) else dtype

    def _narrow(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _unary(self, node: fx.Node, dtype: torch.dtype) -> str:
        target: Any = node.target
        given = node.all_input_nodes[0].meta["val"].dtype
        of_bool = given == torch.bool and target not in _OF_BOOLS
        if of_bool or not (given.is_floating_point or target in (*_OF_INTEGERS, *_OF_BOOLS)):
            raise UnsupportedError(f"{target} of {given}")
        text = _UNARY[target]
        root = self._root(dtype) if "{root}" in text else ""
        return text.format(self._value(node.args[0], dtype), type=type_name(dtype), root=root)

    @staticmethod
    def _root(dtype: torch.dtype) -> str:
        if dtype not in _ROOTS:
            raise UnsupportedError(f"a root in {dtype}")
        return _ROOTS[dtype]

    def _binary(self, node: fx.Node, target: Any) -> str:
        schema = getattr(target, "_schema", None)
        name = schema.name.removeprefix("aten::") if schema else str(target)
        if name not in _BINARY or len(node.args) != 2 or any(value not in (None, 1) for value in node.kwargs.values()):
            raise UnsupportedError(f"{node.target}, arguments {node.args}, {node.kwargs}")
        one, other = (x.meta["val"] if isinstance(x, fx.Node) else cast("float", x) for x in node.args)
        common = torch.result_type(one, other)
        if common == torch.bool and name == "mul":
            name = "bitwise_and"
        if (common == torch.bool and name in _ARITHMETIC) or (name == "pow" and not common.is_floating_point):
            raise UnsupportedError(f"{name} of {common}")
        if name == "pow" and not isinstance(other, Tensor) and other in _POWERS:
            root = self._root(self._narrow(common)) if other == 0.5 else ""
            return _POWERS[other].format(self._value(node.args[0], self._narrow(common)), root=root)
        return _BINARY[name].format(*(self._value(x, self._narrow(common)) for x in node.args))

    def _clamp(self, node: fx.Node, dtype: torch.dtype) -> str:
        text = self._value(node.args[0], dtype)
        low, high = (*node.args[1:], *(node.kwargs.get(key) for key in ("min", "max")))[:2]
        if node.target is aten.clamp_max.default:
            low, high = None, low
        for limit, sign in ((low, "<"), (high, ">")):
            if limit is not None:
                bound = self._value(limit, dtype)
                text = f"tl.where({text} {sign} {bound}, {bound}, {text})"
        return text

    def _value(self, x: Any, dtype: torch.dtype) -> str:
        """An operand."""
        if isinstance(x, fx.Node) and x in self._names:
            name = self._names[x]
            return name if isinstance(name, str) else name[self._component]
        if isinstance(x, (bool, int, float)):
            number = float(x) if dtype.is_floating_point else int(x)
            if dtype == torch.bool or (dtype == torch.int32 and not -(1 << 31) <= number < 1 << 31):
                dtype = torch.int64
            return self._constants.setdefault((repr(number), dtype), f"c{len(self._constants)}")
        raise UnsupportedError(f"operand {x!r}")


class _TensorWriter(_Writer):
    """The elementwise part of a function.

    Numbers take part in the precision of the arithmetic, as torch has it where a tensor meets a number.
    """

    def __init__(self, parts: Trace, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
        super().__init__()
        self._parts, self._dtype = parts, dtype
        self._places = {parts.tensors[role]: k for k, role in enumerate(dtypes)}
        self._loads: list[int] = []

    def _narrow(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if dtype == torch.float64 else dtype

    def read(self, numbers: Sequence[fx.Node], pointer: str) -> list[str]:
        """Lines that read those numbers that are used, after :meth:`elements`."""
        used = {source for node in self._parts.during for source in node.all_input_nodes}
        lines = []
        for k, node in enumerate(numbers):
            if node in used:
                if not is_number(node):
                    raise UnsupportedError(f"a vector of numbers: {node}")
                at = count_numbers(numbers[:k])
                lines.append(f"{self._names[node]} = tl.load({pointer} + {at}){_as(self.dtype(node))}")
        return lines

    def elements(self) -> list[str]:
        """Lines that compute on one block; ``{mask}`` stands where a mask belongs."""
        self._names[self._parts.seed] = "seed"
        self._names |= {node: f"n{k}" for k, node in enumerate(self._parts.carried)}
        for node, k in self._places.items():
            if any(user.target is not aten.copy_.default or user.args[0] is not node for user in node.users):
                self._names[node] = f"old{k}"
                self._loads.append(k)
        return [line for node in self._parts.during if (line := self._line(node))]

    def block(self, elements: Sequence[str], masked: bool) -> list[str]:
        """Lines for one block of elements ``i``, which are ``there`` or not where ``masked``."""
        lines = [f"old{k} = tl.load(at{k} + i{', mask=there, other=0' if masked else ''})" for k in self._loads]
        lines += [line.replace("{mask}", ", mask=there" if masked else "") for line in elements]
        for k, node in enumerate(self._parts.sums):
            summed = self._names[node.all_input_nodes[0]]
            if node.target is not aten.sum.default or is_number(node.all_input_nodes[0]):
                raise UnsupportedError(str(node.target))
            summed = f"tl.where(there, {summed}, 0.0)" if masked else summed
            summed = f"tl.broadcast_to({summed}, [BLOCK]).to({type_name(self._dtype)})"
            lines.append(f"sum{k} += tl.sum(tl.reshape({summed}, [BLOCK // {FOLD}, {FOLD}]), 1)")
        return lines

    def _line(self, node: fx.Node) -> str:
        if node.target is aten.copy_.default:
            arguments: Any = node.args
            to, value = arguments
            if to is value:
                return ""
            if to not in self._places or not isinstance(value, fx.Node) or is_number(value) or node.users:
                raise UnsupportedError(f"{node.target} of {node.args}")
            dtype = type_name(to.meta["val"].dtype)
            return f"tl.store(at{self._places[to]} + i, {self._names[value]}.to({dtype}){{mask}})"
        if node in self._parts.sums or not isinstance(node.meta.get("val"), Tensor):
            return ""  # sizes are of no use here
        text = self.expression(node)
        if text is None:
            self._names[node] = self._names[node.all_input_nodes[0]]
            return ""
        self._names[node] = f"x{len(self._names)}"
        return f"{self._names[node]} = {text}"

    def expression(self, node: fx.Node) -> str | None:
        if node.target is aten.arange.default:
            return "i"
        if node.target is aten.view.dtype:
            dtype = self.dtype(node)
            return f"{self._value(node.args[0], dtype)}.to({type_name(dtype)}, bitcast=True)"
        return super().expression(node)


class _NumberWriter(_Writer):
    """Numbers, and short vectors of them, component by component."""

    def __init__(self) -> None:
        super().__init__()
        self._pointers: dict[fx.Node, str] = {}

    def name(self, node: fx.Node) -> str:
        """A new name for a number."""
        self._names[node] = name = f"x{len(self._names)}"
        return name

    def read(self, nodes: Sequence[fx.Node], pointer: str) -> list[str]:
        """Lines that read numbers, or vectors, that lie one after the other."""
        lines: list[str] = []
        for node in nodes:
            self._pointers[node] = f"{pointer} + {len(lines)}"
            lines += [
                f"{name} = tl.load({self._pointers[node]} + {k}){_as(self.dtype(node))}"
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
            self._names[node] = self._all(arguments[0])
        elif target is aten.stack.default:
            self._names[node] = [name for source in arguments[0] for name in self._all(source)]
        elif target is operator.getitem:
            self._names[node] = self._all(arguments[0])[arguments[1]]
        elif target is aten.select.int:
            self._names[node] = self._all(arguments[0])[arguments[2]]
        elif target is aten.all.default:
            base = self.name(node)
            return [f"{base} = " + " & ".join(f"({name} != 0)" for name in self._all(arguments[0]))]
        elif target is aten.copy_.default:
            return [
                f"tl.store({self._pointers[arguments[0]]} + {k}, {name})"
                for k, name in enumerate(self._all(arguments[1]))
            ]
        elif target in _SAME:
            self._names[node] = self._names[arguments[0]]
        else:
            return [f"{name} = {self._of(k, node)}" for k, name in enumerate(self._new(node))]
        return []

    def _new(self, node: fx.Node) -> list[str]:
        """New names for a node's components, of which a number is the only one."""
        base, value = self.name(node), node.meta["val"]
        if not isinstance(value, Tensor) or value.dim() > 1:
            raise UnsupportedError(f"{node.target} gives {value}")
        if value.dim():
            self._names[node] = [f"{base}_{k}" for k in range(value.shape[0])]
        return self._all(node)

    def _of(self, component: int, node: fx.Node) -> str | None:
        self._component = component
        return self.expression(node)

    def _all(self, node: Any) -> list[str]:
        if not isinstance(node, fx.Node) or node not in self._names:
            raise UnsupportedError(f"operand {node!r}")
        names = self._names[node]
        return [names] if isinstance(names, str) else names


def count_numbers(nodes: Iterable[fx.Node]) -> int:
    """How many numbers they are; vectors are several."""
    return sum(int(node.meta["val"].numel()) for node in nodes)


def type_name(dtype: torch.dtype) -> str:
    """Triton's name of it; raises :class:`UnsupportedError` where there is none here."""
    if dtype not in TYPES:
        raise UnsupportedError(f"{dtype}")
    return TYPES[dtype]


def _as(dtype: torch.dtype) -> str:
    return " != 0" if dtype == torch.bool else f".to({type_name(dtype)})"
