"""Our optimizers in the form of the database that drives torch's own tests of its optimizers.

``optim_db.extend(entries())``, with ``optim_db`` of ``torch.testing._internal.common_optimizers``, before torch's
``test/test_optim.py`` is loaded, runs those tests on ours; ``test_torch_standard.py`` checks the same properties here.

There is one entry for MADA and one for each row of the table of optimizers. The database wants classes whose
constructor takes all options, also as those of a parameter group. So what makes a row itself (its coefficients and how
it learns them) is the default of a class, and the inputs are what torch's optimizers have in common.
"""

from __future__ import annotations

import unittest
from functools import partial
from typing import Any

import torch
from problems import TABLE, Row
from torch.nn import Parameter
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from mada_optim import MADA, HypergradientOptimizer

# Why a test of torch's does not apply, by its name.
SKIPS = {
    "test_defaults_changed_to_foreach": "it patches torch's _multi_tensor_*; ours are methods of kernels, and the "
    "default on CUDA is the compiled one",
    "test_peak_memory_foreach": "it allows one copy of the parameters, here 5 KB; foreach=True needs memory that does "
    "not depend on the number of parameters, about 15 times 0.5 MB: see test_torch_standard.py",
    "test_fused_error_on_params_on_meta": "fused=True takes every device for which torch.compile makes kernels",
    "test_fused_does_not_step_if_foundinf": "GradScaler's protocol for fused optimizers is not declared "
    "(_step_supports_amp_scaling): they unscale gradients themselves, so that users cannot clip them; ours are "
    "skipped, and their gradients unscaled, by GradScaler, which is as fast where coefficients are learned",
    "test_state_dict_with_cuda_params": "it wants the number of steps on the device where fused=True; ours stays on "
    "the host, where the kernels read it without waiting for the device, unless capturable=True",
}


def optimizer_class(row: Row) -> type[HypergradientOptimizer]:
    """The optimizer of a row as a class."""
    if isinstance(row.make, type) and not row.kwargs:
        return row.make
    base, defaults = row.make, dict(row.kwargs)
    if isinstance(base, partial):
        base, defaults = base.func, {**base.keywords, **defaults}

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, params, *args, **{**defaults, **kwargs})

    return type(f"{base.__name__}_{row.name.replace('-', '_')}", (base,), {"__init__": __init__, "__doc__": row.name})


def inputs(device: Any, dtype: torch.dtype | None = None, eps: bool = True) -> list[OptimizerInput]:
    """Arguments of the constructor, without foreach, fused and differentiable, which the tests add.

    Args:
        device: capturable is for CUDA only, as in torch's own inputs.
        dtype: makes no difference: whatever the parameters', the arithmetic is done in float32 or float64.
        eps: whether ε matters to the optimizer.
    """
    chosen: list[tuple[str, dict[str, Any]]] = [
        # At the default learning rate a zero gradient would not be a step that changes nothing.
        ("default weight decay", {"lr": 1e-5}),
        ("no weight decay", {"weight_decay": 0.0}),
        ("non-default lr", {"weight_decay": 0.0, "lr": 0.01}),
        ("nonzero weight_decay", {"weight_decay": 0.1}),
        ("maximize", {"weight_decay": 0.1, "maximize": True}),
        ("tensor lr", {"weight_decay": 0.0, "lr": torch.tensor(0.001)}),
    ]
    if eps:
        chosen.append(("non-default eps", {"weight_decay": 0.0, "eps": 1e-4}))
    if torch.device(device).type == "cuda":
        chosen += [
            ("capturable", {"weight_decay": 0.0, "capturable": True}),
            ("capturable, weight decay", {"weight_decay": 0.1, "capturable": True}),
            ("capturable, tensor lr", {"weight_decay": 0.0, "capturable": True, "lr": torch.tensor(0.001)}),
        ]
    return [OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in chosen]


def error_inputs(device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """What is refused: torch's own list, but for two messages, and ours."""
    if torch.device(device).type != "cpu":
        return []
    weight = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    sparse = Parameter(torch.randn(2, 3, device=device, dtype=dtype))
    sparse.grad = torch.zeros_like(sparse).to_sparse()
    general = [
        given
        for given in get_error_inputs_for_all_optims(device, dtype)
        # A parameter listed twice is an error here, not a warning: its hypergradient would count twice.
        if not issubclass(given.error_type, Warning) and "Tensor lr" not in given.optimizer_error_input.desc
    ]
    ours: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
        ([weight, weight], {}, ValueError, "a parameter is listed twice in one parameter group"),
        ([weight], {"lr": torch.tensor([1e-3, 1e-3])}, ValueError, "lr must be a number or a tensor of one element"),
        ([weight], {"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
        ([weight], {"weight_decay": -1}, ValueError, "weight_decay must be a finite number >= 0, got -1"),
        ([weight], {"betas": (1.0, 0.9)}, ValueError, "beta1 must be a number in .* got 1.0"),
        ([weight], {"eps": -1e-8}, ValueError, "eps must be a finite number >= 0, got -1e-08"),
        ([weight], {"foreach": True, "fused": True}, ValueError, "foreach and fused cannot both be True"),
        ([weight], {"differentiable": True, "fused": True}, ValueError, "differentiable and fused cannot both be True"),
        ([weight * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
        ([torch.ones(2, dtype=torch.int64)], {}, TypeError, "can only optimize floating-point or complex tensors"),
    ]
    return [
        *general,
        *(
            ErrorOptimizerInput(OptimizerInput(params, kwargs, message), error_type=error, error_regex=message)
            for params, kwargs, error, message in ours
        ),
        ErrorOptimizerInput(
            OptimizerInput([sparse], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="does not support sparse gradients",
        ),
    ]


def entry(optimizer: type[HypergradientOptimizer], learns: bool, eps: bool = True) -> OptimizerInfo:
    """The database's entry for an optimizer.

    Args:
        optimizer: the class.
        learns: whether it learns coefficients unless told otherwise. It is then not differentiable.
        eps: whether ε matters to it.
    """
    return OptimizerInfo(
        optimizer,
        optim_inputs_func=partial(inputs, eps=eps),
        optim_error_inputs_func=error_inputs,
        supported_impls=("foreach", "fused") if learns else ("foreach", "differentiable", "fused"),
        not_og_supported_flags=(
            *("foreach", "differentiable", "fused", "maximize", "capturable"),
            *("state_dtype", "stochastic_rounding"),
        ),
        supports_fused_on=("cpu", "cuda"),
        has_capturable_arg=True,
        skips=tuple(DecorateInfo(unittest.skip(why), "TestOptimRenewed", name) for name, why in SKIPS.items()),
    )


def entries() -> list[OptimizerInfo]:
    """MADA as it comes, and every row of the table."""
    rows = [entry(optimizer_class(row), row.learns, eps=row.q["gamma"] > 0.0) for row in TABLE]
    return [entry(MADA, learns=True), *rows]
