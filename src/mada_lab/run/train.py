"""One training run, from a configuration to a run folder."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mada_lab.errors import InputError, require_device
from mada_lab.files import finite, locked, read_json, write_json
from mada_lab.optimizers.build import build
from mada_lab.run.coefficients import coefficients_of, is_searching, learned_among
from mada_lab.run.config import ResolvedRun, RunConfig, resolve, resolved_from_dict, to_dict
from mada_lab.run.folder import RunFolder
from mada_lab.run.metrics_log import MetricsLog
from mada_lab.run.processes import Processes, join_processes, restarts
from mada_lab.run.result import Result, summarize
from mada_lab.run.signals import stop_signal
from mada_lab.tasks.base import Batch, Task

PATIENCE = 10  # steps without a finite loss in a row, after which a run has diverged


@dataclass(frozen=True)
class StepReport:
    """What is known after a step; ``val_loss`` is the latest. ``loss`` is NaN where it was not finite.

    ``learned`` holds the values that the optimizer learns, by name; coefficients that it keeps are not among them.
    ``news`` is a line for the log: that a learning rate was found.
    """

    step: int
    loss: float
    val_loss: float | None
    lr: float
    learned: dict[str, float]
    validated: bool
    news: str = ""


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    on_begin: Callable[[int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    draw: bool = True,
) -> Result:
    """Train, and leave everything that is known about it in ``run_dir``.

    Started by torchrun, the processes share each batch: to rounding, the run is that of one process, but for dropout
    and batch normalization. The first writes.

    Args:
        config: the run; :func:`resolve` puts a value in place of every None in it, unless that is done.
        run_dir: a new or empty folder; with ``resume``, the folder of a run of the same configuration.
        resume: go on from the checkpoint, which every process reads. The result is bit for bit that of an uninterrupted
            run with as many processes. So does a run whose processes torchrun has started again.
        on_begin: called before the first step, with the number of steps that were done before; nothing stands in the
            way of the run then.
        on_step: called after each step.
        draw: make the figure at the end.

    Returns:
        The result; that of a run that is already over is read from its folder.

    Raises:
        InputError: the configuration, the data or the folder is not usable, or another process trains in it; nothing
            has been written then. Or the folder cannot be written any more; it holds the last checkpoint then, from
            which to resume.
    """
    run = config if isinstance(config, ResolvedRun) else resolve(config)
    require_device(run.device)  # a stored run may be of another machine
    task = run.task.build()
    folder = RunFolder(run_dir)
    resume = resume or (restarts() > 0 and folder.config_file.exists())
    if resume:
        folder.check_same(run, task.describe())
        if folder.result_file.exists():
            return Result(**read_json(folder.result_file))
    with (
        join_processes(run.device) as processes,
        _torch_threads(run.threads),
        stop_signal(alone=processes.size == 1) as stop,
    ):
        processes.share(task.batch(run.seed, 1), run.accumulate)  # raises where that cannot be done
        begins = processes.first and not resume
        if begins:
            folder.check_free()
        with locked(folder.path) if processes.first else nullcontext():
            if begins:
                folder.create(run, task.describe())
            training = _Training(run, task, folder, processes, resume)
            if on_begin is not None:
                on_begin(training.step)
            try:
                return training.go(on_step, stop, draw)
            except OSError as error:
                raise InputError(
                    f"{folder.path} cannot be written at step {training.step}: {error.strerror or error}; "
                    "when that is mended, resume the run from its last checkpoint"
                ) from error
            finally:
                training.release()


class _Training:
    """The state of a training between two steps."""

    def __init__(self, config: ResolvedRun, task: Task, folder: RunFolder, processes: Processes, resume: bool) -> None:
        self.config, self.task, self.folder, self.processes = config, task, folder, processes
        self.device = processes.device(config.device)
        self.model = task.model(config.seed).to(self.device, getattr(torch, config.dtype))
        self.optimizer = build(config.optimizer, self.model)
        self.step = 0
        self.bad_steps = 0
        self.val_loss: float | None = None
        if resume:
            self._restore()
        begun = torch.tensor([self.step, -self.step], dtype=torch.int64, device=self.device)
        lowest, highest = processes.least(begun).abs().int().tolist()
        if lowest != highest:
            raise InputError(
                f"{folder.path} does not hold the same run for all processes: steps {lowest} to {highest}; "
                "all must see one folder"
            )
        self.spread_model = processes.spread(self.model)

    def go(self, on_step: Callable[[StepReport], None] | None, stop: threading.Event, draw: bool) -> Result:
        config = self.config
        self._set_mode(training=True)
        self._settle_order_of_sums()
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            MetricsLog(self.folder, 0 if self.val_loss is None else self.step + 1, self.processes.first) as metrics,
        ):

            def checkpoint() -> None:
                # Metrics first: a checkpoint may not know of steps that metrics.jsonl lacks.
                metrics.flush(to_disk=True)
                self._save()

            if self.val_loss is None:
                metrics.write(self._validation())
            while self.step < config.steps and self.bad_steps < PATIENCE and not self._stopped(stop):
                searching = is_searching(self.optimizer)
                line = self._train_step()
                metrics.write(line)
                validated = self.step % config.eval_every == 0 or self.step == config.steps
                if validated:
                    metrics.write(self._validation())
                    metrics.flush()
                if self.step % config.checkpoint_every == 0:
                    checkpoint()
                if on_step is not None:
                    loss = math.nan if line["loss"] is None else line["loss"]
                    learned = learned_among(self.optimizer, line.get("coefficients", {}))
                    ended = searching and not is_searching(self.optimizer)
                    news = self.optimizer.scale.describe() if ended else ""  # type: ignore[attr-defined]
                    on_step(StepReport(self.step, loss, self.val_loss, line["lr"], learned, validated, news))
            checkpoint()
        return self.processes.from_first(lambda: self._finish(draw))

    def release(self) -> None:
        """Let go of DDP while the processes are joined: freed later, it may wait for ever, for its own threads."""
        del self.spread_model
        if self.processes.size > 1:
            gc.collect()

    def _stopped(self, stop: threading.Event) -> bool:
        """All processes stop after the same step, whichever of them was told to."""
        told = torch.tensor(float(stop.is_set()), device=self.device)
        return self.processes.mean(told).item() > 0

    def _train_step(self) -> dict[str, Any]:
        config, began = self.config, self._now()
        self.step += 1
        # Dropout depends on the step alone, and so a resumed run draws what an uninterrupted one does.
        torch.manual_seed(_mixed(config.seed, self.step, self.processes.rank))
        lr = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self._backward(self.processes.share(self.task.batch(config.seed, self.step), config.accumulate))
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        value, optimizer_seconds = self.processes.mean(loss).item(), 0.0
        if math.isfinite(value) and math.isfinite(norm.item()):
            self.bad_steps = 0
            if config.hyper_unclipped and config.clip:
                self.optimizer.hyper_grad_scale = (norm / config.clip).clamp(min=1.0)  # type: ignore[attr-defined]
            before = self._now()
            self.optimizer.step()
            optimizer_seconds = self._now() - before
        else:
            # One update with it would make every weight NaN; a single bad batch should not end a run.
            self.bad_steps += 1
        # The highest rate that was used; a learned scale changes what the schedule gives.
        used = max(float(group["lr"]) for group in self.optimizer.param_groups)
        line: dict[str, Any] = {"step": self.step, "loss": finite(value), "lr": used}
        if self.bad_steps:
            line["skipped"] = True
        if coefficients := coefficients_of(self.optimizer):
            line["coefficients"] = coefficients
        return {**line, "step_seconds": self._now() - began, "optimizer_seconds": optimizer_seconds}

    def _backward(self, parts: list[Batch]) -> Tensor:
        """Add up the gradients of micro-batches; their mean loss. The processes exchange them once, with the last."""
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, start=1):
            with self.processes.averaging(self.spread_model, now=number == len(parts)):
                loss = self.task.loss(self.spread_model, part) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def _settle_order_of_sums(self) -> None:
        """A backward pass that changes nothing.

        After its first, DDP arranges gradients anew, and more than two processes add them up in another order then: a
        resumed run would begin with the first order where one that was not interrupted has the second.
        """
        if self.processes.size > 1:
            self.spread_model.eval()
            self._backward(self.processes.share(self.task.batch(self.config.seed, 1), self.config.accumulate))
            self.optimizer.zero_grad()
            self.spread_model.train()

    def _validation(self) -> dict[str, Any]:
        self._set_mode(training=False)
        values = self.task.validate(self.model)
        self._set_mode(training=True)
        self.val_loss = values["loss"]
        return {"step": self.step, **{f"val_{name}": finite(value) for name, value in values.items()}}

    def _set_mode(self, training: bool) -> None:
        """Set the mode of the model, and of schedule-free optimizers, whose weights in training are others."""
        for part in (self.model, self.optimizer):
            switch = getattr(part, "train" if training else "eval", None)
            if switch is not None:
                switch()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _save(self) -> None:
        if not self.processes.first:
            return
        self.folder.save_checkpoint(
            {
                "config": to_dict(self.config),
                "step": self.step,
                "bad_steps": self.bad_steps,
                "val_loss": self.val_loss,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def _restore(self) -> None:
        state = self.folder.load_checkpoint()
        if state is None:
            if self.processes.first:
                self.folder.metrics_file.unlink(missing_ok=True)
            return
        try:
            if resolved_from_dict(state["config"]) != self.config:
                raise ValueError("it is of another configuration")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.bad_steps, self.val_loss = state["bad_steps"], state["val_loss"]
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.folder.checkpoint_file} does not fit config.json beside it: {reason}") from error
        if self.processes.first:
            self.folder.truncate_metrics(state["step"])
        self.step = state["step"]

    def _finish(self, draw: bool) -> Result:
        over = self.step == self.config.steps
        val_loss = math.nan if self.val_loss is None else self.val_loss
        diverged = self.bad_steps >= PATIENCE or (over and not math.isfinite(val_loss))
        status = "diverged" if diverged else "finished" if over else "interrupted"
        skipped = int(getattr(self.optimizer, "skipped_hypergradients", 0))
        result = summarize(self.folder.metrics(), status, coefficients_of(self.optimizer), skipped)
        if status != "interrupted":
            if draw:
                from mada_lab.run.figure import draw_run

                draw_run(self.folder)
            write_json(self.folder.result_file, dataclasses.asdict(result))
        return result


def _mixed(*numbers: int) -> int:
    """A seed made of all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
