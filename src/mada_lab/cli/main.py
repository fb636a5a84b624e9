# PYTHON_ARGCOMPLETE_OK
"""The command ``mada`` and its options. What each subcommand does is in ``commands.py``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from mada_lab.cli import commands
from mada_lab.cli.commands import Outcome
from mada_lab.cli.options import CommandParser, Pair, Version, list_of, seeds, to_json

_DESCRIPTION = "Train with an optimizer that tunes itself, and compare it with others on equal terms."
_FIRST_STEPS = """\
mada trains with an optimizer that tunes itself. Where to start:
  mada demo              AdamW and OMADA from the same bad guess
  mada train             train a small GPT and watch the coefficients move
  mada compare           compare optimizers over learning rates and seeds
  mada COMMAND --help    options and an example of a command; mada --help lists all commands"""
_EPILOG = """\
examples:
  mada demo                                       AdamW and OMADA side by side, from a badly guessed learning rate
  mada train                                      a small GPT on Python's own documentation, with MADA
  mada train --data FILE --optimizer adamw        another text, another optimizer
  mada train --resume runs/NAME                   go on after an interruption
  mada compare --optimizers adamw,mada --seeds 3  side by side, over a grid of learning rates
  mada tokens --data FILE --out FOLDER            a text in GPT-2's tokens, for mada train --task tokens
  mada sweep experiments/shakespeare.toml --data-root DIR   an experiment, with its grid, from a file
  mada report runs/NAME                           tables and interactive figures of what is stored, as an HTML file
  mada bounds --beta2 0.99 --steps 100000         what theory says of Adam, AVGrad and what lies between
  mada scale                                      what a learned scale finds on a noisy quadratic
  mada online --betas 0.95 0.99                   the online problem on which Adam goes wrong
"""
_TRAIN_EPILOG = """\
examples:
  mada train --lr 1e-2 --steps 600
  mada train --rho 0 --hyper-lr rho=0.1 c=0.1     start at AVGrad, learn only rho and c
  mada train --optimizer hyperadam --betas 0.3 0.6
  mada train --data FILE --init runs/NAME         fine-tuning: begin with the weights of an earlier run
  torchrun --nproc-per-node 2 -m mada_lab train    several processes share each batch
"""
_DEMO_EPILOG = """\
examples:
  mada demo                                       a small GPT on Python's own documentation; two minutes
  mada demo --lr 0.1                              a guess that is too high
  mada demo --data FILE --steps 1000              another text, longer
  mada demo --out runs/NAME                       with the folder of a demo that was interrupted: go on

Both trainings run at the same time, on one core each. Their run folders are under runs/ in the folder of the demo.
"""
_COMPARE_EPILOG = """\
examples:
  mada compare --optimizers adamw,avgrad,hyperadam,mada --lrs 3e-4,1e-3,3e-3,1e-2 --seeds 3 --out runs/grid
  mada compare --optimizers adamw,mada,mada:rho=0  an optimizer with options: name:option=value:...
  mada compare --report runs/grid                 tables and figure again, from stored metrics

A comparison that was interrupted goes on with the same command. More optimizers, learning rates and seeds may be
added to the same folder; finished runs are kept.
"""
_TOKENS_EPILOG = """\
examples:
  mada tokens --data novels.txt.gz --val-data held_out.txt.gz --tokenizer gpt2 --out data/novels
  mada tokens --data Skylion007/openwebtext --val-share 0.0005 --out data/openwebtext
  mada tokens --data Salesforce/wikitext:wikitext-103-raw-v1:test --join --val-share 1 --out data/wikitext

The folder appears when it is whole. After an interruption, begin again with the same command.
"""
_SWEEP_EPILOG = """\
examples:
  mada sweep experiments/shakespeare.toml --data-root data --out runs/shakespeare --workers 2
  mada sweep experiments/shakespeare.toml --data-root data --out runs/shakespeare --only adamw,mada --stage tune

