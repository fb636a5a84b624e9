"""The command ``mada``: train, compare, bench, optimizers.

torch and the experiments' libraries are imported where they are used, so that ``--help`` does not wait for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mada_optim.experiments.config import RunConfig

_DESCRIPTION = "Train with an optimizer that tunes itself, and compare it with others on equal terms."
_EPILOG = """\
examples:
  mada train                                      a small GPT on Python's own documentation, with MADA
  mada train --data FILE --optimizer adamw        another text, another optimizer
  mada train --resume runs/NAME                   go on after an interruption
  mada compare --optimizers adamw,mada --seeds 3  side by side, over a grid of learning rates
"""
_TRAIN_EPILOG = """\
examples:
  mada train --lr 1e-2 --steps 600
  mada train --rho 0 --hyper-lr rho=0.1 c=0.1     start at AVGrad, learn only rho and c
  mada train --optimizer hyperadam --betas 0.3 0.6
  torchrun --nproc-per-node 2 -m mada_optim.cli train    several processes share each batch
"""
_COMPARE_EPILOG = """\
examples:
  mada compare --optimizers adamw,avgrad,hyperadam,mada --lrs 3e-4,1e-3,3e-3,1e-2 --seeds 3 --out runs/grid
  mada compare --optimizers adamw,mada,mada:rho=0 an optimizer with options: name:option=value:...
  mada compare --report runs/grid                 tables and figure again, from stored metrics

A comparison that was interrupted goes on with the same command. More optimizers, learning rates and seeds may be
added to the same folder; finished runs are kept.
"""


_BENCH_EPILOG = """\
workloads:
  a  one tensor of 20 M        b  the 148 tensors of GPT-2 124M        c  training steps of a GPT of 10.7 M

