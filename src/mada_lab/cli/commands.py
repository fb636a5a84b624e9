"""What each command of ``mada`` does with its arguments; ``cli.py`` describes them.

torch and the experiments' libraries are imported where they are used, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

Outcome = tuple[int, Any]
"""The exit code, and the results for ``--json``."""

if TYPE_CHECKING:
    from mada_lab.run.config import RunConfig
    from mada_lab.sweep.experiment import Experiment


def run_train(arguments: argparse.Namespace) -> Outcome:
    from rich.console import Console

    from mada_lab.display.progress import Display
    from mada_lab.errors import InputError
    from mada_lab.files import read_json
    from mada_lab.run.folder import RunFolder
    from mada_lab.run.train import train

    resume = arguments.resume is not None
    if resume:
        given = [name for name in vars(arguments) if name not in ("resume", "quiet")]
        if given:
            raise InputError(f"--resume takes everything from the run's config.json; leave out {_flags(given)}")
        folder = RunFolder(arguments.resume)
        config: RunConfig = folder.config()
    else:
        config = _config(arguments)
        default = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.optimizer.name}"
        folder = RunFolder(getattr(arguments, "out", default))
    # One of the processes that torchrun started is enough to say it.
    quiet = getattr(arguments, "quiet", False) or os.environ.get("RANK", "0") != "0"
    console = Console(quiet=quiet)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if resume and folder.result_file.exists():
        stored = read_json(folder.result_file)
        say(f"{folder.path} is {stored['status']}; nothing to do.")
        return 0, {"folder": folder.path, **stored}
    with Display(console, config.steps, quiet) as display:
        result = train(config, folder.path, resume=resume, on_begin=display.begin, on_step=display)
    results = {"folder": folder.path, **dataclasses.asdict(result)}
    if result.status == "interrupted":
        say(f"Interrupted after step {result.step}. Go on with: mada train --resume {folder.path}")
        return 130, results
    if result.status == "diverged":
        print(
            f"mada: the run diverged: no finite loss or gradient in the last steps up to step {result.step}. "
            f"Try a lower --lr than {folder.config().optimizer.lr:g}.",
            file=sys.stderr,
        )
        return 1, results
    say(
        f"Validation loss {result.val_loss:.4f} (best {result.best_val_loss:.4f}). Figure: {folder.path / 'figure.png'}"
    )
    return 0, results


def run_demo(arguments: argparse.Namespace) -> Outcome:
    from rich.console import Console
    from rich.table import Table

    from mada_lab.demo import experiment as demo

    out = Path(getattr(arguments, "out", None) or _new_folder("demo"))
    guess = vars(arguments).pop("lr", demo.GUESS)
    experiment = demo.demo(guess, _config(arguments))
    console = Console(highlight=False, soft_wrap=True)
    console.print(demo.introduction(experiment), markup=False, soft_wrap=False)
    console.print(f"Folder: {out}. After an interruption, the same command with --out {out} goes on.\n", markup=False)
    ending = demo.train_side_by_side(experiment, out, console)
    for name, why in ending.failed.items():
        print(f"mada: {name} {why}", file=sys.stderr)
    if ending.interrupted:
        console.print(f"Interrupted. The same command with --out {out} goes on.", markup=False)
        return 130, {"folder": out}
    if ending.failed:
        return 1, {"folder": out}
    runs = demo.stored_runs(experiment, out)
    header, *rows = demo.table(experiment, runs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index > 1 else "left")
    for row in rows:
        table.add_row(*row)
    console.print("", table, "", sep="\n")
    sentence = demo.verdict(experiment, runs)
    console.print(sentence, markup=False, soft_wrap=False)
    demo.draw(experiment, runs, out)
    console.print("\nIn your code: from mada_optim import OMADA; optimizer = OMADA(model)", markup=False)
    console.print(f"Figure: {out / 'demo.png'}. All of it: mada report {out}", markup=False)
    return 0, {"folder": out, "table": [header, *rows], "summary": sentence}


def run_compare(arguments: argparse.Namespace) -> Outcome:
    from mada_lab.report.stage_report import check_reference
    from mada_lab.sweep.comparison import comparison
    from mada_lab.sweep.stage_folder import TUNE

    out = Path(getattr(arguments, "report", None) or getattr(arguments, "out", None) or _new_folder("compare"))
    reference = getattr(arguments, "reference", None)
    code = 0
    if not hasattr(arguments, "report"):
        if reference is not None:
            check_reference(reference, arguments.optimizers)
        experiment = comparison(arguments.optimizers, arguments.lrs, arguments.seeds, _config(arguments))
        _name_those_without_betas(experiment)
        code = _run_stages(experiment, {TUNE: out}, out, arguments)
    return code, {"folder": out, **(_print_report(out, reference) if code != 130 else {})}


def _name_those_without_betas(experiment: Experiment) -> None:
    common = experiment.base.optimizer.betas
    without = [label for label in experiment.contenders if experiment.config(label).optimizer.betas is None]
    if common is not None and without:
        example = f"{experiment.contenders[without[0]].name}:beta1=NUMBER:beta2=NUMBER"
        print(
            f"mada: --betas do not reach {', '.join(without)}, for which they mean something else; give {example}",
            file=sys.stderr,
        )


def run_sweep(arguments: argparse.Namespace) -> Outcome:
    from mada_lab.sweep.experiment_file import load
    from mada_lab.sweep.stage_folder import CONFIRM, TUNE

    experiment = load(arguments.file, arguments.data_root)
    out = Path(getattr(arguments, "out", None) or _new_folder(Path(arguments.file).stem))
    folders = {stage: out / stage for stage in (TUNE, CONFIRM)}
    chosen = {
        "only": experiment.labels(arguments.only),
        "stages": [arguments.stage] if arguments.stage else list(folders),
    }
    code = _run_stages(experiment, folders, out, arguments, **chosen)
    results: dict[str, Any] = {"folder": out}
    if code != 130:
        for stage, folder in folders.items():
            if any(folder.glob("runs/*/result.json")):
                print(f"\n{experiment.title}: {stage}\n")
                results[stage] = _print_report(folder, option="to lr in its file")
    return code, results


def _run_stages(
    experiment: Experiment, folders: Mapping[str, Path], out: Path, arguments: argparse.Namespace, **chosen: Any
) -> int:
    """The exit code: 0, 1 where something could not be trained, 130 after Ctrl-C."""
    from rich.console import Console

    from mada_lab.display.progress import SweepDisplay
    from mada_lab.sweep.run_stages import run_stages

    console = Console(soft_wrap=True, highlight=False, markup=False)
    with SweepDisplay(console) as display:
        chosen |= {"address": arguments.address, "on_kept": display.kept, "on_progress": display.progress}
        ending = run_stages(experiment, folders, arguments.workers, display, **chosen)
    for name, why in ending.failed.items():
        print(f"mada: {name} {why}", file=sys.stderr)
    for reason in ending.left_out:
        print(f"mada: left out: {reason}", file=sys.stderr)
    if ending.interrupted:
        console.print(f"Interrupted. The same command with --out {out} goes on.")
        return 130
    return 1 if ending.failed or ending.left_out else 0


def _print_report(out: Path, reference: str | None = None, option: str = "--lrs") -> dict[str, Any]:
    """Print what is stored of a stage. Return the content of its results.json."""
    from rich.console import Console
    from rich.table import Table

    from mada_lab.files import read_json
    from mada_lab.report.sparklines import curves_table
    from mada_lab.report.stage_files import write_stage_files
    from mada_lab.report.verdict import edge_warnings, verdict

    report = write_stage_files(out, reference)
    tables = list(report.tables().values())
    if len(report.stage.runs) > 1:
        tables.append(curves_table(report.stage.summaries))
    console = Console()
    for header, *rows in tables:
        table = Table(box=None, header_style="bold", pad_edge=False)
        # Headers are broken between words, numbers are not.
        cells = [(*name.split(), *column) for name, *column in zip(header, *rows, strict=True)]
        widths = [max(map(len, texts)) for texts in cells]
        for index, (name, width) in enumerate(zip(header, widths, strict=True)):
            table.add_column(name, justify="right" if index else "left", width=width)
        for row in rows:
            table.add_row(*row)
        # In a narrow terminal rich would leave out what has no room.
        console.width = max(console.width, sum(widths) + 2 * len(widths))
        console.print(table)
        console.print()
    console = Console()
    for note in report.notes():
        console.print(note, highlight=False, markup=False)
    console.print(f"Written: {out}/table.md, results.json, curves.png", highlight=False, markup=False, soft_wrap=True)
    sentence = verdict(report.entries, report.reference)
    console.print(f"\n{sentence}", highlight=False, markup=False)
    for warning in edge_warnings(report.entries, option):
        print(f"mada: {warning}", file=sys.stderr)
    results: dict[str, Any] = {**read_json(out / "results.json"), "summary": sentence}
    return results


def run_report(arguments: argparse.Namespace) -> Outcome:
    from mada_lab.errors import InputError, require
    from mada_lab.report.rates_figure import write_rates

    try:
        from mada_lab.report.report_file import write_report
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing: pip install 'mada-optim[experiments]'") from None

    folders = [Path(folder) for folder in arguments.folders]
    default = (folders[0] if os.access(folders[0], os.W_OK) else Path()) / "report.html"
    out = Path(getattr(arguments, "out", default))
    only = getattr(arguments, "only", None)
    if out.suffix == ".png":
        written = write_rates(folders, out, only)
        print(f"Written: {', '.join(map(str, written))}")
        return 0, {"files": written}
    require(only is None, "only", only, "left out: it is for a figure, --out NAME.png")
    summary = write_report(folders, out, getattr(arguments, "reference", None))
    print(f"Written: {out}")
    return 0, {"file": out, "summary": summary}


def run_pack(arguments: argparse.Namespace) -> Outcome:
    from mada_lab.sweep.archive import pack

    folder = Path(arguments.folder)
    out = Path(getattr(arguments, "out", f"{folder.resolve().name}.tar.gz"))
    runs = pack(folder, out)
    print(f"Written: {out}, {runs} runs, {out.stat().st_size / 1024:.0f} KiB")
    return 0, {"file": out, "runs": runs}


def run_tokens(arguments: argparse.Namespace) -> Outcome:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from mada_lab.tasks.corpus import Corpus
    from mada_lab.tasks.packing import Part, pack

    given = vars(arguments)
    join = given.get("join", False)
    val = Corpus(tuple(given["val_data"]), join) if "val_data" in given else None
    options = {name: given[name] for name in ("tokenizer", "val_share") if name in given}
    console = Console(soft_wrap=True, highlight=False, markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        shown = progress.add_task("")

        def on_batch(*parts: Part) -> None:
            tokens, seconds = sum(part.tokens for part in parts), progress.tasks[0].elapsed
            speed = tokens / seconds if seconds else 0.0
            progress.update(shown, description=f"{tokens:,} tokens, {speed:,.0f} a second")

        meta = pack(Corpus(tuple(given["data"]), join), given["out"], val=val, on_batch=on_batch, **options)
    train, validation = (meta[part]["tokens"] for part in ("train", "val"))
    console.print(f"Written: {given['out']}, {train:,} tokens to train on, {validation:,} to validate on.")
    return 0, {"folder": given["out"], **meta}


def run_bench(arguments: argparse.Namespace) -> Outcome:
    import torch
    from rich.console import Console

    from mada_lab.bench import measure, report
    from mada_lab.errors import require
    from mada_lab.files import read_json

    chosen, missing = measure.choose(arguments.workloads, arguments.device, arguments.only)
    if arguments.threads is not None:
        require(arguments.threads >= 1, "threads", arguments.threads, "a positive integer")
        torch.set_num_threads(arguments.threads)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for contender in missing:
        console.print(f"Left out: {contender.name}. {contender.package} is missing: pip install 'mada-optim[bench]'")
    out = Path(getattr(arguments, "out", None) or _new_folder("bench"))
    out.mkdir(parents=True, exist_ok=True)
    described = measure.machine(arguments.device)
    results: list[measure.Result] = []
    first: measure.Result | None = None
    for result in measure.run(arguments.workloads, arguments.device, arguments.seconds, chosen):
        if first is None or first.workload != result.workload:
            first = result
            console.print(f"\n({result.workload}) {result.title}")
            console.print("".join(f"{title:<36}" if not i else f" {title:>9}" for i, title in enumerate(report.HEADER)))
        cells = report.row(result, described, first)
        console.print("".join(f"{cell:<36}" if not i else f" {cell:>9}" for i, cell in enumerate(cells)))
        results.append(result)
        # After each, so that nothing is lost.
        measure.save(out / "results.json", described, results)
        (out / "table.md").write_text(report.markdown(described, results), encoding="utf-8")
    report.draw(results, out / "figure")
    console.print(f"\nWritten: {out}/results.json, table.md, figure.png")
    return 0, {"folder": out, **read_json(out / "results.json")}


def run_optimizers(_: argparse.Namespace) -> Outcome:
    from mada_lab.optimizers.registry import ENTRIES

    rows = [("name", "lr", "")] + [(name, f"{entry.lr:g}", entry.description) for name, entry in ENTRIES.items()]
    names, lrs, _descriptions = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, lr, description in rows:
        print(f"{name:<{names}}  {lr:<{lrs}}  {description}".rstrip())
    return 0, [{"name": name, "lr": entry.lr, "description": entry.description} for name, entry in ENTRIES.items()]


def run_bounds(arguments: argparse.Namespace) -> Outcome:
    from rich.console import Console

    from mada_lab.errors import InputError
    from mada_lab.files import prepare_file
    from mada_lab.theory.figures import Setting, bounds, draw_bounds, summarize

    options = {name: value for name, value in vars(arguments).items() if name != "out"}
    out = Path(getattr(arguments, "out", "bounds"))
    written = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    try:
        setting = Setting(**options)
        summary = summarize(setting)
        for path in written:
            prepare_file(path)
        print(summary)
        with Console(stderr=True).status("Measuring for the figure."):
            draw_bounds(setting, out)
    except ValueError as error:
        raise InputError(str(error)) from None
    print(f"Written: {', '.join(map(str, written))}")
    rows = [{"name": name, "rho": rho, "bound": bound} for name, rho, bound in bounds(setting)]
    return 0, {"figures": written, "bounds": rows}


def run_scale(arguments: argparse.Namespace) -> Outcome:
    from mada_lab.errors import InputError
    from mada_lab.files import prepare_file
    from mada_lab.theory.scale_figure import Setting, draw_scale, rates_and_losses, summarize

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "command", "out")}
    out = Path(getattr(arguments, "out", "scale"))
    try:
        setting = Setting(**options)
    except ValueError as error:
        raise InputError(str(error)) from None
    written = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in written:
        prepare_file(path)
    print(summarize(setting))
    draw_scale(setting, out)
    print(f"Written: {', '.join(map(str, written))}")
    rows = [{"name": name, "rate": rate, "loss": loss} for name, rate, loss in rates_and_losses(setting)]
    return 0, {"figures": written, "rules": rows}


def run_online(arguments: argparse.Namespace) -> Outcome:
    from rich.console import Console

    from mada_lab.display.progress import StepsDisplay
    from mada_lab.errors import InputError
    from mada_lab.files import prepare_file
    from mada_lab.theory.online import Setting, draw_online, finals, scan, steps_of, summarize

    options = {name: value for name, value in vars(arguments).items() if name not in ("out", "scan")}
    out = Path(getattr(arguments, "out", "online"))
    written = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    scanned = hasattr(arguments, "scan")
    try:
        setting = Setting(**options)
        for path in written if not scanned else []:
            prepare_file(path)
        with StepsDisplay(Console(stderr=True), steps_of(setting, scanned)) as on_step:
            if scanned:
                lines = []
                for line in scan(setting, on_step):
                    print(line, flush=True)
                    lines.append(line)
                return 0, {"markdown": lines}
            played = {}
            for name, line, traces in summarize(setting, on_step):
                print(line, flush=True)
                played[name] = traces
    except ValueError as error:
        raise InputError(str(error)) from None
    draw_online(setting, {name: traces for name, traces in played.items() if name}, out)
    print(f"Written: {', '.join(map(str, written))}")
    return 0, {"figures": written, "optimizers": {name: finals(traces) for name, traces in played.items() if name}}


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the options describe; what was not given keeps the default of the dataclasses."""
    from mada_lab.optimizers.config import OptimizerConfig
    from mada_lab.run.config import RunConfig
    from mada_lab.tasks.registry import make_task

    given = vars(arguments)

    def pick(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    data = pick("data", "characters_of", "wikitext", "lambada")
    model = pick("init", "layers", "heads", "width", "context", "dropout", "autocast", "size", "model", "augment")
    task = make_task(pick("kind", "batch", "val_windows") | data | model)
    options = pick("beta3", "rho", "c", "gamma")
    if "hyper_lr" in given:
        options["hyper_lr"] = _hyper_lr(given["hyper_lr"])
    names = {"name": given["optimizer"]} if "optimizer" in given else {}
    optimizer = OptimizerConfig(**names, **pick("lr", "betas", "weight_decay"), options=options)
    run = pick(
        "steps", "warmup", "clip", "accumulate", "seed", "eval_every", "checkpoint_every", "threads", "device", "dtype"
    )
    return RunConfig(task, optimizer, **run)


def _hyper_lr(values: Sequence[str]) -> float | dict[str, float]:
    from mada_lab.errors import InputError

    try:
        if len(values) == 1 and "=" not in values[0]:
            return float(values[0])
        pairs = [item.split("=") for item in values]
        step_sizes = {name: float(value) for name, value in pairs}
    except ValueError:
        raise InputError(f"hyper_lr must be a number or name=number pairs, got {' '.join(values)!r}") from None
    if len(step_sizes) < len(pairs):
        raise InputError(f"hyper_lr must name each coefficient once, got {' '.join(values)!r}")
    return step_sizes


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _new_folder(kind: str) -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{kind}"
