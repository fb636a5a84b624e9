"""What each parameter of a model is, and how matrices lie in its tensor: one table of rules, and what they ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mada_optim.matrices.fused import fused, gate_and_up, has_class, projection_of
from mada_optim.matrices.layout import Layout
from mada_optim.matrices.outputs import Path, is_conv1d, is_norm, is_table
from mada_optim.matrices.uses import Use

# The kind of a parameter whose module has lost its class.
UNKNOWN = "unknown"
# Longest ratio of the sides of a matrix. LoRA's factors may exceed it.
WIDEST = 256
# Fewest numbers of a matrix.
SMALLEST = 16


@dataclass(frozen=True)
class Site:
    """One use of a parameter, with what is known of the whole model."""

    use: Use
    outputs: Mapping[Path, str]

    @property
    def output(self) -> str | None:
        """Why this weight belongs to an output layer; None: it does not."""
        path = self.use.path
        if "lora_B" in path:
            return self.outputs.get(path[: path.index("lora_B")])
        return self.outputs.get(path) if self.use.attribute in ("weight", "lora_B") else None


@dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Args:
        what: its name.
        matches: whether a parameter is one.
        why: the reason, or what returns it.
        layout: how its matrices lie in the tensor; None: it has none.
        any_ratio: whether its matrices may be as thin as they like.
    """

    what: str
    matches: Callable[[Site], bool]
    why: str | Callable[[Site], str]
    layout: Callable[[Site], Layout] | None = None
    any_ratio: bool = False


def _weight_of(*types: type[nn.Module]) -> Callable[[Site], bool]:
    return lambda site: site.use.attribute == "weight" and isinstance(site.use.module, types)


def _is_in(*types: type[nn.Module]) -> Callable[[Site], bool]:
    return lambda site: any(isinstance(parent, types) for parent in site.use.parents)


def _called(pattern: str) -> Callable[[Site], bool]:
    """Whether the parameter's own name matches as a whole."""
    return lambda site: re.fullmatch(pattern, site.use.attribute) is not None


def _is_factor(name: str) -> Callable[[Site], bool]:
    """Whether it is this factor of an adapter."""
    return lambda site: name in (*site.use.path, site.use.attribute)


def _is_magnitude(site: Site) -> bool:
    """Whether a weight holds lengths of rows: weight_norm's and DoRA's."""
    use = site.use
    normalized = use.part.endswith("_g") or (
        use.part == "original0" and any(has_class(child, "^_WeightNorm$") for child in _children(use.parametrization))
    )
    return normalized or "lora_magnitude_vector" in (*use.path, use.attribute)


def _is_coordinate(site: Site) -> bool:
    """A parametrization or an adapter of peft that reads the parameter as something else than the weight."""
    if any(_is_factor(name)(site) for name in ("oft_R", "boft_R", "hra_u", "c3a_kernel")):
        return True
    children = _children(site.use.parametrization)
    return any(has_class(child, "^_Orthogonal$|^MatrixExp(onential)?$|^CayleyMap$") for child in children)


def _children(module: nn.Module | None) -> list[nn.Module]:
    return list(module.children()) if module is not None else []


def _is_classless(site: Site) -> bool:
    """Whether the module has lost its class: it was scripted, or a graph was exported from it."""
    module = site.use.module
    exported = type(module) is nn.Module and any(isinstance(parent, fx.GraphModule) for parent in site.use.parents)
    unflattened = type(module).__module__ == "torch.export.unflatten"
    return exported or unflattened or isinstance(module, torch.jit.ScriptModule)


def _experts(site: Site) -> int | None:
    use = site.use
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts")
    return use.number(*names) or _count(use.module) or _count(use.parent)


def _count(module: nn.Module) -> int | None:
    """How many experts a module has: modules in a list of that name, or matrices in stacks."""
    experts = getattr(module, "experts", None)
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    stacks = experts if isinstance(experts, nn.Module) else module
    return next((param.size(0) for param in stacks.parameters(recurse=False) if param.dim() == 3), None)


def _is_router(site: Site) -> bool:
    use = site.use
    is_weight = use.attribute == "weight"
    if use.param.dim() != 2:
        return False
    if is_weight and (has_class(use.module, r"(Router|Gate|Gating)$") or has_class(use.parent, r"Router$")):
        return True
    is_named = re.fullmatch(_ROUTERS, use.role if is_weight else use.attribute) is not None
    rows = use.param.shape[:1] if is_weight else use.param.shape  # a bare one may lie either way
    return (is_named or (is_weight and has_class(use.parent, r"(Gate|Gating)$"))) and _experts(site) in rows


