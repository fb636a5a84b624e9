"""A recorder of what an optimizer becomes while it trains, to be made beside it in any training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from mada_optim.history import readings
from mada_optim.history.notation import SCALE, is_rate, short
from mada_optim.scale.in_use import learned_scale
from mada_optim.tables import as_html
from mada_optim.tensors.devices import as_floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, float]
# Numbers of a step by name; several in one tensor, which may still be on its way to be computed.
_Reading = list[tuple[tuple[str, ...], Tensor | tuple[float, ...]]]


class History:
    """Records what an optimizer becomes: its coefficients, learned scales and learning rates in use.

    Make it beside the optimizer. Nothing else in the loop changes::

        optimizer = MADA(model.parameters(), lr=3e-3)
        history = History(optimizer)
        ...
        history.plot()

    It works for every optimizer of this package and for any optimizer of torch, with or without a
    :class:`LearnedScale`. A step never waits for the device: numbers are read from it when somebody looks at them.
    Steps that a CUDA graph replays run no Python code, so they are not recorded. Loading with
    ``torch.distributed.checkpoint`` takes a step of its own, so make the history after it.

    The columns are the names of the coefficients (with ``hyper_per_group=True`` as ``0/rho``), ``scale_KIND`` for a
    learned scale, the learning rate at the peak of the schedule, and ``lr`` or ``lr_KIND`` for the learning rate that
    the step used.

    The optimizer's ``state_dict`` does not hold the history, so a checkpoint is the same with and without one. To go
    on with it after a resume, save ``history.state_dict()`` beside it. Copies and pickles of the optimizer have no
    history.

    Args:
        optimizer: any torch.optim.Optimizer, also in a wrapper of accelerate, Lightning or SAM.
        every: number of steps between two rows.
        limit: most rows that are kept, at least 2. When there are more, every other row is dropped, and from then on
            half as many are recorded. So any number of steps fits.

    Raises:
        TypeError: there is no optimizer of torch's kind.
        ValueError: ``every`` or ``limit`` is not a whole number, or too low.

    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = torch.optim.AdamW([weight], lr=0.1)
    >>> history = History(optimizer)
    >>> for _ in range(3):
    ...     weight.grad = torch.ones(3)
    ...     optimizer.step()
    >>> history.to_dict()
    {'step': [1, 2, 3], 'lr': [0.1, 0.1, 0.1]}
    """

    def __init__(self, optimizer: Optimizer, *, every: int = 1, limit: int = 2000) -> None:
        for name, value, least in (("every", every, 1), ("limit", limit, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        inner = readings.unwrapped(optimizer)
        self.steps = 0
        """Steps of the optimizer since the history was made, recorded or not."""
        self.every = every
        """Steps between two rows now; twice as many each time that rows were dropped."""
        self.limit = limit
        self._name = type(inner).__name__
        self._rows: list[tuple[int, Row]] = []
        self._unread: list[tuple[int, _Reading]] = []
        self._hook: Any = inner.register_step_post_hook(self._record)

    def stop(self) -> None:
        """Record no more steps; the rows stay."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # What was recorded.

    def rows(self) -> list[dict[str, float]]:
        """Return one dict for each recorded step, ``{"step": 1, "beta1": 0.9, ..., "lr": 0.003}``."""
        self._read()
        return [{"step": step, **row} for step, row in self._rows]

    def to_dict(self) -> dict[str, list[float]]:
        """Return the columns by name, as ``pandas.DataFrame`` takes them. NaN: the step had no such number."""
        rows = self.rows()
        names = dict.fromkeys(name for row in rows for name in row) or {"step": None}
        return {name: [row.get(name, float("nan")) for row in rows] for name in names}

    def plot(self, file: str | Path | None = None) -> list[Axes]:
        """Draw the coefficients and the learning rates in use over the steps.

        Args:
            file: where to write the figure, as .png, .svg or .pdf; no window is opened then. None: the figure is
                pyplot's, which a notebook shows, and a script with ``matplotlib.pyplot.show()``.

        Returns:
            The axes, from top to bottom; ``history.plot()[0].figure`` is the figure.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
            ValueError: no step has been recorded yet.
        """
        try:
            import matplotlib as mpl  # noqa: F401
        except ModuleNotFoundError as error:
            hint = "History.plot needs matplotlib: pip install 'mada-optim[plot]'"
            raise ModuleNotFoundError(hint, name=error.name) from error
        from mada_optim.history.drawing import draw_history

        paths = self._paths()
        if not paths:
            raise ValueError("History.plot: no step has been recorded yet")
        return draw_history(paths, f"What {self._name} became", file)

    def _paths(self) -> dict[str, list[tuple[int, float]]]:
        """What is drawn: all but the scales, which the rates in use show; parameter groups at one rate share a line."""
        self._read()
        paths: dict[str, list[tuple[int, float]]] = {}
        for step, row in self._rows:
            for name, value in row.items():
                if not name.startswith(SCALE):
                    paths.setdefault(name, []).append((step, value))
        rates = {name: path for name, path in paths.items() if is_rate(name)}
        first = next(iter(rates.values()), [])
        if len(rates) > 1 and all(path == first for path in rates.values()):
            paths = {name: path for name, path in paths.items() if name not in rates} | {"lr": first}
        return paths

    def __len__(self) -> int:
        return len(self._rows) + len(self._unread)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        """How much was recorded; the device is not asked."""
        return f"History({self._name}, {self.steps} steps, {len(self)} rows, every={self.every}, limit={self.limit})"

    def _repr_html_(self) -> str:
        """Show the first and the last row in a notebook."""
        rows = self.rows()
        first, last = (rows[0], rows[-1]) if rows else ({}, {})
        header = ["", *(f"step {row['step']}" for row in (first, last) if row)]
        names = [name for name in last if name != "step"]
        cells = [[name, *(short(row[name]) if name in row else "" for row in (first, last))] for name in names]
        return as_html(repr(self), [(header, cells)] if cells else [])

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Return all rows as plain numbers, which ``torch.load(..., weights_only=True)`` reads."""
        return {"steps": self.steps, "every": self.every, "limit": self.limit, "rows": self.rows()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with the rows that :meth:`state_dict` returned, in place of those that are there.

        Args:
            state_dict: of a history.
        """
        self.steps, self.every, self.limit = (state_dict[name] for name in ("steps", "every", "limit"))
        self._unread = []
        self._rows = [
            (row["step"], {name: value for name, value in row.items() if name != "step"}) for row in state_dict["rows"]
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps the rows, and records nothing: the optimizer has one history of its own."""
        self._read()
        return {**self.__dict__, "_hook": None}

    # A step.

    @_disable_dynamo
    def _record(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self.steps += 1
        if self.steps % self.every or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        reading: _Reading = [(names, values.detach().clone()) for names, values in readings.coefficients(optimizer)]
        scale = learned_scale(optimizer)
        scales = {} if scale is None else {f"{SCALE}{kind}": value for kind, value in scale.values.items()}
        for name, value in {**scales, **readings.learning_rates(optimizer)}.items():
            reading.append(((name,), value.clone().reshape(1) if isinstance(value, Tensor) else (value,)))
        self._unread.append((self.steps, reading))
        if len(self) > self.limit:
            self.every *= 2
            self._rows = [row for row in self._rows if row[0] % self.every == 0]
            self._unread = [row for row in self._unread if row[0] % self.every == 0]

    def _read(self) -> None:
        """Make floats of all that was recorded, with one transfer from each device."""
        waiting, self._unread = self._unread, []
        by_place: dict[Any, list[Tensor]] = {}
        for _, reading in waiting:
            for _, values in reading:
                if isinstance(values, Tensor):
                    by_place.setdefault((values.device, values.dtype), []).append(values)
        floats = {place: iter(as_floats(torch.cat(tensors))) for place, tensors in by_place.items()}
        for step, reading in waiting:
            row: Row = {}
            for names, values in reading:
                source = floats[values.device, values.dtype] if isinstance(values, Tensor) else iter(values)
                row.update(zip(names, source, strict=False))
            self._rows.append((step, row))
