"""What the documentation says is true: code runs, tables are those that were made, messages are those of the source.

That the pages build, and their links lead somewhere: make docs.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch
from torch import nn

from mada_optim import MADA, OMADA, AVGrad, OMADAFamily, load_optimizer

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
README = (REPOSITORY / "README.md").read_text("utf-8")
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
ROW = re.compile(r"^\| `(?P<code>.+?\(params.*?\))` \| (?P<count>\d) \| (?P<names>.+) \|$", re.MULTILINE)
# A block of code, and in front of it the reason why it does not run here.
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.+?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```(?P<language>.*?)\n.*?^```$", re.MULTILINE | re.DOTALL)


MEMORY = [match.groups() for match in ROW.finditer((DOCS / "memory.md").read_text("utf-8"))]


def test_the_table_of_memory_is_read():
    assert len(MEMORY) == 12


@pytest.mark.parametrize(("code", "count", "names"), MEMORY, ids=[code for code, *_ in MEMORY])
def test_the_table_of_memory(code: str, count: str, names: str):
    weight = nn.Parameter(torch.ones(5, 3))
    known = {"MADA": MADA, "OMADA": OMADA, "AVGrad": AVGrad, "load_optimizer": load_optimizer}
    optimizer = eval(code, known | {"params": [weight]})
    weight.grad = torch.ones(5, 3)
    optimizer.step()
    state = optimizer.state[weight]
    buffers = {name for name, value in state.items() if value.shape == weight.shape}
    assert buffers == set(re.findall(r"`(\w+)`", names))
    assert len(buffers) == int(count)
    assert all(state[name].dtype == torch.float32 for name in buffers)


@pytest.fixture
def _process_as_new() -> Iterator[None]:
    """What the frameworks keep for the whole process."""
    environment = dict(os.environ)
    yield
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("_process_as_new")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore:.*:FutureWarning")
def test_code_on_a_page_runs_as_it_stands(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pasted block after block into a new session."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "pasted"}
    for block in BLOCK.finditer((DOCS / page).read_text("utf-8")):
        if block["reason"] is None:
            exec(block["code"], names)


def test_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a model, data and a loss at hand."""
    monkeypatch.chdir(tmp_path)

    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    batches = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(3)]
    names = {"model": model, "batches": batches, "loss_function": nn.functional.mse_loss}
    blocks = [block["code"] for block in BLOCK.finditer(README)]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "became.png").exists()


def test_the_readme_has_at_most_900_words():
    assert len(README.split()) <= 900


