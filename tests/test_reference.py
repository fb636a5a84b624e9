"""The page of the reference, as it is built: every public name is there, and a row for each of its arguments."""

from __future__ import annotations

import ast
import html
import importlib.util
import inspect
import operator
import re
from pathlib import Path

import pytest

import mada_optim
from mada_optim import integrations

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
# Their modules are read and not imported, which would take as long as all other tests here.
FRAMEWORKS = {
    path.stem: ast.parse(path.read_text("utf-8"))
    for path in Path(integrations.__file__).parent.glob("*.py")
    if path.stem != "__init__"
}
CLASSES = [name for name in mada_optim.__all__ if inspect.isclass(getattr(mada_optim, name))]

Tables = dict[str, list[list[str]]]


def public_names(module: ast.Module) -> list[str]:
    """Return ``__all__``."""
    values = [node.value for node in module.body if isinstance(node, ast.Assign) and "__all__" in ast.dump(node)]
    return list(ast.literal_eval(values[0]))


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^::: mada_optim\.(\S+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE))
    public = {*mada_optim.__all__, *(f"integrations.{name}" for name in integrations.__all__)}
    for framework, module in FRAMEWORKS.items():
        public |= {f"integrations.{framework}.{name}" for name in public_names(module)}
    assert listed == public


@pytest.fixture(scope="module")
def page(site: Path) -> str:
    return (site / "reference.html").read_text("utf-8")


@pytest.fixture(scope="module")
def tables(page: str) -> Tables:
    """For every class and function on the page, the cells of the table of its arguments, as text."""
    texts: Tables = {}
    for part in re.split(r'<h\d id="mada_optim\.', page)[1:]:
        table = re.search(r"Parameters:</span>.*?</table>", part, re.DOTALL)
        rows = re.findall(r"<tr class=.*?</tr>", table[0], re.DOTALL) if table else []
        cells = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in rows]
        name = part.partition('"')[0]
        texts[name] = [[" ".join(html.unescape(re.sub(r"<[^>]+>", "", cell)).split()) for cell in row] for row in cells]
    return texts


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_has_a_row(name: str, tables: Tables):
    """In torch's order, described there, and with the default that the description says, if it says one."""
    parameters = inspect.signature(getattr(mada_optim, name)).parameters
    assert [argument for argument, *_ in tables[name]] == list(parameters)
    for argument, _, description, default in tables[name]:
        parameter = parameters[argument]
        assert re.search(r"\w", description)
        assert not re.match(rf"(see|as in) ({'|'.join(CLASSES)})\.$", description)
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            required = parameter.default is inspect.Parameter.empty
            assert default == ("required" if required else repr(parameter.default))
        said = re.search(r"Default: (\(.*?\)|\S+?)\.(\s|$)", description)
        if said:
            assert ast.literal_eval(said[1]) == parameter.default


def test_every_argument_of_a_function_or_method_has_a_row(tables: Tables):
    seen = 0
    for name, rows in tables.items():
        if name not in CLASSES and not name.startswith(tuple(f"integrations.{each}" for each in FRAMEWORKS)):
            function = operator.attrgetter(name)(mada_optim) if not is_set_by_init(name) else None
            if inspect.isroutine(function):
                names = [argument for argument in inspect.signature(function).parameters if argument != "self"]
                assert [row[0] for row in rows] == names, name
                seen += bool(names)
    assert seen > 25


def is_set_by_init(name: str) -> bool:
    """Whether it is an attribute that objects have and their class has not."""
    owner, _, attribute = name.rpartition(".")
    return bool(owner) and owner in CLASSES and not hasattr(getattr(mada_optim, owner), attribute)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_argument_of_a_frameworks_class_has_a_row(framework: str, tables: Tables):
    for node in FRAMEWORKS[framework].body:
        if isinstance(node, ast.ClassDef) and node.name in public_names(FRAMEWORKS[framework]):
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            init = [method.args for method in methods if method.name == "__init__"]
            names = [argument.arg for args in init for argument in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            assert [row[0] for row in tables[f"integrations.{framework}.{node.name}"]] == names[1:]


def test_every_named_optimizer_is_listed(page: str):
    listed = re.findall(
        r"<td><code>([\w-]+)</code></td>\s*<td>([^<]+)", page.partition('id="mada_optim.load_optimizer"')[2]
    )
    assert {name for name, description in listed if len(description) > 5} >= set(mada_optim.available_optimizers())


def test_what_a_docstring_refers_to_is_linked(page: str):
    links = re.findall(r'href="#mada_optim\.([^"]+)"><code>([^<]+)</code>', page)
    assert {("MADAFamily", "MADAFamily"), ("Family.update", "Family.update")} <= set(links)
    assert all(f'id="mada_optim.{target}"' in page for target, _ in links)


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("_docstrings", DOCS / "_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    convert = module.as_markdown
    assert convert("See :meth:`Family.update` and ``x``::\n\n    y\n") == "See `Family.update` and `x`:\n\n    y\n"
    assert (
        convert("Text.\n\n>>> f(\n...     1)\n2\n\nMore.") == "Text.\n\n```pycon\n>>> f(\n...     1)\n2\n```\n\nMore."
    )
    both = "Args:\n    a, b: as\n        there.\n    c: here."
    assert convert(both) == "Args:\n    a: as\n        there.\n    b: as\n        there.\n    c: here."
    wrapped = "Args:\n    a,\n        b: as\n        there.\n    c: here."
    assert convert(wrapped) == convert(both)
