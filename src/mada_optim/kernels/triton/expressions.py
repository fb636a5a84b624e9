"""What each operation of a traced function is in Triton."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from mada_optim.kernels.traced.trace import is_number

aten = torch.ops.aten

TYPES = {
    torch.bool: "tl.int1",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}

# What expressions need beside Triton.
HEADER = """import triton
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
    aten.isnan.default: "{0} != {0}",
    aten.logical_not.default: "{0} == 0",
    aten.bitwise_not.default: "~{0}",
}
# Operations of three operands, most of which derivatives need.
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
    # torch takes the NaN where the other operand is a number.
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
SAME = (aten.detach.default, aten.clone.default, aten.alias.default, aten.view.default, aten.lift_fresh_copy.default)
_CONSTANT = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
_WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_CLAMP = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


class UnsupportedError(Exception):
    """An operation for which there is no Triton here."""


class Writer:
    """Writes the operations of a traced function as expressions of Triton.

    Attributes:
        names: of the values of nodes; one for each component where the value is a vector of numbers.
        component: which of them expressions are about.
    """

    def __init__(self) -> None:
        self.names: dict[fx.Node, str | list[str]] = {}
        self._constants: dict[tuple[str, torch.dtype], str] = {}
        self.component = 0

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
        if target in SAME:
            return None
        if target is aten._to_copy.default:
            return self.value(node.args[0], dtype) + cast_to(dtype)
        if target is aten.scalar_tensor.default:
            return self.value(node.args[0], dtype)
        if target in _CONSTANT or target is aten.full_like.default:
            return self.value(_CONSTANT.get(target, node.args[-1]), dtype)
        if target in _WHERE:
            condition, one, other = node.args
            sides = f"{self.value(one, dtype)}, {self.value(other, dtype)}"
            return f"tl.where({self.value(condition, torch.bool)}, {sides})"
        if target in _CLAMP:
            return self._clamp(node, dtype)
        if target in _UNARY:
            return self._unary(node, dtype)
        if target in _TERNARY:
            return _TERNARY[target].format(*(self.value(x, dtype) for x in node.args))
        return self._binary(node, target)

    def dtype(self, node: fx.Node) -> torch.dtype:
        """Return the dtype in which a node is computed."""
        dtype: torch.dtype = node.meta["val"].dtype
        return self.narrow(dtype) if is_number(node) else dtype

    def narrow(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def _unary(self, node: fx.Node, dtype: torch.dtype) -> str:
        target: Any = node.target
        given = node.all_input_nodes[0].meta["val"].dtype
        of_bool = given == torch.bool and target not in _OF_BOOLS
        if of_bool or not (given.is_floating_point or target in (*_OF_INTEGERS, *_OF_BOOLS)):
            raise UnsupportedError(f"{target} of {given}")
        text = _UNARY[target]
        root = self._root(dtype) if "{root}" in text else ""
        return text.format(self.value(node.args[0], dtype), type=type_name(dtype), root=root)

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
            root = self._root(self.narrow(common)) if other == 0.5 else ""
            return _POWERS[other].format(self.value(node.args[0], self.narrow(common)), root=root)
        return _BINARY[name].format(*(self.value(x, self.narrow(common)) for x in node.args))

    def _clamp(self, node: fx.Node, dtype: torch.dtype) -> str:
        text = self.value(node.args[0], dtype)
        limits = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
        low, high = limits.get("min"), limits.get("max")
        if node.target is aten.clamp_max.default:
            low, high = None, low
        for limit, sign in ((low, "<"), (high, ">")):
            if limit is not None:
                bound = self.value(limit, dtype)
                text = f"tl.where({text} {sign} {bound}, {bound}, {text})"
        return text

    def value(self, x: Any, dtype: torch.dtype) -> str:
        """Return an operand as an expression."""
        if isinstance(x, fx.Node) and x in self.names:
            name = self.names[x]
            return name if isinstance(name, str) else name[self.component]
        if isinstance(x, (bool, int, float)):
            number = float(x) if dtype.is_floating_point else int(x)
            if dtype == torch.bool or (dtype == torch.int32 and not -(1 << 31) <= number < 1 << 31):
                dtype = torch.int64
            return self._constants.setdefault((repr(number), dtype), f"c{len(self._constants)}")
        raise UnsupportedError(f"operand {x!r}")


def type_name(dtype: torch.dtype) -> str:
    """Return Triton's name of a dtype. Raise :class:`UnsupportedError` where there is none here."""
    if dtype not in TYPES:
        raise UnsupportedError(f"{dtype}")
    return TYPES[dtype]


def cast_to(dtype: torch.dtype) -> str:
    """What to put behind a value to convert it."""
    return " != 0" if dtype == torch.bool else f".to({type_name(dtype)})"