def cells(text: str, name: str) -> list[str]:
    """The cells of the first row of that name, without it."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_the_readmes_results_are_those_that_were_made():
    untuned = (DOCS / "results" / "2026-11-29-untuned" / "untuned.md").read_text("utf-8").partition("At the best")[0]
    header, *_ = (line for line in untuned.splitlines() if line.startswith("| optimizer |"))
    tasks = [cell.strip() for cell in header.split("|")[2:-1]]
    shown = [
        tasks.index(title) for title in ("Python's language reference", "CIFAR-10 by a vision transformer", "Diabetes")
    ]
    for name, label in (
        ("AdamW", "adamw"),
        ("schedule-free AdamW", "schedulefree"),
        ("Prodigy", "prodigy"),
        ("Muon", "muon"),
        ("MADA", "mada"),
        ("OMADA", "omada"),
    ):
        assert cells(README, name) == [cells(untuned, label)[task] for task in shown]
    # What the first table rounds.
    found = (DOCS / "results" / "2026-11-28-scale" / "adamw.md").read_text("utf-8")
    for text, label, task, cell in (
        (found, "omada", 0, "-0.150 ± 0.011"),
        (found, "muon", 0, "-0.149 ± 0.005"),
        (untuned, "omada", tasks.index("Digits"), "+0.134 ± 0.079"),
    ):
        numbers = map(Decimal, cells(text, label)[task].split(" ± "))
        mean, half = (number.quantize(Decimal("0.001"), ROUND_HALF_UP) for number in numbers)
        assert f"{mean:+} ± {half}" == cell
        assert cell in README


def test_the_readmes_costs_are_those_that_were_timed():
    timed = (DOCS / "results" / "2026-11-23-speed" / "table.md").read_text("utf-8").partition("## (c)")[2]
    for name, label in (
        ("MADA, nothing learned", "MADA, nothing learned (Adam)"),
        ("MADA, everything learned", "MADA, everything"),
        ("schedule-free AdamW", "schedule-free AdamW"),
    ):
        ratio, *_, memory = cells(timed, label)
        row = next(line for line in README.splitlines() if line.startswith(f"| {name} | {ratio}"))
        assert row == f"| {name} | {ratio} | {memory} |"


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *DOCS.rglob("*.md")], ids=lambda page: page.parent.name)
def test_code_fits_the_column(page: Path):
    """Except for what a program prints."""
    for block in FENCED.finditer(page.read_text("utf-8")):
        assert block["language"] == "text" or max(map(len, block[0].splitlines())) <= 88, block[0]


def messages() -> list[str]:
    """What the source says in strings, with ... for what is filled in."""
    found = []
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_source():
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    tables = page.partition("## Warnings")[2].partition("## The command")[0]
    quoted = [
        text for row in re.findall(r"^\| (`.+?`) \|", tables, re.MULTILINE) for text in re.findall(r"`(.+?)`", row)
    ]
    assert len(quoted) > 15
    known = messages()
    for text in quoted:
        pattern = re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
        assert any(pattern.search(message) for message in known), text


def test_the_scripts_of_the_site_are_shipped_with_it():
    """With fonts and licences, so that the site works without a network."""
    katex = DOCS / "javascripts" / "katex"
    fonts = re.findall(r"url\(([^)]+)\)", (katex / "katex.min.css").read_text("utf-8"))
    assert len(fonts) > 15
    assert all((katex / font).exists() for font in fonts)
    assert "MIT License" in (katex / "LICENSE").read_text("utf-8")
    configured = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    scripts = re.findall(r"javascripts/[\w./-]+\.(?:js|css)\b", configured)
    assert len(scripts) == 4
    assert all((DOCS / script).exists() for script in scripts)
    assert not re.findall(r"unpkg|cdn|//[a-z.]*google", configured)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+?)\$", re.DOTALL)
TYPESET = """<script src="{katex}"></script><script>
const errors = [];
for (const [display, inline] of {formulas})
  try {{ katex.renderToString(display || inline, {{ displayMode: display !== "", throwOnError: true }}); }}
  catch (error) {{ errors.push(error.message); }}
document.title = JSON.stringify(errors);
</script>"""


def formulas() -> list[tuple[str, str]]:
    """Of all pages, displayed or within a line; the other of the two is empty."""
    pages = [re.sub(r"`[^`\n]+`", "", FENCED.sub("", path.read_text("utf-8"))) for path in DOCS.rglob("*.md")]
    return [formula for page in [*pages, README] for formula in FORMULA.findall(page)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_formulas_are_typeset(tmp_path: Path):
    assert len(formulas()) > 30
    page = tmp_path / "formulas.html"
    script = (DOCS / "javascripts" / "katex" / "katex.min.js").as_uri()
    page.write_text(TYPESET.format(katex=script, formulas=json.dumps(formulas())), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(CHROMIUM), *options, "--virtual-time-budget=60000", "--dump-dom", page.as_uri()]
    document = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    (errors,) = re.findall(r"<title>(.*?)</title>", document)
    assert json.loads(html.unescape(errors)) == []


def test_the_tables_of_coefficients_are_those_of_the_families() -> None:
    rows = re.findall(
        r"^\| (\S+) `(\w+)` \| ([\d.]+) \| \[([\d.]+), ([\d.]+)\] \|",
        (DOCS / "coefficients.md").read_text("utf-8"),
        re.MULTILINE,
    )
    described = {name: (symbol, float(start), (float(low), float(high))) for symbol, name, start, low, high in rows}
    assert described == {each.name: (each.label, each.default, each.box) for each in OMADAFamily.coefficients}