A sweep that was interrupted goes on with the same command, and more contenders and values may be added to its file.
docs/experiments.md says what may stand in one.
"""
_REPORT_EPILOG = """\
examples:
  mada report runs/shakespeare                    both stages of a sweep
  mada report runs/grid runs/digits/confirm runs/one --out all.html
  mada report runs/shakespeare runs/cifar --out all.md
  mada report runs/shakespeare/tune runs/cifar/tune --only adamw,muon --out rates.png

Several experiments are compared in one table, too. The file needs no network. Figures for papers are beside the tables
of each stage: mada compare --report FOLDER.
"""
_PACK_EPILOG = """\
examples:
  mada pack runs/shakespeare --out shakespeare.tar.gz
  mkdir again && tar -xzf shakespeare.tar.gz -C again && mada report again

Configurations, results and curves of the runs that are over; no weights. mada sweep --out again goes on from there.
"""
_ONLINE_EPILOG = """\
examples:
  mada online
  mada online --problem stochastic --seeds 8 --out stochastic

problems:
  theorem      3 x at each third step, -x at the others (Theorem 1 of Reddi et al.)
  periodic     1010 x at each 101st step, -10 x at the others (their experiments)
  stochastic   1010 x with probability 0.01, else -10 x
each on [-1, 1], with the best point at -1. docs/online.md says what is seen.
"""
_OPTIMIZERS_EPILOG = """\
examples:
  mada optimizers
  mada optimizers --json
"""
_BOUNDS_EPILOG = """\
examples:
  mada bounds --beta2 0.99 --steps 100000
  mada bounds --dimension 100 --out bounds-100
"""
_SCALE_EPILOG = """\
examples:
  mada scale
  mada scale --noise 0.1 --steps 5000 --out scale-5000
"""
_BENCH_EPILOG = """\
examples:
  mada bench
  mada bench --workloads ab --only MADA --seconds 5

workloads:
  a  one tensor of 20 M        b  the 148 tensors of GPT-2 124M        c  training steps of a GPT of 10.8 M
  d  240 tensors of 64 x 64    e  10,000 tensors of 8                  f  300 tensors in 60 parameter groups
  orthogonalization alone: g  GPT-2's matrices, width 256    h  width 768    i  experts
  j  training steps of the default GPT of 'mada train', 0.8 M

