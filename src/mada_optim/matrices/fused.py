"""Projections that hold several matrices: which modules have some, and how these lie in the weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor, nn

from mada_optim.matrices.layout import Layout
from mada_optim.matrices.uses import Use, integer_of


@dataclass(frozen=True)
class Projection:
    """A linear map as its module calls it.

    Args:
        role: its name in the module around it.
        use: of its weight, or of the weight of an adapter of it.
        outputs: length of what it returns.
        inputs: length of what it takes.
    """

    role: str
    parent: nn.Module
    use: Use
    outputs: int
    inputs: int

    def number(self, *names: str) -> int | None:
        """See :meth:`Use.number`; the module around the projection comes first."""
        return integer_of(self.parent, names) or self.use.number(*names)


Parts = tuple[tuple[int, ...], int]  # relative sizes, and how often the pattern repeats


@dataclass(frozen=True)
class Fused:
    """One kind of fused projection.

    Args:
        roles: names of the projection in the module around it.
        classes: regular expression that the class of the module around it, or of one of its bases, matches.
        parts: what lies in it; None: not what the names say.
        why: what :func:`mada_optim.describe` prints.
    """

    roles: tuple[str, ...]
    classes: str
    parts: Callable[[Projection], Parts | None]
    why: str


HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "nheads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups")


def _thirds(projection: Projection) -> Parts | None:
    heads, width = projection.number(*HEADS), projection.number("head_dim", "attention_head_size")
    lengths = {projection.inputs, (heads or 0) * (width or 0), projection.number("all_head_size", "dim_out") or 0}
    return ((1, 1, 1), 1) if projection.outputs in {3 * length for length in lengths} else None


def _halves(projection: Projection) -> Parts | None:
    return ((1, 1), 1) if projection.outputs % 2 == 0 else None


def _each_head(projection: Projection) -> Parts | None:
    heads = projection.number(*HEADS)
    return ((1, 1, 1), heads) if heads and projection.outputs % (3 * heads) == 0 else None


def _query_groups(projection: Projection) -> Parts | None:
    heads, key_heads = projection.number(*HEADS), projection.number(*KEY_HEADS)
    if heads and key_heads and heads != key_heads:
        count, width = heads + 2 * key_heads, projection.number("head_dim")
        if projection.outputs == count * width if width else projection.outputs % count == 0:
            return (heads, key_heads, key_heads), 1
    return _thirds(projection)


def _query_and_gate(projection: Projection) -> Parts | None:
    heads, width = projection.number(*HEADS), projection.number("head_dim")
    return ((1, 1), heads) if heads and width and projection.outputs == 2 * heads * width else None


def _cross(projection: Projection) -> Parts | None:
    return _halves(projection) if projection.outputs == 2 * projection.inputs else None


def _bigcode(projection: Projection) -> Parts | None:
    heads = projection.number(*HEADS)
    if getattr(projection.parent, "multi_query", False) and heads:
        return ((heads, 1, 1), 1) if projection.outputs % (heads + 2) == 0 else _halves(projection)
    return _each_head(projection)


def _falcon(projection: Projection) -> Parts | None:
    heads, key_heads = projection.number(*HEADS), projection.number("num_kv_heads")
    if not heads or not key_heads:
        return None
    if getattr(projection.parent, "new_decoder_architecture", False):
        return (heads // key_heads, 1, 1), key_heads
    return ((heads, 1, 1), 1) if getattr(projection.parent, "multi_query", False) else _each_head(projection)


def _sizes(*names: tuple[str, ...]) -> Callable[[Projection], Parts | None]:
    """Parts of these sizes: numbers that modules have, by their names. They have to add up."""

    def parts(projection: Projection) -> Parts | None:
        numbers = [projection.number(*alternatives) or 0 for alternatives in names]
        return (tuple(numbers), 1) if min(numbers) > 0 and sum(numbers) == projection.outputs else None

    return parts


def _mamba(projection: Projection) -> Parts | None:
    inner = projection.number("intermediate_size", "d_inner") or 0
    return ((1, 1), 1) if projection.outputs == 2 * inner else None


def _zamba(projection: Projection) -> Parts | None:
    return ((1, 1), projection.outputs // 2) if _mamba(projection) else None


def _mamba2(projection: Projection) -> Parts | None:
    inner, heads = projection.number("intermediate_size", "d_inner"), projection.number("num_heads", "nheads")
    groups, states = projection.number("n_groups", "ngroups"), projection.number("ssm_state_size", "d_state")
    if not (inner and heads and groups and states):
        return None
    sizes = (inner, inner, groups * states, groups * states, heads)
    return (sizes, 1) if sum(sizes) == projection.outputs else None


def _delta_net(projection: Projection) -> Parts | None:
    heads, key, value = (projection.number(name) for name in ("num_k_heads", "head_k_dim", "value_dim"))
    if not (heads and key and value) or value % heads:
        return None
    sizes = (key, key, value // heads, value // heads)
    return (sizes, heads) if heads * sum(sizes) == projection.outputs else None


def _latent(projection: Projection) -> Parts | None:
    heads, key, value = (projection.number(name) for name in ("num_heads", "qk_nope_head_dim", "v_head_dim"))
    if not (heads and key and value):
        return None
    return ((key, value), heads) if heads * (key + value) == projection.outputs else None


_QKV = "queries, keys and values side by side"
_INTERLEAVED = "queries, keys and values, head by head"
_MAMBA = r"Mamba|Jamba|Zamba"

FUSED: tuple[Fused, ...] = (
    Fused(("c_attn",), "GPTBigCode", _bigcode, "queries, keys and values, as multi_query says"),
    Fused(("c_attn",), "", _cross, "keys and values side by side"),
    Fused(("c_attn",), "", _thirds, _QKV),
    Fused(("query_key_value",), r"Bloom|GPTNeoX|Persimmon", _each_head, _INTERLEAVED),
    Fused(("query_key_value",), "Falcon", _falcon, "queries, keys and values, as the configuration says"),
    Fused(("qkv_proj",), "MiniMaxLightning", _each_head, _INTERLEAVED),
    Fused(("qkv_proj",), "CodeGen", lambda _: ((1, 1, 1), 4), "queries, values and keys in four blocks"),
    Fused(("in_proj",), "DisentangledSelfAttention", _each_head, _INTERLEAVED),
    Fused(("q_proj",), "Qwen", _query_and_gate, "queries and gates, head by head"),
    Fused(("att_proj",), "^Bark", _thirds, _QKV),
    Fused(("in_proj_qkv",), "", _sizes(("key_dim",), ("key_dim",), ("value_dim",)), _QKV),
    Fused(("in_proj_qkvz",), "", _delta_net, "queries, keys, values and gates, head by head"),
    Fused(("qkv", "qkv_proj", "qkv_linear", "to_qkv", "Wqkv", "wqkv", "query_key_value"), "", _query_groups, _QKV),
    Fused(("to_kv",), "", _halves, "keys and values side by side"),
    Fused(("kv_proj",), "JetMoe", _halves, "keys and values side by side"),
    Fused(("kv_b_proj",), "", _latent, "keys and values, head by head"),
    Fused(
        ("kv_a_proj_with_mqa",),
        "",
        _sizes(("kv_lora_rank",), ("qk_rope_head_dim",)),
        "latents and rotated keys side by side",
    ),
    Fused(("gate_up_proj", "gate_and_up_proj", "w12", "w13"), "", _halves, "gate and up side by side"),
    Fused(("Wi",), "ModernBert", _halves, "input and gate side by side"),
    Fused(("input_linear",), r"GraniteMoe.*MLP", _halves, "gate and up side by side"),
    Fused(("in_proj",), "Lfm", _thirds, "two gates and inputs side by side"),
    Fused(("in_proj",), r"^Zamba(?!2)", _zamba, "inputs and gates, channel by channel"),
    Fused(("in_proj",), _MAMBA, _mamba, "inputs and gates side by side"),
    Fused(("in_proj",), "", _mamba2, "gates, inputs, B, C and time steps side by side"),
    Fused(
        ("x_proj",),
        _MAMBA,
        _sizes(("time_step_rank", "dt_rank"), ("ssm_state_size", "d_state"), ("ssm_state_size", "d_state")),
        "time steps, B and C side by side",
    ),
)


def projection_of(use: Use, outputs: int, inputs: int) -> Projection:
    """The projection that a weight is, or, of the second factor of an adapter, the one that it adds to."""
    for position, name in enumerate(use.path):
        if name == "lora_B":
            adapted = use.parents[position]
            return Projection(
                use.path[position - 1], use.parents[position - 1], use, outputs, getattr(adapted, "in_features", inputs)
            )
    return Projection(use.role, use.parent, use, outputs, inputs)


def fused(projection: Projection, dim: int) -> tuple[Layout, str] | None:
    """How the matrices of a fused projection lie along a dimension, and what they are; None: it is one matrix."""
    for entry in FUSED:
        if projection.role in entry.roles and has_class(projection.parent, entry.classes):
            sizes, repeats = entry.parts(projection) or ((), 1)
            if not sizes or projection.outputs % (sum(sizes) * repeats):
                continue
            divisor = math.gcd(*sizes)
            return Layout(dim=dim, parts=tuple(size // divisor for size in sizes), repeats=repeats), entry.why
    return None


def has_class(module: nn.Module, pattern: str) -> bool:
    """Whether the name of a module's class, or of one of its bases, matches a regular expression."""
    return _any_matches(tuple(base.__name__ for base in type(module).__mro__), pattern)


@lru_cache(maxsize=4096)
def _any_matches(names: tuple[str, ...], pattern: str) -> bool:
    return any(re.search(pattern, name) for name in names)


def gate_and_up(use: Use, layout: Layout) -> Layout:
    """The layout of a stack of experts whose gate and up projections lie side by side in one parameter.

    A stack is (experts, outputs, inputs) or (experts, inputs, outputs). transformers says so (``is_transposed``);
    elsewhere the down projection beside it tells, whose outputs are as many as the inputs of this one.
    """
    down = getattr(use.module, use.attribute.replace("gate_up", "down").replace("gate_and_up", "down"), None)
    transposed = getattr(use.module, "is_transposed", None)
    if transposed is None:
        transposed = isinstance(down, Tensor) and down.dim() == 3 and use.param.size(2) != down.size(1)
    dim = 1 if transposed else 0
    if use.param.size(1 + dim) % 2:
        return layout
    repeats = 1 if getattr(use.module, "is_concatenated", True) else use.param.size(1 + dim) // 2
    return replace(layout, dim=dim, parts=(1, 1), repeats=repeats)