Written: results.json, table.md and figure.png. Let nothing else run meanwhile.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 (diverged), 2 (wrong input) or 130 (interrupted)."""
    arguments = _parser().parse_args(argv)
    try:
        from mada_optim.experiments import figures, train  # noqa: F401
        from mada_optim.tasks import InputError
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mada_optim"):
            raise
        print(f"mada: {error.name} is missing: pip install 'mada-optim[experiments]'", file=sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except InputError as error:
        print(f"mada: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from mada_optim.experiments.display import Display
    from mada_optim.experiments.run_folder import RunFolder, read_json
    from mada_optim.experiments.train import train
    from mada_optim.tasks import InputError

    resume = arguments.resume is not None
    if resume:
        given = [name for name in vars(arguments) if name not in ("run", "command", "resume", "quiet")]
        if given:
            raise InputError(f"--resume takes everything from the run's config.json; leave out {_flags(given)}")
        folder = RunFolder(arguments.resume)
        config = folder.config()
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
        say(f"{folder.path} is {read_json(folder.result_file)['status']}; nothing to do.")
        return 0
    start = 0
    if resume and (state := folder.load_checkpoint()) is not None:
        start = int(state["step"])
        say(f"Going on from step {start}.")
    with Display(console, config.steps, start, quiet) as display:
        result = train(config, folder.path, resume=resume, on_step=display)
    if result.status == "interrupted":
        say(f"Interrupted after step {result.step}. Go on with: mada train --resume {folder.path}")
        return 130
    if result.status == "diverged":
        print(
            f"mada: the run diverged: no finite loss or gradient in the last steps up to step {result.step}. "
            f"Try a lower --lr than {config.optimizer.lr:g}.",
            file=sys.stderr,
        )
        return 1
    say(
        f"Validation loss {result.val_loss:.4f} (best {result.best_val_loss:.4f}). Figure: {folder.path / 'figure.png'}"
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from mada_optim.experiments.compare import Grid, compare

    console = Console()
    out = Path(getattr(arguments, "report", None) or getattr(arguments, "out", None) or _new_folder("compare"))
    if not hasattr(arguments, "report"):
        grid = Grid(arguments.optimizers, arguments.lrs, arguments.seeds, _config(arguments))

        def on_run(name: str, status: str, done: int, total: int) -> None:
            console.print(f"{done:>{len(str(total))}}/{total}  {name}  {status}", highlight=False, markup=False)

        if not compare(grid, out, arguments.workers, on_run):
            console.print(f"Interrupted. The same command with --out {out} goes on.", highlight=False, markup=False)
            return 130
    _print_report(console, out)
    return 0


def _print_report(console: Any, out: Path) -> None:
    from rich.table import Table

    from mada_optim.experiments.compare import make_report

    tables, notes = make_report(out)
    for header, *rows in tables:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for note in notes:
        console.print(note, highlight=False, markup=False)
    console.print(f"Written: {out}/table.md, results.json, curves.png", highlight=False, markup=False, soft_wrap=True)


def _bench(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from mada_optim.bench import measure, report

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    out = Path(getattr(arguments, "out", None) or _new_folder("bench"))
    out.mkdir(parents=True, exist_ok=True)
    described = measure.machine(arguments.device)
    results: list[measure.Result] = []
    first: measure.Result | None = None
    for result in measure.run(arguments.workloads, arguments.device, arguments.seconds, arguments.only):
        if first is None or first.workload != result.workload:
            first = result
            console.print(f"\n({result.workload}) {result.title}")
            console.print("".join(f"{title:<36}" if not i else f"{title:>10}" for i, title in enumerate(report.HEADER)))
        cells = report.row(result, described, first)
        console.print("".join(f"{cell:<36}" if not i else f"{cell:>10}" for i, cell in enumerate(cells)))
        results.append(result)
        # After each, so that nothing is lost.
        measure.save(out / "results.json", described, results)
        (out / "table.md").write_text(report.markdown(described, results), encoding="utf-8")
    report.draw(results, out / "figure")
    console.print(f"\nWritten: {out}/results.json, table.md, figure.png")
    return 0


def _optimizers(_: argparse.Namespace) -> int:
    from mada_optim.experiments.optimizers import available

    for name, description in available().items():
        print(f"{name:<12}{description}")
    return 0


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the options describe; what was not given keeps the default of the dataclasses."""
    from mada_optim.experiments.config import OptimizerConfig, RunConfig
    from mada_optim.tasks.language import LanguageConfig

    given = vars(arguments)

    def pick(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    task = LanguageConfig(**pick("data", "layers", "heads", "width", "context", "batch"))
    options = pick("beta3", "rho", "c", "gamma")
    if "hyper_lr" in given:
        options["hyper_lr"] = _hyper_lr(given["hyper_lr"])
    names = {"name": given["optimizer"]} if "optimizer" in given else {}
    optimizer = OptimizerConfig(**names, **pick("lr", "betas", "weight_decay"), options=options)
    run = pick("steps", "warmup", "clip", "seed", "eval_every", "checkpoint_every", "threads", "device", "dtype")
    return RunConfig(task, optimizer, **run)


def _hyper_lr(values: Sequence[str]) -> float | dict[str, float]:
    from mada_optim.tasks import InputError

    try:
        if len(values) == 1 and "=" not in values[0]:
            return float(values[0])
        return {name: float(value) for name, value in (item.split("=") for item in values)}
    except ValueError:
        raise InputError(f"hyper_lr must be a number or name=number pairs, got {' '.join(values)!r}") from None


def _flags(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _new_folder(kind: str) -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{kind}"


# The parser. Options that are not given leave no attribute: the defaults have one home, the dataclasses.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mada", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, default=argparse.SUPPRESS, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, epilog: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        sub.set_defaults(run=run)
        return sub

    _add_train(command("train", "train a character-level GPT on a text", _TRAIN_EPILOG, _train))
    _add_compare(command("compare", "train several optimizers on equal terms", _COMPARE_EPILOG, _compare))
    _add_bench(command("bench", "time optimizer steps against torch's fused AdamW", _BENCH_EPILOG, _bench))
    command("optimizers", "list the optimizers", "", _optimizers)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data_and_model(parser)
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer", metavar="NAME", help="see 'mada optimizers' (default: mada)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 3e-3)")
    _add_common_optimizer(group)
    for name, point in (("beta3", "0"), ("rho", "1"), ("c", "1"), ("gamma", "1")):
        group.add_argument(f"--{name}", type=float, help=f"where {name} starts (default: {point})")
    group.add_argument(
        "--hyper-lr",
        nargs="+",
        metavar="X",
        help="step size of the coefficients: a number, or NAME=NUMBER pairs, what is not named being frozen "
        "(default: 5e-4 for beta1 and beta2, 0.1 for the others)",
    )
    group = _add_training(parser, steps=1000, eval_every="100")
    group.add_argument("--seed", type=int, help="of the initial weights and the data order (default: 0)")
    group.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's choice)")
    group = parser.add_argument_group("run folder")
    group.add_argument("--out", metavar="DIR", help="a new folder (default: runs/TIME-OPTIMIZER)")
    group.add_argument(
        "--resume", metavar="RUN", default=None, help="go on from the checkpoint in this folder; no other options"
    )
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--optimizers",
        type=_list_of(str),
        metavar="A,B,...",
        default=["adamw", "avgrad", "hyperadam", "mada"],
        help="(default: adamw,avgrad,hyperadam,mada)",
    )
    group.add_argument(
        "--lrs",
        type=_list_of(float),
        metavar="X,Y,...",
        default=[3e-4, 1e-3, 3e-3, 1e-2],
        help="(default: 3e-4,1e-3,3e-3,1e-2)",
    )
    group.add_argument(
        "--seeds", type=_seeds, metavar="N", default=[0, 1, 2], help="how many, or a list: 0,1,5 (default: 3)"
    )
    _add_data_and_model(parser)
    group = parser.add_argument_group("optimizers")
    _add_common_optimizer(group)
    group = _add_training(parser, steps=600, eval_every="30")
    parser.set_defaults(steps=600, eval_every=30, threads=1)
    group.add_argument(
        "--threads", type=int, metavar="N", help="of torch in each worker; times are most honest with 1 (default: 1)"
    )
    group.add_argument("--workers", type=int, metavar="N", default=1, help="runs at the same time (default: 1)")
    group = parser.add_argument_group("folder")
    group.add_argument("--out", metavar="DIR", help="new, or of this comparison (default: runs/TIME-compare)")
    group.add_argument("--report", metavar="DIR", help="train nothing; tables and figure from what is stored in DIR")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", metavar="ABC", default="abc", help="which of a, b, c (default: abc)")
    parser.add_argument("--only", metavar="NAME", default=None, help="contenders with this in their name")
    parser.add_argument(
        "--seconds", type=float, metavar="X", default=10.0, help="to time each against the baseline (default: 10)"
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", default=None, help="of torch (default: torch's choice)")
    parser.add_argument("--out", metavar="DIR", help="(default: runs/TIME-bench)")


def _add_data_and_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    group.add_argument("--data", metavar="FILE", help="any UTF-8 text (default: Python's language reference)")
    for name, meaning, default in (
        ("layers", "layers", 4),
        ("heads", "attention heads", 4),
        ("width", "width, a multiple of heads", 128),
        ("context", "characters that the model sees", 64),
        ("batch", "windows in a batch", 12),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: {default})")


def _add_common_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--betas", type=float, nargs=2, action=_Pair, metavar=("B1", "B2"), help="(start of) betas (default: 0.9 0.99)"
    )
    group.add_argument(
        "--weight-decay", type=float, metavar="X", help="decoupled, on tensors of 2 and more dimensions (default: 0.1)"
    )


def _add_training(parser: argparse.ArgumentParser, steps: int, eval_every: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, metavar="N", help=f"(default: {steps})")
    group.add_argument(
        "--warmup", type=float, metavar="X", help="share of the steps in which lr rises; cosine follows (default: 0.05)"
    )
    group.add_argument("--clip", type=float, metavar="X", help="maximal gradient norm, 0: none (default: 1)")
    group.add_argument("--eval-every", type=int, metavar="N", help=f"steps between validations (default: {eval_every})")
    group.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (default: 200)")
    group.add_argument("--device", metavar="NAME", help="(default: cuda where there is one, else cpu)")
    group.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float64 (default: float32)")
    return group


def _list_of(kind: Any) -> Any:
    def convert(text: str) -> list[Any]:
        return [kind(item) for item in text.split(",") if item]

    convert.__name__ = f"comma-separated {kind.__name__}"
    return convert


def _seeds(text: str) -> list[int]:
    values: list[int] = _list_of(int)(text)
    return list(range(values[0])) if len(values) == 1 and "," not in text else values


class _Pair(argparse.Action):
    """Two values as a tuple."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:  # noqa: ARG002
        setattr(namespace, self.dest, tuple(values))


class _Version(argparse.Action):
    """argparse's own needs the version, and with it torch, before anyone asks for it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import mada_optim

        print(f"mada {mada_optim.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
