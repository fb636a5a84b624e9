"""A torch.optim.Optimizer for any family, which learns the family's coefficients while it trains.

The hypergradient h_t needs the buffers before step t, g_t and g_{t+1}; it is known when g_{t+1} arrives. So where one
is due at the next step, the buffers are left as they were before step t and g_t is kept (``pending_grad``): the step is
*pending*. The next step first differentiates it, then repeats it with the coefficients that it had, to advance the
buffers, and goes on from there. One extra buffer is all that the hypergradient costs in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from mada_optim.blocks import Block, Roles, make_blocks
from mada_optim.coefficients import Bounds, HyperLR, LearningRule, is_number, resolve_settings
from mada_optim.family import Family
from mada_optim.hypergradient import alignment_gradient

SET_TENSORS = ("coefficients", "hyper_momentum_buffer", "hyper_skipped")
SCALAR_STATE = ("step", "pending")
Group = dict[str, Any]


class HypergradientOptimizer(Optimizer):
    """Optimizes parameters with a family's update and the family's coefficients with its hypergradient.

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
        bounds: boxes (low, high) of coefficients by name, where not the family's.
        hyper_per_group: learn one set of coefficients for each parameter group instead of one for the model. Groups
            may then have their own start values, ``hyper_lr`` and ``bounds``.
        maximize: maximize the objective.
        constants: the family's constants, by name. Groups may override them, as they may lr and weight_decay.

    Raises:
        ValueError: an argument is out of its range, a name unknown, a parameter listed twice.
        TypeError: an argument has the wrong type.

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
        maximize: bool = False,
        **constants: Any,
    ) -> None:
        if not isinstance(family, Family):
            raise TypeError(f"family must be an instance of mada_optim.Family, got {family!r}")
        unknown = [name for name in constants if name not in family.constants]
        if unknown:
            raise TypeError(f"unexpected argument {unknown[0]!r}; constants of {family.name}: {list(family.constants)}")
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
            "maximize": maximize,
            **family.constants,
            **constants,
        }
        super().__init__(params, defaults)

    # What the user reads and says about the coefficients.

    def coefficients(self, group: int = 0) -> dict[str, float]:
        """Current values of all coefficients, learned or not, as floats.

        Args:
            group: index of the parameter group; matters only with ``hyper_per_group=True``.
        """
        return self._by_name(self.param_groups[group]["coefficients"])

    def hypergradients(self, group: int = 0) -> dict[str, float] | None:
        """h of the latest step that took one, before clipping; frozen coefficients have 0. None if none was taken."""
        set_index = group if self.param_groups[group]["hyper_per_group"] else 0
        latest = self._hypergradients.get(set_index)
        return None if latest is None else self._by_name(latest)

    @property
    def skipped_hypergradients(self) -> int:
        """How many hypergradients were not finite and therefore left the coefficients where they were."""
        return sum(int(groups[0]["hyper_skipped"]) for groups in self._coefficient_sets())

    def freeze(self) -> None:
        """Stop learning: the coefficients stay where they are from now on, and what learning needs is released."""
        for group in self.param_groups:
            group["hyper_lr"] = dict.fromkeys(group["hyper_lr"], 0.0)

    def frozen_config(self, group: int = 0) -> dict[str, Any]:
        """Keyword arguments with which an optimizer of this class holds these coefficients fixed from the start.

        With them a second training uses what the first one found (the paper's MADA-FS).
        """
        return {"start": self.coefficients(group), "hyper_lr": 0.0}

    def _by_name(self, values: Tensor) -> dict[str, float]:
        return dict(zip((c.name for c in self.family.coefficients), values.tolist(), strict=True))

    # Parameter groups.

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, also in the middle of a training; see torch.optim.Optimizer.add_param_group."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        group["params"] = _as_list(group.get("params", ()))
        start = self._pop_start(group)
        first = self.param_groups[0] if self.param_groups else None
        per_group = self.defaults["hyper_per_group"]
        if not per_group:
            own = [*start, *(key for key in _SET_KEYS if key in group)]
            if own:
                raise ValueError(
                    f"parameter group sets {own[0]!r}, but all groups share one set of coefficients; "
                    "give it to the optimizer, or use hyper_per_group=True"
                )
        group = {**self.defaults, **group}
        self._check_group(group)
        settings = resolve_settings(self.family, self._start | start, group["hyper_lr"], group["bounds"])
        group.update(
            family=self.family.name,
            hyper_lr=settings.hyper_lr,
            bounds=settings.bounds,
            special=settings.special,
            hyper_steps=0,
            previous_lr=0.0,
        )
        if first is not None and not per_group:
            group.update({key: first[key] for key in (*_SET_KEYS, *SET_TENSORS, "special", "hyper_steps")})
        else:
            device = next((_tensor(param).device for param in group["params"]), torch.device("cpu"))
            values = torch.tensor(list(settings.start.values()), dtype=torch.float64, device=device)
            group.update(
                coefficients=values,
                hyper_momentum_buffer=torch.zeros_like(values),
                hyper_skipped=torch.zeros((), dtype=torch.int64, device=device),
            )
        super().add_param_group(group)

    def _pop_start(self, group: Group) -> dict[str, float]:
        """Take the initial values of coefficients out of a parameter group as the user wrote it."""
        return {c.name: group.pop(c.name) for c in self.family.coefficients if c.name in group}

    def _check_group(self, group: Group) -> None:
        for name in ("lr", "weight_decay"):
            value = group[name]
            if isinstance(value, Tensor) and name == "lr":
                if value.numel() != 1:
                    raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(value.shape)}")
            elif not is_number(value) or value < 0.0:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        for name in ("maximize", "hyper_per_group"):
            if not isinstance(group[name], bool):
                raise TypeError(f"{name} must be a bool, got {group[name]!r}")
        _rule(group)
        self.family.validate_constants({name: group[name] for name in self.family.constants})
        tensors = [_tensor(param) for param in group["params"]]
        if len({id(tensor) for tensor in tensors}) != len(tensors):
            raise ValueError("params: a parameter is listed twice in one parameter group")
        for tensor in tensors:
            if isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
                raise TypeError(f"params: can only optimize floating-point or complex tensors, got {tensor.dtype}")
            if isinstance(tensor, DTensor):
                raise TypeError("params: DTensor (FSDP2, tensor parallel) parameters are not supported yet")

    def _coefficient_sets(self) -> list[list[Group]]:
        """Parameter groups that share one set of coefficients, for each set."""
        if self.defaults["hyper_per_group"]:
            return [[group] for group in self.param_groups]
        return [self.param_groups]

    # The step.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one step: hypergradient, coefficients, parameters.

        Parameters without a gradient are left alone, their buffers and step counts included.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        phantom = self._is_phantom_step()
        for param, group in self._params_with_grad():
            if not self.state[param]:
                self._init_state(param, group)
        if not phantom:
            for index, groups in enumerate(self._coefficient_sets()):
                self._step_set(index, groups)
        return loss

    def _step_set(self, index: int, groups: list[Group]) -> None:
        shared, rule = groups[0], _rule(groups[0])
        learning = _is_learning(shared)
        before = shared["coefficients"].clone()
        if learning and rule.due(shared["hyper_steps"]):
            hypergradient = self._hypergradient(groups, before)
            if hypergradient is not None:
                self._hypergradients[index] = hypergradient
                rule.learn(
                    *(shared[key] for key in SET_TENSORS),
                    hypergradient,
                    tuple(shared["hyper_lr"].values()),
                    tuple(shared["bounds"].values()),
                )
        after = shared["coefficients"].clone()
        steps = shared["hyper_steps"] + 1
        keep = learning and rule.due(steps)
        for group in groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["step"] += 1
            for _, step, pending, blocks in self._blocks(group):
                for block in blocks:
                    self._update_block(block, group, step, before if pending else None, after, keep)
            self._settle_without_grad(group, before)
            self._mark_pending(group, keep, learning)
            group["hyper_steps"] = steps
            group["previous_lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]

    def _hypergradient(self, groups: list[Group], values: Tensor) -> Tensor | None:
        """h_t over all parameters whose step t is pending and that have a gradient; None where there are none."""
        learned = [name for name, alpha in groups[0]["hyper_lr"].items() if alpha > 0.0]
        index = [i for i, alpha in enumerate(groups[0]["hyper_lr"].values()) if alpha > 0.0]
        total: Tensor | None = None
        for group in groups:
            for device, step, pending, blocks in self._blocks(group):
                if not pending:
                    continue
                q = self._q(group, values, device)
                for block in blocks:
                    dtype = _compute_dtype(block)
                    gradient = alignment_gradient(
                        self.family,
                        {name: block.read(name, dtype) for name in self.family.buffers(q)},
                        block.read("pending_grad", dtype),
                        _signed_grad(block, group, dtype),
                        q,
                        learned,
                        step,
                    )
                    if total is None:
                        total = torch.zeros_like(values)
                    total[index] -= group["previous_lr"] * gradient.to(total.device)
        return total

    def _update_block(
        self, block: Block, group: Group, step: Tensor, before: Tensor | None, after: Tensor, keep: bool
    ) -> None:
        """Step number ``step`` of one block; ``before``: coefficients of the previous step, if that is pending."""
        dtype = _compute_dtype(block)
        grad = _signed_grad(block, group, dtype)
        q = self._q(group, after, grad.device)
        names = self.family.buffers(q)
        state = {name: block.read(name, dtype) for name in names}
        stored = state
        if before is not None:
            previous = self._q(group, before, grad.device)
            _, state = self.family.update(state, block.read("pending_grad", dtype), previous, step - 1)
        direction, new_state = self.family.update(state, grad, q, step)
        param = block.read("param", dtype)
        block.write("param", param * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction)
        # Buffers first: an advanced buffer may be the stored pending gradient itself.
        result = state if keep else new_state
        if result is not stored:
            for name in names:
                block.write(name, result[name])
        if keep:
            block.write("pending_grad", grad)

    def _settle_without_grad(self, group: Group, before: Tensor) -> None:
        """Carry out pending steps of parameters that have no gradient now: their coefficients are about to change."""
        for device, step, pending, blocks in self._blocks(group, with_grad=False):
            if not pending:
                continue
            q = self._q(group, before, device)
            for block in blocks:
                dtype = _compute_dtype(block)
                state = {name: block.read(name, dtype) for name in self.family.buffers(q)}
                _, new_state = self.family.update(state, block.read("pending_grad", dtype), q, step)
                for name, value in new_state.items():
                    block.write(name, value)

    def _mark_pending(self, group: Group, keep: bool, learning: bool) -> None:
        for param in group["params"]:
            state = self.state.get(param)
            if not state:
                continue
            if learning:
                state["pending"].fill_(keep and param.grad is not None)
            else:
                state.pop("pending", None)
                state.pop("pending_grad", None)

    def _blocks(
        self, group: Group, with_grad: bool = True
    ) -> Iterator[tuple[torch.device, Tensor, bool, Iterator[Block]]]:
        """Blocks of the group's parameters that have state, with their device, step count, and whether it is pending.

        Parameters of one block agree in all of these.
        """

        def key(param: Tensor) -> tuple[str, str, float, bool]:
            state = self.state[param]
            pending = "pending" in state and bool(state["pending"])
            return str(param.device), str(param.dtype), float(state["step"]), pending

        params = [p for p in group["params"] if self.state.get(p) and (p.grad is not None) == with_grad]
        # Sorting is stable: the order of summation, and so every bit of the result, is the parameters' order.
        for (_, _, count, pending), members in groupby(sorted(params, key=key), key=key):
            roles = [self._roles(param) for param in members]
            device = roles[0]["param"].device
            step = torch.tensor(count, dtype=torch.float64, device=device)
            yield device, step, pending, make_blocks(roles, self.family.elementwise)

    def _roles(self, param: Tensor) -> Roles:
        tensors = {"param": param} | {k: v for k, v in self.state[param].items() if k not in SCALAR_STATE}
        if param.grad is not None:
            tensors["grad"] = param.grad
        return {role: torch.view_as_real(t) if t.is_complex() else t for role, t in tensors.items()}

    def _q(self, group: Group, values: Tensor, device: torch.device) -> dict[str, Any]:
        """Coefficients and constants as :meth:`Family.update` takes them."""
        names = (c.name for c in self.family.coefficients)
        constants = {name: group[name] for name in self.family.constants}
        return {**dict(zip(names, values.to(device).unbind(), strict=True)), **group["special"], **constants}

    # State of the parameters.

    def _params_with_grad(self) -> Iterator[tuple[Tensor, Group]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield param, group

    def _init_state(self, param: Tensor, group: Group) -> None:
        dtype = torch.promote_types(param.dtype, torch.float32)

        def zeros() -> Tensor:
            return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name in self.family.buffers(self._q(group, group["coefficients"], param.device)):
            state[name] = zeros()
        if _is_learning(group):
            state["pending_grad"] = zeros()
            state["pending"] = torch.zeros((), dtype=torch.bool, device="cpu")

    def _check_gradients(self) -> None:
        for param, _ in self._params_with_grad():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, got layout {param.grad.layout} "
                    f"for a parameter of shape {tuple(param.shape)}"
                )

    def _is_phantom_step(self) -> bool:
        """Whether this call only wants the state to be there: torch.distributed.checkpoint's lr = 0, zero gradients.

        Counting it as a step would change what a resumed run does.
        """
        if self.state or any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        return not any(bool(param.grad.any()) for param, _ in self._params_with_grad() if param.grad is not None)

    # Saving and loading.

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("family", "_start", "_hypergradients")}
        return {**super().__getstate__(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; buffers keep their precision, and nothing is aliased.

        Raises:
            ValueError: the state is of another family, or does not fit the parameters. Nothing has been changed then.
        """
        buffers: dict[Any, dict[str, Any]] = {}

        def check(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            self._check_state_dict(saved)
            buffers.update(saved["state"])
            # torch would cast every buffer to the dtype of its parameter.
            return {**saved, "state": {}}

        def fill(_: Optimizer) -> None:
            self._fill_state(buffers, state_dict["param_groups"])

        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_state_dict(self, saved: dict[str, Any]) -> None:
        groups = saved["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return  # torch's own check, which follows, says what is wrong
        for index, (own, other) in enumerate(zip(self.param_groups, groups, strict=True)):
            if other.get("family") != own["family"]:
                raise ValueError(
                    f"state_dict is of family {other.get('family')!r}, this optimizer of {own['family']!r}"
                )
            for key in ("special", "hyper_per_group"):
                if other[key] != own[key]:
                    raise ValueError(
                        f"state_dict has {key}={other[key]!r} in parameter group {index}, this optimizer {own[key]!r}"
                    )
        for param, saved_id in _paired(self.param_groups, groups):
            for name, value in saved["state"].get(saved_id, {}).items():
                if name not in SCALAR_STATE and value.shape != param.shape:
                    raise ValueError(
                        f"state_dict has {name} of shape {tuple(value.shape)} for parameter {saved_id} "
                        f"of shape {tuple(param.shape)}"
                    )

    def _fill_state(self, buffers: dict[Any, dict[str, Any]], saved_groups: list[Group]) -> None:
        for groups in self._coefficient_sets():
            device = next((p.device for group in groups for p in group["params"]), torch.device("cpu"))
            for key in SET_TENSORS:
                tensor = groups[0][key].to(device)
                for group in groups:
                    group[key] = tensor
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for param, saved_id in _paired([group], [saved_group]):
                if not buffers.get(saved_id):
                    continue
                self._init_state(param, group)
                for name, value in buffers[saved_id].items():
                    if name in self.state[param]:
                        self.state[param][name].copy_(value)


_SET_KEYS = ("hyper_lr", "bounds", "hyper_momentum", "hyper_clip", "hyper_warmup", "hyper_every")


def _rule(group: Group) -> LearningRule:
    return LearningRule(group["hyper_momentum"], group["hyper_clip"], group["hyper_warmup"], group["hyper_every"])


def _is_learning(group: Group) -> bool:
    return any(alpha > 0.0 for alpha in group["hyper_lr"].values())


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensor(param: Any) -> Tensor:
    return param[1] if isinstance(param, tuple) else param


def _compute_dtype(block: Block) -> torch.dtype:
    return torch.promote_types(block.members[0]["param"].dtype, torch.float32)


def _signed_grad(block: Block, group: Group, dtype: torch.dtype) -> Tensor:
    grad = block.read("grad", dtype)
    return -grad if group["maximize"] else grad


def _paired(groups: Iterable[Group], saved_groups: Iterable[Group]) -> Iterator[tuple[Tensor, Any]]:
    params = chain.from_iterable(group["params"] for group in groups)
    saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
    return zip(params, saved_ids, strict=True)
