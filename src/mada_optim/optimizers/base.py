"""A torch.optim.Optimizer for any family, which learns the family's coefficients while it trains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from mada_optim.arguments import tensor_of, to_python
from mada_optim.engine.betas import (
    BETAS,
    ParameterGroup,
    fixed_betas,
    has_betas,
    ignores_betas,
    learned_betas,
    start_betas,
    update_betas,
    without_effect,
)
from mada_optim.engine.coefficient_set import (
    PREVIOUS_LR,
    SET_SETTINGS,
    SET_TENSORS,
    CoefficientSet,
    Group,
    new_tensors,
)
from mada_optim.engine.parameter_state import ParameterState
from mada_optim.engine.step import release, take_step
from mada_optim.families import Family
from mada_optim.families.in_group import FamilyInGroup
from mada_optim.learning import Bounds, HyperLR
from mada_optim.optimizers.checkpoint import LATER_ARGUMENTS, check_fits, complete_groups, fill_state
from mada_optim.optimizers.groups import (
    check_agreement,
    check_family_names,
    check_group,
    describe,
    read_group,
    resolve_group,
    with_python_numbers,
)
from mada_optim.scale import LearnedScale
from mada_optim.scale.rule import ADAPTIVE
from mada_optim.tensors.devices import (
    as_floats,
    device_of,
    device_with_values,
    has_values,
    is_capturing,
    number_dtype,
    number_on,
)
from mada_optim.tensors.distributed import any_process, check_learnable, local, place_gradient, tell_autograd, whole

Scale = bool | Mapping[str, float]


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
        bounds: boxes (low, high) of coefficients by name. The others keep the family's.
        hyper_per_group: learn one set of coefficients for each parameter group instead of one for the model. Groups
            may then have their own ``start``, ``hyper_lr`` and ``bounds``.
        foreach: None, the default: see ``fused``. True or False use torch's operators alone. True joins small
            parameters, as ``fused=False`` does; False takes parameters one by one.
        maximize: maximize the objective.
        capturable: whether the step may be captured in a CUDA graph. Step counts are then kept on the device, and the
            hypergradient is computed at every step, used or not. Take two steps before the capture.
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

    # How torch.amp.GradScaler learns that it may leave unscaling and skipping to the step.
    _step_supports_amp_scaling = True
    hyper_grad_scale: float | Tensor = 1.0
    """Factor of the next hypergradient: how many times as long the gradients were before they were clipped.

    Otherwise a gradient that is cut to a tenth of its length makes a tenth of the hypergradient. A number or a
    0-dimensional tensor, the same on every process; 1 again after each step.
    """

    def __init__(
        self,
        params: ParamsT,
        family: Family,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        start: Mapping[str, float] | None = None,
        hyper_lr: HyperLR = None,
        hyper_momentum: float = 0.0,
        hyper_clip: float = 10.0,
        hyper_warmup: int = 50,
        hyper_every: int = 1,
        bounds: Bounds | None = None,
        hyper_per_group: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        scale: Scale = False,
        **constants: Any,
    ) -> None:
        if not isinstance(family, Family):
            raise TypeError(f"family must be an instance of mada_optim.Family, got {family!r}")
        try:
            hash(family)
        except TypeError:
            hint = "declare it with @dataclass(frozen=True), or define __hash__"
            raise TypeError(f"family must be hashable, and {type(family).__name__} is not; {hint}") from None
        unknown = [name for name in constants if name not in family.constants]
        if unknown:
            raise TypeError(f"unexpected argument {unknown[0]!r}; constants of {family.name}: {list(family.constants)}")
        check_family_names(family, inspect.signature(HypergradientOptimizer).parameters)
        self.family = family
        self._start: dict[str, float] = dict(start or {})
        self._hypergradients: dict[int, Tensor] = {}
        defaults: Group = {
            "lr": lr,
            "weight_decay": weight_decay,
            "hyper_lr": hyper_lr,
            "hyper_momentum": hyper_momentum,
            "hyper_clip": hyper_clip,
            "hyper_warmup": hyper_warmup,
            "hyper_every": hyper_every,
            "bounds": bounds,
            "hyper_per_group": hyper_per_group,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            **family.constants,
            **constants,
        }
        if has_betas(family):
            start_of = {coefficient.name: coefficient.default for coefficient in family.coefficients} | self._start
            defaults["betas"] = tuple(start_of[name] for name in BETAS)
        scale = to_python(scale)
        if not isinstance(scale, (bool, Mapping)):
            raise TypeError(
                "scale must be True, False, or a mapping from kinds of parameters to learning rates, as "
                f"frozen_config() returns it, got {scale!r}"
            )
        super().__init__(params, with_python_numbers(family, defaults, defaults))
        if all(ignores_betas(family, group) for group in self.param_groups):
            self.defaults.pop("betas", None)  # by which schedulers see that there are none to cycle
        self.scale: LearnedScale | None = None if scale is False else self._learn_scale(scale)
        """The learning rate that is found, where ``scale`` asks for one."""

    def _learn_scale(self, scale: bool | Mapping[str, float]) -> LearnedScale:
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
        """The coefficients, and what was set by the user."""
        ours = (cls for cls in reversed(type(self).__mro__) if issubclass(cls, HypergradientOptimizer))
        arguments = (argument for cls in ours for argument in inspect.signature(cls).parameters.values())
        defaults = {**self.family.constants, **{argument.name: argument.default for argument in arguments}}
        coefficients = [self.coefficients(index) for index in range(len(self.param_groups))]
        lines = [describe(self.family, self.param_groups, coefficients, defaults)]
        if self.scale is not None:
            lines.append("Learning rate, searched for" if self.scale.searching else "Learning rate that was found")
            lines += [f"    {kind}: {value:.3g}" for kind, value in self.scale.values.items()]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    def _repr_html_(self) -> str:
        """For notebooks."""
        from mada_optim.history.notebook import optimizer_as_html

        return optimizer_as_html(self)

    # Parameter groups.

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, also in the middle of a training; see torch.optim.Optimizer.add_param_group.

        Args:
            param_group: ``params`` and the options of the group. What it does not name is the optimizer's.
        """
        group = read_group(self.family, self.defaults, param_group)
        self._check_group(group)
        first = None if self.defaults["hyper_per_group"] or not self.param_groups else self.param_groups[0]
        shared = None if self.defaults["hyper_per_group"] else first or self.defaults
        settings = resolve_group(self.family, self._start, param_group, group, shared)
        if group["differentiable"] and any(settings.hyper_lr.values()):
            raise ValueError("differentiable=True needs coefficients that are not learned: hyper_lr=0.0")
        group.update(
            family=self.family.name,
            hyper_lr=settings.hyper_lr,
            bounds=settings.bounds,
            special=settings.special,
        )
        if ignores_betas(self.family, group) and fixed_betas(param_group).items() - self._start.items():
            raise ValueError(without_effect(param_group["betas"]))
        if any(settings.hyper_lr.values()):
            check_learnable(map(tensor_of, group["params"]))
        device = device_with_values(map(tensor_of, group["params"]))
        group[PREVIOUS_LR] = number_on(0.0, device) if group["capturable"] else 0.0
        if first is not None:
            group.update({key: first[key] for key in (*SET_SETTINGS, *SET_TENSORS, "special")})
        else:
            values = list(settings.start.values())
            group.update(new_tensors(values, number_dtype(device), device, group["capturable"]))
        ParameterState(FamilyInGroup(self.family, group)).check_names()
        super().add_param_group(ParameterGroup(group, self.family))
        start_betas(self.family, self.param_groups[-1], settings.start)

    def _check_group(self, group: Group) -> None:
        check_group(self.family, group, self.defaults["hyper_per_group"])

    def _coefficient_sets(self) -> list[CoefficientSet]:
        """The sets of coefficients: one, or one for each parameter group."""
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
                captured in a CUDA graph without ``capturable=True``.
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
            # torch.amp.GradScaler takes these back only after a step that succeeds.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _take_step(self) -> None:
        with torch.no_grad():
            self._check_capture()
            self._check_gradients()
            sets = self._coefficient_sets()
            for coefficients in sets:
                coefficients.check_step_sizes()
            for coefficients in sets:
                check_agreement(coefficients.groups)
                update_betas(self.family, coefficients.groups)
            grad_scale = self._take_hyper_grad_scale()
            phantom = self._is_phantom_step()
            for group in self.param_groups:
                ParameterState(FamilyInGroup(self.family, group)).prepare(self.state)
            if phantom or not self._unscale():
                return
            for coefficients in sets:
                coefficients.follow_parameters()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for index, coefficients in enumerate(sets):
                hypergradient = take_step(coefficients, self.state, grad_scale)
                if hypergradient is not None:
                    self._hypergradients[index] = hypergradient

    def _take_hyper_grad_scale(self) -> float | Tensor:
        """What the user set for this step and for no other, also if it is not taken."""
        scale: Any = self.hyper_grad_scale
        if isinstance(scale, Tensor) and scale.numel() == 1:
            scale = whole(scale.detach()).reshape(())
        elif isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"hyper_grad_scale must be a number or a tensor of one element, got {scale!r}")
        else:
            scale = float(scale)
        self.__dict__.pop("hyper_grad_scale", None)
        return scale  # type: ignore[no-any-return]

    def _unscale(self) -> bool:
        """What torch.amp.GradScaler leaves to the step, by two attributes; whether the step is to be taken."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        params = (param for group in self.param_groups for param in group["params"])
        if found_inf is not None and any_process(params, bool(found_inf)):
            return False
        if grad_scale is not None:
            inverse = grad_scale.to(number_dtype(grad_scale.device)).reciprocal()
            for param, _ in self._params_with_grad():
                if param.grad is not None:
                    grad = local(param.grad)
                    grad.mul_(inverse.to(grad.device, torch.promote_types(grad.dtype.to_real(), torch.float32)))
                    tell_autograd([param.grad])
        return True

    def _params_with_grad(self) -> Iterator[tuple[Tensor, Group]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param, group

    def _check_capture(self) -> None:
        """As torch's optimizers do: a graph would replay the step count, seeds and learning rate of its capture."""
        if all(group["capturable"] for group in self.param_groups):
            return
        if is_capturing(device_of(param for group in self.param_groups for param in group["params"])):
            raise RuntimeError(
                f"{type(self).__name__}: step() is being captured in a graph, which needs capturable=True in all "
                "parameter groups; make the optimizer with capturable=True"
            )

    def _check_gradients(self) -> None:
        scaled = getattr(self, "grad_scale", None) is not None
        for param, _ in self._params_with_grad():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, got layout {param.grad.layout} "
                    f"for a parameter of shape {tuple(param.shape)}"
                )
            if scaled and param.grad is not None and param.grad.dtype.to_real() == torch.float16:
                raise ValueError(
                    "torch.amp.GradScaler: gradients in float16 cannot be unscaled without losing what they are scaled "
                    "for; keep parameters in float32 and use torch.autocast"
                )
            place_gradient(param)

    def _is_phantom_step(self) -> bool:
        """Whether this call only wants the state to be there: torch.distributed.checkpoint's lr = 0, zero gradients.

        Counting it as a step would change what a resumed run does.
        """
        if self.state or any(group["lr"] != 0.0 for group in self.param_groups):
            return False
        grads = [local(param.grad) for param, _ in self._params_with_grad() if param.grad is not None]
        nonzero = any(bool(grad.any()) for grad in grads if has_values(grad.device))
        if any(int(group["hyper_steps"]) for group in self.param_groups):
            # Other processes may have a state, and do not ask. Whoever wants one here has given all a gradient.
            return bool(grads) and not nonzero
        return not any_process((param for group in self.param_groups for param in group["params"]), nonzero)

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("family", "_start", "_hypergradients", "scale")}
        return {**super().__getstate__(), **own}

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
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            groups = complete_groups(saved["param_groups"], self.param_groups, self.defaults["hyper_per_group"])
            saved = {**saved, "param_groups": groups}
            check_fits(self.family, saved, self.param_groups, [name for name in self.defaults if name != "betas"])
            loaded.update(saved)
            # torch would cast every buffer to the dtype of its parameter.
            ids = {saved_id for group in saved["param_groups"] for saved_id in group["params"]}
            return {**saved, "state": {key: value for key, value in saved["state"].items() if key not in ids}}

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: fill_state(self.family, loaded, self._coefficient_sets(), self.param_groups, self.state),
                prepend=True,
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._hypergradients.clear()
        for coefficients in self._coefficient_sets():
            update_betas(self.family, coefficients.groups)
