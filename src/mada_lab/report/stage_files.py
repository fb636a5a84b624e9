"""The files that are made of a stage, beside its runs.

table.md, results.json  what was found
curves.png, .svg        losses over steps and learning rates
betas.png, .svg         final losses over the betas, where these are an axis
coefficients.png, .svg  paths of the coefficients, where any are learned
"""

from __future__ import annotations

from pathlib import Path

from mada_lab.files import write_json
from mada_lab.report.coefficient_panels import panels
from mada_lab.report.stage_figures import draw_betas, draw_coefficients, draw_comparison
from mada_lab.report.stage_report import StageReport, report_on
from mada_lab.report.tables import markdown
from mada_lab.sweep.stage_folder import check_any_run, load_stage
from mada_lab.tasks.registry import without_paths


def write_stage_files(folder: Path, reference: str | None = None) -> StageReport:
    """Write table.md, results.json and the figures of what is stored in a stage's folder. Return what they say.

    See :func:`report_on` for the ``reference``.
    """
    stage = load_stage(folder)
    report = report_on(stage, reference)
    check_any_run(folder, [stage])
    described = stage.described
    settings = {key: value for key, value in described["base"].items() if key not in ("optimizer", "seed")}
    settings["task"] = without_paths(settings["task"])
    content = {"title": described["title"], "stage": described["stage"], "data": stage.records[0]["data"]}
    content |= {"settings": settings, "lrs": stage.lrs, "seeds": stage.seeds}
    content |= {"reference": report.reference, "results": report.entries}
    if report.betas:
        content["betas"] = report.betas
        draw_betas(report.betas, folder / "betas", f"{stage.caption}; mean over seeds")
    write_json(folder / "results.json", content)
    text = "\n".join([*map(markdown, report.tables().values()), *(f"{note}\n" for note in report.notes())])
    (folder / "table.md").write_text(text, "utf-8")
    title = f"{stage.caption}; mean and range over {len(stage.seeds)} seeds"
    draw_comparison(stage.contenders, folder / "curves", title)
    if coefficient_panels := panels(stage.contenders):
        draw_coefficients(coefficient_panels, folder / "coefficients", f"{stage.caption}; a line for each run")
    return report
