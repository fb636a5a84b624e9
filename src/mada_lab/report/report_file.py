"""The report of what is stored in folders, as one file: HTML with tables and figures, or Markdown with the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mada_lab.files import prepare_file
from mada_lab.report.html_page import html_page
from mada_lab.report.joint_table import JointTable, join
from mada_lab.report.results import REFERENCE
from mada_lab.report.stage_report import StageReport, report_on
from mada_lab.report.tables import markdown
from mada_lab.report.verdict import verdict
from mada_lab.sweep.stage_folder import load_stages
from mada_lab.text import count


def write_report(folders: Sequence[Path], out: Path, reference: str | None = None) -> list[str]:
    """Write the report. Return its summary: a sentence for each folder, see :func:`verdict`.

    Args:
        folders: each is that of a sweep, of a stage or comparison, or of a run.
        out: the file: Markdown where its name ends in .md, otherwise HTML.
        reference: see :func:`report_on`.

    Raises:
        InputError: a folder is none of these or holds nothing to report, or ``out`` cannot be written.
    """
    prepare_file(out)
    by_folder = [[report_on(stage, reference) for stage in load_stages(folder)] for folder in folders]
    reports = [report for of_folder in by_folder for report in of_folder]
    titles = {report.stage.described["title"] for report in reports}
    title = titles.pop() if len(titles) == 1 else count(len(titles), "experiment")
    if len(reports) == 1:
        title = reports[0].stage.title
    # Of a sweep, the last stage is what it found.
    last = [[report for report in of_folder if report.stage.runs][-1] for of_folder in by_folder]
    joint = join([(report.stage.described["title"], report.entries) for report in last], reference or REFERENCE)
    summary = [_sentence(report, alone=len(last) == 1) for report in last]
    make = _markdown_page if out.suffix == ".md" else html_page
    out.write_text(make(title, summary, reports, joint), "utf-8")
    return summary


def _sentence(report: StageReport, alone: bool) -> str:
    """Return what a stage found. The title of a run alone stands right above it."""
    stage = report.stage
    title = "" if stage.is_one_run and alone else f"{stage.described['title']}: "
    if stage.is_one_run and stage.runs[0].result.status == "interrupted":
        return f"{title}The run is not over. It is at step {stage.runs[0].result.step}."
    return title + verdict(report.entries, report.reference)


def _markdown_page(title: str, summary: Sequence[str], reports: Sequence[StageReport], joint: JointTable | None) -> str:
    parts = [f"# {title}", *summary]
    if joint is not None:
        parts += [markdown(joint.table).rstrip(), *joint.notes]
    for report in reports:
        parts += [f"## {report.stage.title}"] if len(reports) > 1 else []
        if problems := report.problems():
            parts.append("\n".join(f"- {problem}" for problem in problems))
        if report.stage.runs:
            for heading, table in report.tables().items():
                parts += [f"{heading}:", markdown(table).rstrip()]
            parts += report.notes()
    return "\n\n".join(parts) + "\n"
