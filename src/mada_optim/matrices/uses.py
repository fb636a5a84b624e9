"""Where a model uses its parameters: in which module, by which name, below which other modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# Children that stand in for the module around them: torch.compile, FSDP1, activation checkpoints, peft.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "original_module")


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a model uses a parameter.

    Args:
        name: of the parameter in the model, with those of wrappers.
        param: the parameter.
        attribute: its name in its module. Of a parametrized or normalized weight, the name of that weight.
        module: the module that has it.
        path: names of the modules from the model to that one, without wrappers.
        parents: the modules that contain those of ``path``, outermost first.
        part: its own name where it is not the attribute itself: "original0", "weight_g".
        parametrization: behind which it is, None: behind none.
    """

    name: str
    param: Tensor
    attribute: str
    module: nn.Module
    path: tuple[str, ...]
    parents: tuple[nn.Module, ...]
    part: str = ""
    parametrization: nn.Module | None = None

    @property
    def role(self) -> str:
        """The name of its module in the module around it."""
        return self.path[-1] if self.path else ""

    @property
    def parent(self) -> nn.Module:
        """The module around its module, or that module itself where there is none."""
        return self.parents[-1] if self.parents else self.module

    @property
    def clean_name(self) -> str:
        """The name without wrappers."""
        return ".".join((*self.path, self.attribute))

    def number(self, *names: str) -> int | None:
        """The first integer of these names in the module, the module around it, and the nearest configuration."""
        holders = (self.module, self.parent, config_of((*self.parents, self.module)))
        return next((value for holder in holders if (value := integer_of(holder, names)) is not None), None)


@dataclass
class Walk:
    """All uses of all parameters of a model, and the path of each of its modules."""

    uses: dict[Tensor, list[Use]] = field(default_factory=dict)
    paths: dict[nn.Module, tuple[str, ...]] = field(default_factory=dict)

    def all(self) -> Iterator[Use]:
        """Each use, in the order of ``model.named_parameters()``."""
        for uses in self.uses.values():
            yield from uses


def walk(model: nn.Module) -> Walk:
    """Return where a model uses its parameters.

    Raises:
        ValueError: a parameter has no shape yet.
    """
    result = Walk()
    _walk(result, model, "", (), ())
    return result


def integer_of(holder: Any, names: Sequence[str]) -> int | None:
    """The first attribute of these names that is an integer."""
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def config_of(modules: tuple[nn.Module, ...]) -> Any:
    """The configuration of the innermost of these modules that has one, or None."""
    for module in reversed(modules):
        config = getattr(module, "config", None)
        if config is not None:
            return config
    return None


def _walk(result: Walk, module: nn.Module, prefix: str, path: tuple[str, ...], parents: tuple[nn.Module, ...]) -> None:
    result.paths.setdefault(module, path)
    is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict)) and bool(path)
    for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
        if nn.parameter.is_lazy(param):
            raise ValueError(
                f"model: parameter {prefix + name!r} has no shape yet; run a forward pass before the optimizer is made"
            )
        if is_list:
            use = Use(prefix + name, param, path[-1], parents[-1], path[:-1], parents[:-1])
        else:
            attribute = _normalized(module, name)
            part = name if attribute != name else ""
            use = Use(prefix + name, param, attribute, module, path, parents, part)
        result.uses.setdefault(param, []).append(use)
    for name, child in module._modules.items():  # a module that stands there twice has two roles
        if child is None or child in parents or child is module:
            continue
        below = f"{prefix}{name}."
        if parametrize.is_parametrized(module) and name == "parametrizations":
            for key, behind in child.named_children():
                for part, param in behind.named_parameters(recurse=False):
                    use = Use(f"{below}{key}.{part}", param, key, module, path, parents, part, behind)
                    result.uses.setdefault(param, []).append(use)
                inner = (*path, name, key)
                for index, function in behind.named_children():
                    _walk(
                        result, function, f"{below}{key}.{index}.", (*inner, index), (*parents, module, child, behind)
                    )
        elif name == "modules_to_save" and hasattr(module, "original_module"):
            for adapter, copy in child.named_children():
                _walk(result, copy, f"{below}{adapter}.", path, parents)
        elif name in _WRAPPED or (name == "module" and _has_nothing_else(module)):
            _walk(result, child, below, path, parents)
        else:
            _walk(result, child, below, (*path, name), (*parents, module))


def _has_nothing_else(module: nn.Module) -> bool:
    """Whether a module has one child alone, as DistributedDataParallel and DataParallel have."""
    return sum(1 for _ in module.children()) == 1 and not any(True for _ in module.parameters(recurse=False))


def _normalized(module: nn.Module, name: str) -> str:
    """The weight that a parameter stands for: weight_norm has weight_g and weight_v, pruning weight_orig."""
    for ending, sibling in (("_g", "_v"), ("_v", "_g")):
        if name.endswith(ending) and isinstance(getattr(module, name[:-2] + sibling, None), nn.Parameter):
            return name[:-2]
    if name.endswith("_orig") and isinstance(getattr(module, name[:-5], None), Tensor):
        return name[:-5]
    return name
