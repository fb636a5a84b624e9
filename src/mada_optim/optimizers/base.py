"""A torch.optim.Optimizer for any family, which learns the family's coefficients while it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from mada_optim.engine.betas import (
    BETAS,
    Group,
    ParameterGroup,
    fixed_betas,
    has_betas,
    ignores_betas,
    learned_betas,
    start_betas,
    update_betas,
)
from mada_optim.engine.coefficient_set import CoefficientSet
from mada_optim.engine.parameter_state import ParameterState
from mada_optim.engine.step import release, take_step
from mada_optim.families import Family
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.optimizers.checkpoint import LATER_ARGUMENTS, loading
from mada_optim.optimizers.display import as_tables, as_text
from mada_optim.optimizers.groups import (
    check_agreement,
    check_family,
    check_group,
    join_coefficients,
    read_group,
    with_python_numbers,
)
from mada_optim.optimizers.options import Options, Scale, read_scale, with_options
from mada_optim.optimizers.torch_protocols import (
    check_capture,
    check_gradients,
    forget_grad_scaler,
    is_phantom_step,
    take_hyper_grad_scale,
    unscale,
)
from mada_optim.scale import LearnedScale
from mada_optim.scale.rule import ADAPTIVE
from mada_optim.tables import as_html
from mada_optim.tensors.devices import as_floats
from mada_optim.tensors.distributed import is_dtensor


class HypergradientOptimizer(Optimizer):
    """Optimize parameters by a family's update, and the family's coefficients by their hypergradient.

    At each step, for the whole model: one hypergradient, one step of the coefficients, then the step of the parameters
    with the new coefficients. Arithmetic is done in float64 for float64 parameters and in float32 for all others.

    Args:
        params: as in torch.optim: parameters, named parameters, or dicts that define parameter groups.
        family: the update rule, see :class:`Family`.
        lr: learning rate η, a number or a tensor.
        weight_decay: decoupled weight decay λ.
        start: initial values of coefficients, by name; what is not named starts at the family's default.
        hyper_lr: step sizes α of the coefficients. None: the family's defaults. A number: one for all. A mapping from
            name to number: what is not named is frozen. 0.0: nothing is learned.
        hyper_momentum: momentum μ of the coefficients' gradient descent.
        hyper_clip: each component of the hypergradient is cut to [-hyper_clip, hyper_clip].
        hyper_warmup: number of steps before the coefficients begin to move.
        hyper_every: the hypergradient is taken each ``hyper_every``-th step.
        hyper_delay: for how many steps a hypergradient waits before it is used: 0, or 1, with which a step of an
            elementwise family is one pass over memory instead of two.
        bounds: boxes (low, high) of coefficients by name. The others keep the family's.
        hyper_per_group: learn one set of coefficients for each parameter group instead of one for the model. Groups
            may then have their own ``start``, ``hyper_lr`` and ``bounds``.
        foreach: None, the default: see ``fused``. True or False use torch's operators alone. True joins small
            parameters, as ``fused=False`` does; False takes parameters one by one.
        maximize: maximize the objective.
        capturable: whether the step may be captured in a CUDA graph. Step counts are then kept on the device, and the
            hypergradient is computed at every step, used or not. Take two steps before the capture. A replay uses all
            options as they were at the capture, also ``betas`` and ``hyper_grad_scale``; only what is a tensor on the
            device, such as an ``lr``, is read anew. While coefficients are learned, all steps from the capture on need
            gradients for the same parameters.
        differentiable: whether autograd goes through :meth:`step`, to parameters (which may then not be leaves),
            gradients, and ``lr`` where it is a tensor. Only with coefficients that are not learned (``hyper_lr=0.0``)
            and without rounding to bfloat16; torch's operators are used.
        fused: None, the default: the fastest implementation that there is for the device. True: compile the family's
            update with torch.compile where nothing faster is built in. False: torch's operators only.
        state_dtype: dtype of the buffers. None, the default: float32, and float64 for float64 parameters.
            torch.bfloat16 halves them, with stochastic rounding; buffers of complex parameters stay as they are.
        stochastic_rounding: round bfloat16 parameters stochastically, so that small updates are not lost.
        scale: False, the default: ``lr`` is the learning rate. True: the learning rate is found in the first steps, and
            ``lr`` gives the shape of the schedule alone, see :class:`LearnedScale`. A mapping, as :meth:`frozen_config`
            returns it: the rates that were found, from the start.
        constants: the family's constants, by name. Groups may override them, as they may lr and weight_decay.

    Raises:
        ValueError: an argument is out of its range, a name unknown, a parameter listed twice.
        TypeError: an argument has the wrong type.
        RuntimeError: ``fused=True`` where that is not possible; coefficients to be learned of parameters that FSDP1 or
            ZeroRedundancyOptimizer spread over processes.

    >>> from mada_optim import MADAFamily
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = HypergradientOptimizer([weight], MADAFamily(), lr=0.1, hyper_lr={"rho": 0.1}, hyper_warmup=0)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     (weight**2).sum().backward()
    ...     optimizer.step()
    >>> optimizer.coefficients()["rho"] <= 1.0
    True
    """

    hyper_grad_scale: float | Tensor = 1.0
    """Factor of the next hypergradient: how many times as long the gradients were before they were clipped.

    Without it, a gradient that is cut to a tenth of its length makes a tenth of the hypergradient. It is a number or a
    0-dimensional tensor, the same on every process. Each step resets it to 1.
    """

    @with_options(Options, keep_rest=True)
    def __init__(
        self,
        params: ParamsT,
        family: Family,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        start: Mapping[str, float] | None = None,
        **constants: Any,
    ) -> None:
        options = {name: constants.pop(name) for name in Options.__annotations__}
        check_family(family, constants, inspect.signature(HypergradientOptimizer).parameters)
        self.family = family
        self._start: dict[str, float] = dict(start or {})
        self._hypergradients: dict[int, Tensor] = {}
        scale = read_scale(options.pop("scale"))
        defaults = {"lr": lr, "weight_decay": weight_decay, **options, **family.constants, **constants}
        if has_betas(family):
            start_of = {coefficient.name: coefficient.default for coefficient in family.coefficients} | self._start
            defaults["betas"] = tuple(start_of[name] for name in BETAS)
        super().__init__(params, with_python_numbers(family, defaults, defaults))
        if all(ignores_betas(family, group) for group in self.param_groups):
            self.defaults.pop("betas", None)  # by which schedulers see that there are none to cycle
        self.scale: LearnedScale | None = None if scale is False else self._learn_scale(scale)
        """The learning rate that is found, where ``scale`` asks for one."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """How torch.amp.GradScaler learns that it has to leave unscaling and skipping to the step.

        It has to where parameters are spread over processes, of which each sees infinities of its own. Elsewhere the
        scaler does both. Lightning refuses to clip gradients that the step unscales. Parameters in float16 are left to
        the step, whose error says what to do; and what is for one step is used up, also where that is skipped.
        """
        if "hyper_grad_scale" in vars(self):
            return True
        params = (param for group in self.param_groups for param in group["params"])
        return any(is_dtensor(param) or param.dtype == torch.float16 for param in params)

    def _learn_scale(self, scale: Scale) -> LearnedScale:
        return LearnedScale(self, settings=ADAPTIVE, held=scale if isinstance(scale, Mapping) else None)

    # What the user reads and says about the coefficients.

    def coefficients(self, group: int = 0) -> dict[str, float]:
        """Return the current values of all coefficients, learned or not, as floats.

        Args:
            group: index of the parameter group; matters with ``hyper_per_group=True`` and where betas differ.
        """
        options = self.param_groups[group]
        values = self._by_name(options["coefficients"])
        return {**values, **fixed_betas(options)} if has_betas(self.family) else values

    def hypergradients(self, group: int = 0) -> dict[str, float] | None:
        """Return the hypergradient of the latest step that took one, before clipping; 0 for frozen coefficients.

        ``hyper_grad_scale`` is in it. None: no step took one since the optimizer was made or loaded. With
        ``capturable``, steps that do not use their hypergradient count as well.

        Args:
            group: index of the parameter group; matters with ``hyper_per_group=True``.
        """
        set_index = group if self.param_groups[group]["hyper_per_group"] else 0
        latest = self._hypergradients.get(set_index)
        return None if latest is None else self._by_name(latest)

    @property
    def skipped_hypergradients(self) -> int:
        """How many hypergradients were not finite and therefore left the coefficients where they were."""
        return sum(coefficients.skipped for coefficients in self._coefficient_sets())

    def freeze(self) -> None:
        """Stop learning: the coefficients stay where they are from now on, and what learning needs is released.

        A state_dict that is saved afterwards is for an optimizer made with the same arguments as this one, not for one
        made from :meth:`frozen_config`.
        """
        self.defaults["hyper_lr"] = 0.0  # for groups that come later
        learned = learned_betas(self.param_groups[0])
        for group in self.param_groups:
            group["hyper_lr"] = dict.fromkeys(group["hyper_lr"], 0.0)
        with torch.no_grad():
            for coefficients in self._coefficient_sets():
                release(coefficients, self.state)
                update_betas(self.family, coefficients.groups)
        if not self.defaults["hyper_per_group"]:
            self._start |= {name: self.coefficients()[name] for name in learned}  # with which later groups begin

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """Return arguments with which an optimizer of this class holds these coefficients fixed from the start.

        With them a second training uses what the first one found (the paper's MADA-FS), its learning rate included.

        Args:
            group: index of the parameter group; matters with ``hyper_per_group=True``.
        """
        return {"start": self.coefficients(group), "hyper_lr": 0.0, **self._frozen_scale()}

    def _frozen_scale(self) -> dict[str, Any]:
        return {} if self.scale is None else {"scale": self.scale.values}

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip((c.name for c in self.family.coefficients), as_floats(values), strict=True))

    def __repr__(self) -> str:
        """Show the coefficients, and what the user set."""
        return as_text(self)

    def _repr_html_(self) -> str:
        """Show the same in a notebook, as tables."""
        return as_html(type(self).__name__, as_tables(self))

    # Parameter groups.

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, also in the middle of a training; see torch.optim.Optimizer.add_param_group.

        Args:
            param_group: ``params`` and the options of the group. What it does not name is the optimizer's.
        """
        group = read_group(self.family, self.defaults, param_group)
        self._check_group(group)
        start = join_coefficients(self.family, self._start, self.defaults, self.param_groups, param_group, group)
        super().add_param_group(ParameterGroup(group, self.family))
        start_betas(self.family, self.param_groups[-1], start)

    def _check_group(self, group: Group) -> None:
        check_group(self.family, group, self.defaults["hyper_per_group"])

    def _coefficient_sets(self) -> list[CoefficientSet]:
        """Return the sets of coefficients: one, or one for each parameter group."""
        if self.defaults["hyper_per_group"]:
            return [CoefficientSet(self.family, [group]) for group in self.param_groups]
        return [CoefficientSet(self.family, self.param_groups)]

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step: hypergradient, coefficients, parameters.

        Parameters without a gradient are left alone, their buffers and step counts included. ``torch.compile`` leaves
        what follows the closure as it is: the kernels are compiled already. Where ``torch.amp.GradScaler`` found an
        infinity, on any of the processes over which parameters are spread, nothing is changed; to know that, the step
        waits for the device, as the scaler itself does for most optimizers.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse, or not spread over the same processes as its parameter; or the step is
                captured in a CUDA graph without ``capturable=True``, or before a step with such gradients and options.
            ValueError: a gradient in float16 is scaled by ``torch.amp.GradScaler``, a coefficient is to be learned
                that has been frozen where part of the update is left out, or a group's ``betas`` were set that are
                learned.
            TypeError: ``hyper_grad_scale`` is not a number, or a group's ``hyper_lr`` no longer has one for each
                coefficient. As with the others, nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @_disable_dynamo
    def _update(self) -> None:
        try:
            self._take_step()
        except BaseException:
            forget_grad_scaler(self)
            raise

    def _take_step(self) -> None:
        with torch.no_grad():
            check_capture(self)
            grads = check_gradients(self)
            sets = self._coefficient_sets()
            for coefficients in sets:
                coefficients.check_step_sizes()
            for coefficients in sets:
                check_agreement(coefficients.groups)
                update_betas(self.family, coefficients.groups)
            grad_scale = take_hyper_grad_scale(self)
            is_phantom = is_phantom_step(self)
            members = [
                ParameterState(FamilyInGroup(self.family, group)).prepare(self.state, of_group)
                for group, of_group in zip(self.param_groups, grads, strict=True)
            ]
            if is_phantom or not unscale(self):
                return
            for coefficients in sets:
                coefficients.follow_parameters()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for index, coefficients in enumerate(sets):
                theirs = members if len(sets) == 1 else members[index : index + 1]
                hypergradient = take_step(coefficients, theirs, grad_scale)
                if hypergradient is not None:
                    self._hypergradients[index] = hypergradient

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: self.__dict__[name] for name in ("family", "_start", "_hypergradients", "scale")}
        return {**super().__getstate__(), **attributes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("scale", None)
        # torch calls this to load a state_dict as well, which has no such entry and leaves the hooks where they are.
        if state.get("scale") is not None:
            state["scale"].attach([self])
        for options in (self.defaults, *self.param_groups):
            for name, value in LATER_ARGUMENTS.items():
                options.setdefault(name, value)
        for index, group in enumerate(self.param_groups):
            if not isinstance(group, ParameterGroup):
                self.param_groups[index] = ParameterGroup(group, self.family)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; buffers keep their precision, and nothing is aliased.

        Args:
            state_dict: of an optimizer that was made with the same arguments.

        Raises:
            ValueError: the state is of another family, or does not fit the parameters. Nothing has been changed then.
        """
        with loading(self, self._coefficient_sets):
            super().load_state_dict(state_dict)
        self._hypergradients.clear()
        for coefficients in self._coefficient_sets():
            update_betas(self.family, coefficients.groups)
