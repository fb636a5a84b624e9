"""Our optimizers in the form of the database that drives torch's own tests of its optimizers.

``optim_db.extend(entries())``, with ``optim_db`` of ``torch.testing._internal.common_optimizers``, before the tests of
torch's ``test/test_optim.py`` are defined, runs them on ours. The tests beside this file
check the same properties.

There is one entry for MADA and one for each row of the table of optimizers. The database wants classes whose
constructor takes all options, also as those of a parameter group. So what makes a row itself (its coefficients and how
it learns them) is the default of a class, and the inputs are what torch's optimizers have in common.
"""

from __future__ import annotations

import inspect
import unittest
from functools import partial
from typing import Any

import torch
from problems import TABLE, Row
from torch.nn import Parameter

from mada_optim import MADA, HypergradientOptimizer

# Why a test of torch's does not apply, by its name.
SKIPS = {
    "test_defaults_changed_to_foreach": "it patches torch's _multi_tensor_*; ours are methods of kernels, and the "
    "default on CUDA is the compiled one",
    "test_peak_memory_foreach": "it allows one copy of the parameters, here 5 KB; foreach=True needs memory that does "
    "not depend on the number of parameters: see the tests beside this file",
    "test_fused_error_on_params_on_meta": "fused=True takes every device for which torch.compile makes kernels",
    "test_state_dict_with_cuda_params": "it wants the number of steps on the device where fused=True; ours stays on "
    "the host, where the kernels read it without waiting for the device, unless capturable=True",
}
LATER_ARGUMENTS = (
    *("foreach", "differentiable", "fused", "maximize", "capturable"),
    *("state_dtype", "stochastic_rounding"),
)


def optimizer_class(row: Row) -> type[HypergradientOptimizer]:
    """The optimizer of a row as a class."""
    base, signature = row.make, inspect.signature(row.make)

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        if "eps" not in signature.parameters:
            kwargs.pop("eps", None)  # torch's optimizers all have one
        base.__init__(self, params, *args, **{**row.kwargs, **kwargs})

    # Not the names of the classes, which are also those of torch's optimizers.
    name = f"MADA_{row.name.replace('-', '_')}"
    return type(name, (base,), {"__init__": __init__, "__doc__": row.name, "__signature__": signature})


# Optimizer and whether it learns. Those that learn are not differentiable.
OPTIMIZERS = [(MADA, True), *((optimizer_class(row), row.learns) for row in TABLE)]


def inputs(device: str) -> dict[str, dict[str, Any]]:
    """Arguments of the constructor, by description, without foreach, fused and differentiable, which the tests add."""
    chosen: dict[str, dict[str, Any]] = {
        # At the default learning rate a step with a zero gradient would visibly change something.
        "default weight decay": {"lr": 1e-5},
        "no weight decay": {"weight_decay": 0.0},
        "non-default lr": {"weight_decay": 0.0, "lr": 0.01},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "maximize": {"weight_decay": 0.1, "maximize": True},
        "non-default eps": {"weight_decay": 0.0, "eps": 1e-4},
        "tensor lr": {"weight_decay": 0.0, "lr": torch.tensor(0.001)},
    }
    if torch.device(device).type == "cuda":
        chosen |= {
            "capturable": {"weight_decay": 0.0, "capturable": True},
            "capturable, weight decay": {"weight_decay": 0.1, "capturable": True},
            "capturable, tensor lr": {"weight_decay": 0.0, "capturable": True, "lr": torch.tensor(0.001)},
        }
    return chosen


def errors(
    optimizer: type[HypergradientOptimizer], device: str, dtype: torch.dtype
) -> list[tuple[Any, dict[str, Any], type[Exception], str]]:
    """What the constructor refuses: parameters, arguments, error, pattern of its message."""
    weight, other = (Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2))
    some = "some parameters appear in more than one parameter group"
    named = "should be with/without names"
    groups: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (weight, {}, TypeError, "should be an iterable of Tensors or dicts"),
        # An error, not torch's warning: the hypergradient of the parameter would count twice.
        ([weight, weight], {}, ValueError, "a parameter is listed twice in one parameter group"),
        ([{"params": weight}, {"params": weight}], {}, ValueError, some),
        ([("weight", weight), other], {}, ValueError, named),
        ([{"params": [weight]}, {"params": [("other", other)]}], {}, ValueError, named),
        ([weight * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        ([torch.ones(2, dtype=torch.int64)], {}, TypeError, "can only optimize floating-point or complex tensors"),
    ]
    arguments: list[tuple[dict[str, Any], str]] = [
        ({"lr": torch.tensor([1e-3, 1e-3])}, "lr must be a number or a tensor of one element"),
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"weight_decay": -1}, "weight_decay must be a finite number >= 0, got -1"),
        ({"betas": (1.0, 0.9)}, "beta1 must be a number in .* got 1.0"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0, got -1e-08"),
        ({"foreach": True, "fused": True}, "foreach and fused cannot both be True"),
        ({"differentiable": True, "fused": True}, "differentiable and fused cannot both be True"),
    ]
    taken = inspect.signature(optimizer).parameters.keys()
    refused = [([weight], kwargs, ValueError, message) for kwargs, message in arguments if kwargs.keys() <= taken]
    return [*groups, *refused]


def entries() -> list[Any]:
    """``OptimizerInfo`` for each optimizer.

    torch's testing modules need the package ``expecttest``, and are slow to import: they are, only here.
    """
    from torch.testing._internal.common_methods_invocations import DecorateInfo
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
    )

    def optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in inputs(device).items()]

    def optim_error_inputs(
        optimizer: type[HypergradientOptimizer], device: str, dtype: torch.dtype
    ) -> list[ErrorOptimizerInput]:
        sparse = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
        sparse.grad = torch.zeros_like(sparse).to_sparse()
        return [
            *(
                ErrorOptimizerInput(OptimizerInput(params, kwargs, pattern), error_type=error, error_regex=pattern)
                for params, kwargs, error, pattern in errors(optimizer, device, dtype)
            ),
            ErrorOptimizerInput(
                OptimizerInput([sparse], {}, "sparse gradient"),
                error_on=OptimizerErrorEnum.STEP_ERROR,
                error_type=RuntimeError,
                error_regex="does not support sparse gradients",
            ),
        ]

    return [
        OptimizerInfo(
            optimizer,
            optim_inputs_func=optim_inputs,
            optim_error_inputs_func=partial(optim_error_inputs, optimizer),
            supported_impls=("foreach", "fused") if learns else ("foreach", "differentiable", "fused"),
            not_og_supported_flags=LATER_ARGUMENTS,
            supports_fused_on=("cpu", "cuda"),
            has_capturable_arg=True,
            skips=tuple(DecorateInfo(unittest.skip(why), "TestOptimRenewed", name) for name, why in SKIPS.items()),
        )
        for optimizer, learns in OPTIMIZERS
    ]
