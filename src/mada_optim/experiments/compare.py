"""Several optimizers on equal terms: the same learning rates, seeds, initial weights, data order and steps."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mada_optim.experiments import report
from mada_optim.experiments.config import RunConfig, differences, from_dict, to_dict
from mada_optim.experiments.optimizers import parse
from mada_optim.experiments.run_folder import RunFolder, read_json, write_json
from mada_optim.experiments.train import resolve, train
from mada_optim.tasks import InputError, require


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Args:
        optimizers: names, or names with options as :func:`optimizers.parse` takes them.
        lrs, seeds: each optimizer is trained at each of them.
        base: everything that the runs have in common; its optimizer and seed are replaced.
    """

    optimizers: Sequence[str]
    lrs: Sequence[float]
    seeds: Sequence[int]
    base: RunConfig

    def __post_init__(self) -> None:
        for name in ("optimizers", "lrs", "seeds"):
            values = getattr(self, name)
            require(
                bool(values) and len(set(values)) == len(values),
                name,
                list(values),
                "a list that is not empty and repeats nothing",
            )

    def runs(self, out: Path) -> dict[Path, RunConfig]:
        """Folder and configuration of each run. Seeds come last to change: early on there is one of everything."""
        return {
            out / "runs" / f"{label.replace(':', '+')}-lr{lr:g}-seed{seed}": self._run(label, lr, seed)
            for seed in self.seeds
            for label in self.optimizers
            for lr in self.lrs
        }

    def _run(self, label: str, lr: float, seed: int) -> RunConfig:
        given, common = parse(label), self.base.optimizer
        optimizer = dataclasses.replace(
            given, lr=lr, betas=given.betas or common.betas, weight_decay=common.weight_decay
        )
        return dataclasses.replace(self.base, optimizer=optimizer, seed=seed)


def compare(grid: Grid, out: Path, workers: int, on_run: Callable[[str, str, int, int], None]) -> bool:
    """Train what has not been trained yet.

    Args:
        grid: what is compared.
        out: folder of the comparison; one that has been started before goes on, and may get more optimizers, learning
            rates and seeds, but nothing else may change.
        workers: number of processes.
        on_run: called with (name, status, number of runs that are over, number of all) after each run.

    Returns:
        Whether all runs are over; False where Ctrl-C ended them.
    """
    require(workers >= 1, "workers", workers, "a positive integer")
    # Its optimizer stays as given: what is None in it means something else for each optimizer.
    base = dataclasses.replace(resolve(grid.base), optimizer=grid.base.optimizer)
    grid = dataclasses.replace(grid, base=base)
    runs = grid.runs(out)
    for config in runs.values():
        resolve(config)
    _check_folder(out, base)
    base.task.build()
    out.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "compare.json",
        {
            "optimizers": list(grid.optimizers),
            "lrs": list(grid.lrs),
            "seeds": list(grid.seeds),
            "base": to_dict(base),
        },
    )
    left = {folder: config for folder, config in runs.items() if not RunFolder(folder).result_file.exists()}
    done = len(runs) - len(left)
    # Spawned, not forked: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupt)
    waiting = iter(left.items())
    running: dict[Future[str], Path] = {}
    try:
        while True:
            # Not all at once: the pool takes some ahead of time, and these could not be called back at Ctrl-C.
            for folder, config in itertools.islice(waiting, workers - len(running)):
                running[pool.submit(_train, to_dict(config), folder)] = folder
            if not running:
                return True
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, status = running.pop(future).name, future.result()
                if status == "interrupted":
                    return False
                done += 1
                on_run(name, status, done, len(runs))
    except BrokenProcessPool:
        raise InputError("a worker process died; the same command goes on from the checkpoints") from None
    except KeyboardInterrupt:
        return False
    finally:
        pool.shutdown()


def _ignore_interrupt() -> None:
    """Between two runs a worker leaves Ctrl-C to its parent; in a run, train() handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _train(config: dict[str, Any], folder: Path) -> str:
    resume = RunFolder(folder).config_file.exists()
    return train(from_dict(config), folder, resume=resume, draw=False).status


def _check_folder(out: Path, base: RunConfig) -> None:
    stored = out / "compare.json"
    if not stored.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"out must be a new or empty folder or one of a comparison, got {str(out)!r}")
        return
    found = differences(_common(to_dict(base)), _common(read_json(stored)["base"]))
    if found:
        raise InputError(f"{out} is a comparison of another configuration ({'; '.join(found)}); choose a new folder")


def _common(base: dict[str, Any]) -> dict[str, Any]:
    """Without what each run replaces."""
    optimizer = {key: value for key, value in base["optimizer"].items() if key in ("betas", "weight_decay")}
    return {**base, "optimizer": optimizer, "seed": None}


def make_report(out: Path) -> tuple[list[report.Table], list[str]]:
    """Write table.md, results.json and the figure of what is stored; the tables and notes to them."""
    from mada_optim.experiments.figures import draw_comparison

    if not (out / "compare.json").exists():
        raise InputError(f"report must be the folder of a comparison, got {str(out)!r}, which has no compare.json")
    stored = read_json(out / "compare.json")
    base = from_dict(stored["base"])
    grid = Grid(stored["optimizers"], stored["lrs"], stored["seeds"], base)
    summaries, data = [], None
    for label in grid.optimizers:
        folders = [RunFolder(path) for path in dataclasses.replace(grid, optimizers=[label]).runs(out)]
        over = [run for folder in folders if (run := report.load_run(folder)) is not None]
        summaries.append(report.Summary(label, over))
        data = data or next((read_json(f.config_file)["data"] for f in folders if f.config_file.exists()), None)
    if not any(summary.runs for summary in summaries) or data is None:
        raise InputError(f"no run of {out} is over yet")
    entries = report.results(summaries)
    tables = [report.loss_table(entries), report.reference_table(entries), report.lr_table(entries)]
    notes = _notes(grid, data["source"], sum(len(summary.runs) for summary in summaries))
    settings = {key: value for key, value in to_dict(base).items() if key not in ("optimizer", "seed")}
    settings["task"] = {key: value for key, value in settings["task"].items() if key != "data"}
    write_json(
        out / "results.json",
        {"data": data, "settings": settings, "lrs": stored["lrs"], "seeds": stored["seeds"], "results": entries},
    )
    text = "\n".join([*map(report.markdown, tables), *(f"{note}\n" for note in notes)])
    (out / "table.md").write_text(text, "utf-8")
    draw_comparison(summaries, out / "curves", _caption(data["source"], grid))
    return tables, notes


def _caption(source: str, grid: Grid) -> str:
    return f"{source}, {grid.base.steps} steps; mean and range over {len(grid.seeds)} seeds"


def _notes(grid: Grid, source: str, over: int) -> list[str]:
    task = {name: value for name, value in dataclasses.asdict(grid.base.task).items() if name != "data"}
    total = len(grid.optimizers) * len(grid.lrs) * len(grid.seeds)
    notes = [
        f"{source}; {', '.join(f'{name} {value}' for name, value in task.items())}; "
        f"{grid.base.steps} steps, {len(grid.seeds)} seeds; losses in nats. ±: half width of the 95 % t interval "
        "over seeds; differences are paired by seed. Best lr: the lowest mean final validation loss. Last table: mean "
        "final validation loss."
    ]
    if over < total:
        notes.append(f"INCOMPLETE: {over} of {total} runs are over.")
    return notes