def _is_depthwise(site: Site) -> bool:
    module = site.use.module
    return isinstance(module, nn.modules.conv._ConvNd) and 1 < module.groups == module.in_channels


def _is_in_projection(site: Site) -> bool:
    return isinstance(site.use.module, nn.MultiheadAttention) and site.use.attribute == "in_proj_weight"


def _is_recurrent(site: Site) -> bool:
    is_gate = re.match("weight_[ih]h", site.use.attribute) is not None
    return is_gate and isinstance(site.use.module, (nn.RNNBase, nn.RNNCellBase))


def _gates(site: Site) -> Layout:
    count = 4 if has_class(site.use.module, "^LSTM") else 3 if has_class(site.use.module, "^GRU") else 1
    return Layout(parts=(1,) * count)


def _is_stack_of_experts(site: Site) -> bool:
    use = site.use
    return use.param.dim() == 3 and (
        has_class(use.module, r"Expert|MoE|Moe") or use.param.size(0) == use.number("num_experts", "num_local_experts")
    )


def _stack(site: Site) -> Layout:
    layout = Layout(stacked=True)
    return gate_and_up(site.use, layout) if re.fullmatch("gate_(and_)?up_proj", site.use.attribute) else layout


def _stack_why(site: Site) -> str:
    return "gate and up of each expert" if len(_stack(site).parts) > 1 else "one matrix for each expert"


def _has_experts_in_rows(site: Site) -> bool:
    return has_class(site.use.module, "ExpertGLU") and site.use.param.dim() == 2


def _experts_in_rows(site: Site) -> Layout:
    experts = _experts(site) or 1
    return Layout(parts=(1,) * experts) if site.use.param.size(0) % experts == 0 else Layout()


def _has_heads_in_columns(site: Site) -> bool:
    """Whether a weight is XLNet's, of shape (width, heads, width of a head)."""
    return site.use.param.dim() == 3 and has_class(site.use.module, "^XLNet.*Attention$|^Funnel.*Attention$")


def _is_linear(site: Site) -> bool:
    use = site.use
    is_weight = use.attribute == "weight" and use.param.dim() == 2
    return is_weight and (isinstance(use.module, nn.Linear) or is_conv1d(use.module))


def _is_fused(site: Site) -> bool:
    return _fused(site) is not None


def _is_fused_factor(site: Site) -> bool:
    return "lora_B" in site.use.path and _is_fused(site)


def _fused(site: Site) -> tuple[Layout, str] | None:
    use = site.use
    if use.attribute != "weight" or use.param.dim() != 2:
        return None
    dim = 1 if is_conv1d(use.module) else 0
    outputs, inputs = use.param.size(dim), use.param.size(1 - dim)
    return fused(projection_of(use, outputs, inputs), dim)


def _fused_layout(site: Site) -> Layout:
    layout_and_reason = _fused(site)
    return layout_and_reason[0] if layout_and_reason else Layout()


def _fused_why(site: Site) -> str:
    layout_and_reason = _fused(site)
    return layout_and_reason[1] if layout_and_reason else ""


def _groups(site: Site) -> Layout:
    module: Any = site.use.module
    return Layout(parts=(1,) * module.groups)


def _one(_: Site) -> Layout:
    return Layout()


def _stacked(_: Site) -> Layout:
    return Layout(stacked=True)


_ROUTERS = r"gate|wg|(.*_)?(router|gating)(_.*)?|gate_(network|layer)|w_(gate|noise)"
_BIASES = r"(.*_)?bias(es)?(_.*)?(?<!_table)"
_POSITIONS = r"(.*_)?(pos|position|positions|positional|rel|relative|alibi|rope|freqs?)(_.*)?"
_TABLES = (
    r"(.*_)?(tokens?|cls|embed|embeds|embedding|embeddings|emb|table|codebooks?|latents?|prompts?|prefix|registers?)"
    r"(_delta|_concat|_\d+d)?|latent_query|(.*_)?(queries|slots|prototypes?|anchors|centers|centroids?|codewords|vectors|factors)"
    r"|prompt_(pool|keys?)|ctx|memory|vblora_.*"
)
_SCALES = (
    r"(?!(w|weights?)_gate)(.*_)?(gates?|scales?|gain|gamma|beta|alpha|temperature|lambdas?|decay|sinks?)|A|A_logs?|D|Ds|dt(_(scale|rate|init|limit))?"
    r"|time_(decay|first|mix|maa).*|(lambda|mix)_.*"
)