Written: results.json, table.md and figure.png. Let nothing else run meanwhile.
"""
# What a command needs beside torch: it must not fail for the want of it after it has computed.
_DRAWING = ("matplotlib", "numpy", "rich")
_TRAINING = (*_DRAWING, "filelock", "tensorboard", "transformers")
_TOKENS = ("filelock", "numpy", "rich", "tokenizers")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 (diverged), 2 (wrong input) or 130 (interrupted)."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ and find_spec("argcomplete") is not None:
        import argcomplete

        argcomplete.autocomplete(parser)
    if not (sys.argv[1:] if argv is None else argv):
        print(_FIRST_STEPS)
        return 0
    arguments = parser.parse_args(argv)
    run, needs = (vars(arguments).pop(name) for name in ("run", "needs"))
    as_json = vars(arguments).pop("json", False)
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        print(f"mada: {missing[0]} is missing: pip install 'mada-optim[experiments]'", file=sys.stderr)
        return 2
    from mada_lab.errors import InputError

    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            code, results = run(arguments)
        if as_json:
            print(to_json(results))
        return int(code)
    except (InputError, OSError) as error:
        print(f"mada: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


# The parser. Options that are not given leave no attribute: the defaults have one home, the dataclasses.


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "mada", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=Version, default=argparse.SUPPRESS, help="print the version and exit")
    choices = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, summary: str, epilog: str, run: Callable[[argparse.Namespace], Outcome], needs: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = choices.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        sub.add_argument("--json", action="store_true", help="print results as one JSON document, the rest to stderr")
        sub.set_defaults(run=run, needs=needs)
        return sub

    summary = "train with AdamW and with OMADA side by side, from a badly guessed learning rate"
    _add_demo(command("demo", summary, _DEMO_EPILOG, commands.run_demo, _TRAINING))
    _add_train(command("train", "train a GPT on a text", _TRAIN_EPILOG, commands.run_train, _TRAINING))
    _add_compare(
        command("compare", "train several optimizers on equal terms", _COMPARE_EPILOG, commands.run_compare, _TRAINING)
    )
    _add_tokens(command("tokens", "pack texts as GPT-2's tokens", _TOKENS_EPILOG, commands.run_tokens, _TOKENS))
    _add_sweep(
        command("sweep", "run the experiment that a file describes", _SWEEP_EPILOG, commands.run_sweep, _TRAINING)
    )
    summary = "show what is stored as one file, with tables and interactive figures"
    _add_report(command("report", summary, _REPORT_EPILOG, commands.run_report, (*_DRAWING, "plotly")))
    _add_pack(
        command("pack", "put what a sweep found into one small file", _PACK_EPILOG, commands.run_pack, ("numpy",))
    )
    summary = "time optimizer steps against torch's fused AdamW"
    _add_bench(command("bench", summary, _BENCH_EPILOG, commands.run_bench, _DRAWING))
    command("optimizers", "list the optimizers", _OPTIMIZERS_EPILOG, commands.run_optimizers)
    summary = "draw the convergence bound over rho, beside what is measured"
    _add_bounds(command("bounds", summary, _BOUNDS_EPILOG, commands.run_bounds, _DRAWING))
    summary = "play the online problem on which Adam goes wrong"
    _add_online(command("online", summary, _ONLINE_EPILOG, commands.run_online, _DRAWING))
    summary = "draw the learning rate that a search comes to, beside the best"
    _add_scale(command("scale", summary, _SCALE_EPILOG, commands.run_scale, _DRAWING))
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_data_and_model(parser)
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer", metavar="NAME", help="see 'mada optimizers' (default: mada)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 3e-3; lion: 1e-3, prodigy: 1)")
    _add_common_optimizer(group)
    for name, point in (("beta3", "0"), ("rho", "1"), ("c", "1"), ("gamma", "1")):
        group.add_argument(f"--{name}", type=float, help=f"where {name} starts (default: {point})")
    group.add_argument(
        "--hyper-lr",
        nargs="+",
        metavar="X",
        help="step size of the coefficients: a number, or NAME=NUMBER pairs, what is not named being frozen "
        "(default: 5e-4 for beta1, 0 for beta2, 0.1 for the others)",
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


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lr", type=float, help="the guess (default: 3e-4, which is ten times too low for AdamW)")
    _add_data_and_model(parser)
    _add_common_optimizer(parser.add_argument_group("optimizers"))
    group = _add_training(parser, steps=600, eval_every="50", checkpoint_every=100)
    parser.set_defaults(steps=600, eval_every=50, checkpoint_every=100, threads=1)
    group.add_argument("--seed", type=int, help="of the initial weights and the data order (default: 0)")
    group.add_argument("--threads", type=int, metavar="N", help="of torch in each of the two processes (default: 1)")
    parser.add_argument_group("folder").add_argument(
        "--out", metavar="DIR", help="new, or of this demo, which goes on (default: runs/TIME-demo)"
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--optimizers",
        type=list_of(str),
        metavar="A,B,...",
        default=["adamw", "avgrad", "hyperadam", "mada"],
        help="(default: adamw,avgrad,hyperadam,mada)",
    )
    group.add_argument(
        "--lrs",
        type=list_of(float),
        metavar="X,Y,...",
        default=[3e-4, 1e-3, 3e-3, 1e-2],
        help="(default: 3e-4,1e-3,3e-3,1e-2)",
    )
    group.add_argument(
        "--seeds", type=seeds, metavar="N", default=[0, 1, 2], help="how many, or a list: 0,1,5 (default: 3)"
    )
    _add_data_and_model(parser)
    group = parser.add_argument_group("optimizers")
    _add_common_optimizer(group)
    group = _add_training(parser, steps=600, eval_every="30")
    parser.set_defaults(steps=600, eval_every=30, threads=1)
    group.add_argument(
        "--threads", type=int, metavar="N", help="of torch in each worker; times are most honest with 1 (default: 1)"
    )
    _add_workers(group)
    group = parser.add_argument_group("folder")
    group.add_argument("--out", metavar="DIR", help="new, or of this comparison (default: runs/TIME-compare)")
    group.add_argument("--report", metavar="DIR", help="train nothing; tables and figure from what is stored in DIR")
    _add_reference(group)


def _add_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        required=True,
        help="text files (.txt, .txt.gz), files with a column text (.parquet, .arrow, .jsonl, .json), a folder of "
        "either, or NAME[:CONFIG[:SPLIT]] on the hub",
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--tokenizer", metavar="NAME", help="on the hub, or a folder with its files (default: gpt2)")
    parser.add_argument(
        "--val-share", type=float, metavar="X", help="the end of a text, or rows at random (default: 0.1)"
    )
    parser.add_argument("--val-data", nargs="+", metavar="SOURCE", help="validation data of their own")
    parser.add_argument("--join", action="store_true", help="rows are lines of one text")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an experiment in TOML")
    parser.add_argument("--out", metavar="DIR", help="new, or of this experiment (default: runs/TIME-NAME)")
    parser.add_argument(
        "--data-root", metavar="DIR", default=".", help="where relative paths of data are looked up (default: here)"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="LABEL,...",
        default=[],
        help="contenders to train (default: all); may be given again",
    )
    parser.add_argument("--stage", choices=("tune", "confirm"), default=None, help="(default: both)")
    _add_workers(parser)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a sweep, of a stage or comparison, or of a run"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="Markdown, tables only, where it ends in .md; a figure of final losses over learning rates, a panel for "
        "each task, where it ends in .png (default: report.html in the first folder, or here where that cannot be "
        "written to)",
    )
    parser.add_argument("--only", metavar="LABEL,...", type=list_of(str), help="what the figure shows, in this order")
    _add_reference(parser)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="of a sweep, of a stage or comparison")
    parser.add_argument("--out", metavar="FILE", help="(default: the folder's name with .tar.gz, here)")


def _add_reference(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--reference", metavar="NAME", help="optimizer that the tables compare the others with (default: adamw)"
    )


def _add_workers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--workers", type=int, metavar="N", default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--address", metavar="A", default=None, help="of a Ray cluster (default: this machine alone)")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", metavar="ABC", default="abcdef", help="which of a to j (default: a to f)")
    parser.add_argument("--only", metavar="NAME", default=None, help="contenders with this in their name")
    parser.add_argument(
        "--seconds", type=float, metavar="X", default=10.0, help="to time each against the baseline (default: 10)"
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", default=None, help="of torch (default: torch's choice)")
    parser.add_argument("--out", metavar="DIR", help="(default: runs/TIME-bench)")


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    for name, kind, meaning in (
        ("beta2", float, "β2 in (0, 1) (default: 0.9)"),
        ("steps", int, "T (default: 10000)"),
        ("alpha", float, "α; the last learning rate is α/√T (default: 0.3)"),
        ("decay", float, "q in [0, 0.5]: learning rates fall as t^-q (default: 0)"),
        ("eps", float, "ε (default: 0.01)"),
        ("dimension", int, "d (default: 10)"),
        ("smoothness", float, "L (default: 1)"),
        ("gradient-bound", float, "R, gradients being at most R - ε (default: 1)"),
        ("gap", float, "F(x_1) - F* (default: 1)"),
        ("seeds", int, "runs for each setting that is measured (default: 4)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=meaning)
    parser.add_argument("--out", metavar="FILE", help="figure, without suffix (default: bounds)")


def _add_scale(parser: argparse.ArgumentParser) -> None:
    for name, kind, meaning in (
        ("condition", float, "largest over smallest curvature (default: 10000)"),
        ("noise", float, "variance of a gradient's noise, for the table (default: 1)"),
        ("steps", int, "of the run (default: 2000)"),
        ("seeds", int, "searches for each dot (default: 8)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=meaning)
    parser.add_argument("--out", metavar="FILE", help="figure, without suffix (default: scale)")


def _add_online(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problem", metavar="NAME", help="theorem, periodic or stochastic (default: periodic)")
    parser.add_argument(
        "--betas",
        type=float,
        nargs=2,
        action=Pair,
        metavar=("B1", "B2"),
        help="of all optimizers (default: 0.95 0.99; theorem: 0 0.1)",
    )
    for name, kind, meaning in (
        ("alpha", float, "the learning rate is alpha/√t (default: 2)"),
        ("steps", int, "(default: 10100)"),
        ("hyper-lr", float, "step size of rho (default: 0.1)"),
        ("seeds", int, "runs of the stochastic problem (default: 4)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="X" if kind is float else "N", help=meaning)
    parser.add_argument(
        "--scan",
        action="store_true",
        help="instead of a figure, tables in Markdown over betas, step sizes of rho, and values at which it is held",
    )
    parser.add_argument(
        "--projected",
        action="store_true",
        help="hypergradients of what is paid: 0 after a step that the projection onto [-1, 1] cut",
    )
    parser.add_argument("--out", metavar="FILE", help="figure, without suffix (default: online)")


def _add_data_and_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and model")
    group.add_argument(
        "--task", dest="kind", metavar="KIND", help="language (characters), tokens or vision (default: language)"
    )
    group.add_argument(
        "--data",
        metavar="FILE",
        help="any UTF-8 text (default: Python's language reference); tokens: a folder that 'mada tokens' made; "
        "vision: a folder with CIFAR-10's parquet files (default: scikit-learn's digits)",
    )
    for name, meaning, default in (
        ("layers", "layers", "4; tokens: 12"),
        ("heads", "attention heads", "4; tokens: 12"),
        ("width", "width, a multiple of heads; vision: channels of the first layer", "128; tokens: 768; vision: 32"),
        ("context", "characters or tokens that the model sees", "64; tokens: 1024"),
        ("batch", "windows or images in a batch", "12; tokens: 480; vision: 128"),
        ("val-windows", "windows to validate on", "256"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default: {default})")
    group.add_argument("--dropout", type=float, metavar="X", help="language, tokens: share left out (default: 0)")
    group.add_argument("--size", metavar="NAME", help="tokens: gpt2, gpt2-medium, ..., for layers, heads and width")
    group.add_argument(
        "--init",
        metavar="RUN",
        help="begin with the weights of an earlier run; tokens: also with published ones, in a folder or on the hub",
    )
    group.add_argument(
        "--characters-of", metavar="FILE", help="language: know the characters of this text, too, for a later run on it"
    )
    group.add_argument("--wikitext", metavar="FOLDER", help="tokens: measure the perplexity on its val.bin, too")
    group.add_argument("--lambada", metavar="FILE", help="tokens: measure last words, too; text or JSON lines")
    group.add_argument("--model", metavar="NAME", help="vision: cnn or resnet9 (default: cnn)")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="vision: shift and mirror (default: all but the digits)",
    )
    group.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="language, tokens: products in bfloat16 (default: no; tokens: where there is a GPU)",
    )


def _add_common_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--betas", type=float, nargs=2, action=Pair, metavar=("B1", "B2"), help="(start of) betas (default: 0.9 0.99)"
    )
    group.add_argument(
        "--weight-decay", type=float, metavar="X", help="decoupled, on tensors of 2 and more dimensions (default: 0.1)"
    )


def _add_training(
    parser: argparse.ArgumentParser, steps: int, eval_every: str, checkpoint_every: int = 200
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, metavar="N", help=f"(default: {steps})")
    group.add_argument(
        "--warmup", type=float, metavar="X", help="share of the steps in which lr rises; cosine follows (default: 0.05)"
    )
    group.add_argument("--clip", type=float, metavar="X", help="maximal gradient norm, 0: none (default: 1)")
    group.add_argument("--accumulate", type=int, metavar="N", help="micro-batches of each process (default: 1)")
    group.add_argument("--eval-every", type=int, metavar="N", help=f"steps between validations (default: {eval_every})")
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help=f"steps between checkpoints (default: {checkpoint_every})",
    )
    group.add_argument("--device", metavar="NAME", help="(default: cuda where there is one, else cpu)")
    group.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float64 (default: float32)")
    return group


if __name__ == "__main__":
    sys.exit(main())
