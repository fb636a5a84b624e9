"""``mada bench``: times of optimizer steps, against torch's fused AdamW."""

from __future__ import annotations

import argparse
from pathlib import Path

from mada_lab.cli.option_groups import DRAWING
from mada_lab.cli.options import Outcome, new_folder

SUMMARY = "time optimizer steps against torch's fused AdamW"
EPILOG = """\
examples:
  mada bench
  mada bench --workloads ab --only MADA --seconds 5

workloads:
  a  one tensor of 20 M        b  the 148 tensors of GPT-2 124M        c  training steps of a GPT of 10.8 M
  d  240 tensors of 64 x 64    e  10,000 tensors of 8                  f  300 tensors in 60 parameter groups
  orthogonalization alone: g  GPT-2's matrices, width 256    h  width 768    i  experts
  j  training steps of the default GPT of 'mada train', 0.8 M
  k  the program's time for 148 tensors on a GPU: kernels are prepared and not launched (needs Triton, not a GPU)

Written: results.json, table.md and figure.png. Let nothing else run meanwhile.
"""
NEEDS = DRAWING


def add_options(parser: argparse.ArgumentParser) -> None:
    """See :class:`mada_lab.cli.main.Command`."""
    parser.add_argument("--workloads", metavar="ABC", default="abcdef", help="which of a to k (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME", default=None, help="contenders with this in their name")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="X",
        default="10",
        help="to time each against the baseline (default: %(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", default=None, help="of torch (default: torch's choice)")
    parser.add_argument("--out", metavar="DIR", help="(default: runs/TIME-bench)")


def run(arguments: argparse.Namespace) -> Outcome:
    """See :class:`mada_lab.cli.main.Command`."""
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
    out = Path(getattr(arguments, "out", None) or new_folder("bench"))
    out.mkdir(parents=True, exist_ok=True)
    machine = measure.machine(arguments.device)
    results: list[measure.Result] = []
    first: measure.Result | None = None
    for result in measure.run(arguments.workloads, arguments.device, arguments.seconds, chosen):
        if first is None or first.workload != result.workload:
            first = result
            console.print(f"\n({result.workload}) {result.title}")
            console.print("".join(f"{title:<36}" if not i else f" {title:>9}" for i, title in enumerate(report.HEADER)))
        cells = report.row(result, machine, first)
        console.print("".join(f"{cell:<36}" if not i else f" {cell:>9}" for i, cell in enumerate(cells)))
        results.append(result)
        # After each, so that nothing is lost.
        measure.save(out / "results.json", machine, results)
        (out / "table.md").write_text(report.markdown(machine, results), encoding="utf-8")
    report.draw(results, out / "figure")
    console.print(f"\nWritten: {out}/results.json, table.md, figure.png")
    return 0, {"folder": out, **read_json(out / "results.json")}