# By the type of the module first, then by name, then by shape. The first that matches holds. Of a parameter that is
# used in several places, one has to match.
RULES: tuple[Rule, ...] = (
    Rule("complex", lambda site: site.use.param.is_complex(), "complex numbers"),
    Rule("integers", lambda site: not site.use.param.is_floating_point(), "not floating point"),
    Rule("embedding", lambda site: is_table(site.use), "one row for each entry"),
    Rule("embedding", _is_factor("lora_embedding_A"), "LoRA of an embedding: one column for each entry"),
    Rule("norm", lambda site: is_norm(site.use.module), "gain or offset of a norm"),
    Rule("bias", _called(_BIASES), "added to activations"),
    Rule("scale", _is_magnitude, "lengths of the rows of a weight"),
    Rule("vector", lambda site: site.use.param.dim() < 2, "one dimension or none"),
    Rule("empty", lambda site: site.use.param.numel() == 0, "no numbers"),
    Rule(UNKNOWN, _is_classless, "its module was scripted or exported, and does not say what it is"),
    Rule("coordinates", _is_coordinate, "another matrix is computed from it"),
    Rule("output layer", lambda site: site.output is not None, lambda site: str(site.output)),
    Rule("output layer", _is_in(nn.AdaptiveLogSoftmaxWithLoss), "one row for each word"),
    Rule("matrix", _is_factor("lora_A"), "LoRA, from activations to its rank", _one, any_ratio=True),
    Rule("matrix", _is_fused_factor, _fused_why, _fused_layout, any_ratio=True),
    Rule("matrix", _is_factor("lora_B"), "LoRA, from its rank to activations", _one, any_ratio=True),
    Rule("matrix", _is_factor("lora_embedding_B"), "LoRA, from its rank to activations", _one, any_ratio=True),
    Rule("router", _is_router, "scores experts"),
    Rule("matrix", _is_in_projection, "queries, keys and values side by side", lambda _: Layout(parts=(1, 1, 1))),
    Rule("matrix", _is_recurrent, "gates of a recurrent layer side by side", _gates),
    Rule("depthwise", _is_depthwise, "one kernel for each channel"),
    Rule("matrix", _weight_of(nn.modules.conv._ConvTransposeNd), "a transposed convolution: inputs × window", _groups),
    Rule("matrix", _weight_of(nn.modules.conv._ConvNd), "a convolution: outputs × window", _groups),
    Rule("matrix", _weight_of(nn.Bilinear), "one bilinear form for each output", _stacked),
    Rule("matrix", _is_stack_of_experts, _stack_why, _stack),
    Rule("matrix", _has_experts_in_rows, "the rows of one expert below those of another", _experts_in_rows),
    Rule("matrix", _is_fused, _fused_why, _fused_layout),
    Rule("matrix", _is_linear, "maps activations to activations", _one),
    Rule("positions", _called(_POSITIONS), "a table of positions, by its name"),
    Rule("table", _called(_TABLES), "learned vectors, by its name"),
    Rule("scale", _called(_SCALES), "a gate, scale or rate, by its name"),
    Rule("table", lambda site: site.use.param.size(0) == 1, "a first dimension of 1, for the batch"),
    Rule("matrix", _has_heads_in_columns, "widths × heads", _one),
    Rule("matrix", lambda site: site.use.param.dim() == 3, "three dimensions: a stack of matrices", _stacked),
    Rule("matrix", lambda site: site.use.param.dim() > 3, "the first dimension × all others", _one),
    Rule("matrix", lambda _: True, "two dimensions", _one),
)


@dataclass(frozen=True)
class Limit:
    """What matrices are not orthogonalized, by the numbers of their rows and columns."""

    what: str
    matches: Callable[[int, int], bool]
    why: str


# A single row or column is only rescaled, which AdamW does for each number by itself. A ratio beyond 256 is that of a
# table, or of a layer that reads or writes a few coordinates. Fewer than 16 numbers mix or gate a few things.
LIMITS: tuple[Limit, ...] = (
    Limit("row or column", lambda rows, columns: min(rows, columns) < 2, "has one singular value"),
    Limit(
        "too thin",
        lambda rows, columns: max(rows, columns) > WIDEST * min(rows, columns),
        f"one side over {WIDEST} times the other",
    ),
    Limit("too small", lambda rows, columns: rows * columns < SMALLEST, f"fewer than {SMALLEST} numbers"),
)
