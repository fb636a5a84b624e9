"""Docstrings are written for ``help()`` and doctest; this makes Markdown of them before the reference is built."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
# A doctest ends at an empty line.
_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*\n).+)*", re.MULTILINE)
# Arguments that are described together, named on one line or more, with the lines that continue the description.
_SEVERAL = re.compile(r"^( +)(\w+(?:,\s+\w+)+)(:.*(?:\n\1 +.*)*)", re.MULTILINE)
_ARGUMENTS = re.compile(r"(?<=^Args:\n)(?: +.*(?:\n|\Z))+", re.MULTILINE)
_NEXT_ARGUMENT = re.compile(r"\n(?= {4}\S)")
_SEE_METHOD = re.compile(r"See :meth:`(\w+\.\w+)`")
_LITERAL_BLOCK = re.compile(r"(?<=::\n)(?:\n| {4,}.*(?:\n|\Z))+")
_OTHERS = "others"
_AS_ELSEWHERE = re.compile(r"\w+: (?:as in|see) \[?`(\w+)`(?:\]\[[\w.]+\])?\.")


def as_markdown(docstring: str) -> str:
    """Roles become code, doctests and literal blocks become blocks of code, and every argument gets its own line."""
    text = _ROLE.sub(r"`\1`", docstring.replace("``", "`"))
    text = _SEVERAL.sub(lambda m: "\n".join(m[1] + name + m[3] for name in re.split(r",\s+", m[2])), text)
    return _DOCTEST.sub(r"```pycon\n\g<0>\n```", _LITERAL.sub(":", text))


def linked(docstring: str, package: griffe.Module) -> str:
    """Roles of what is public and described become links to its place in the reference."""
    public = {name: member for name, member in package.members.items() if member.is_alias}

    def link(role: re.Match[str]) -> str:
        name, _, attribute = role[1].partition(".")
        member = public.get(name)
        target = member.members.get(attribute) if member and attribute else member
        return f"[`{role[1]}`][{package.name}.{role[1]}]" if target and target.docstring else role[0]

    # Links would be printed as they are in a literal block.
    plain = _LITERAL_BLOCK.sub(lambda block: _ROLE.sub(r"\1", block[0]), docstring)
    return _ROLE.sub(link, plain)


def parameters(cls: griffe.Class) -> list[griffe.Parameter]:
    """Return the parameters of a class with the options that ``with_options`` shows at runtime.

    The decorator's first argument is a TypedDict, whose attributes are ``name: Annotated[type, default]``. Other
    defaults stand in the class statement. A second argument, ``keep_rest=True``, keeps the constructor's ``**``.
    """
    init = cls.members.get("__init__")
    if not isinstance(init, griffe.Function):
        return list(cls.parameters)
    for call in [decorator.value for decorator in init.decorators]:
        if isinstance(call, griffe.ExprCall) and call.canonical_path.endswith("options.with_options"):
            options = _options(cls.modules_collection[call.arguments[0].canonical_path], cls.keywords)
            *named, rest = init.parameters
            if options[0].name not in init.parameters:  # else they have been written out before
                return [*named, *options, *([rest] if len(call.arguments) > 1 else [])]
    return list(init.parameters)


def _options(typed_dict: griffe.Class, defaults: dict[str, Any]) -> list[griffe.Parameter]:
    options = [option for base in typed_dict.resolved_bases for option in _options(base, defaults)]
    for name, attribute in typed_dict.members.items():
        annotation, default = attribute.annotation.slice.elements
        kind = griffe.ParameterKind.keyword_only
        options.append(griffe.Parameter(name, annotation=annotation, kind=kind, default=defaults.get(name, default)))
    return options


def arguments(cls: griffe.Object | griffe.Alias) -> dict[str, str]:
    """Return the lines about each argument. "as in X" and "see X" become the lines of X, if X is a public class.

    "others: see X" become the lines of X about all arguments that are not described.
    """
    section = _ARGUMENTS.search(as_markdown(cls.docstring.value)) if cls.docstring is not None else None
    entries = [entry.strip() for entry in _NEXT_ARGUMENT.split(section[0])] if section else []
    lines = {entry.partition(":")[0]: entry for entry in entries}
    for name, entry in list(lines.items()):
        elsewhere = _AS_ELSEWHERE.fullmatch(entry)
        if elsewhere and elsewhere[1] in cls.package.members:
            known = arguments(cls.package[elsewhere[1]])
            if name == _OTHERS:
                del lines[name]
                names = [each.name for each in parameters(cls) if each.name not in lines]
                lines |= {each: known[each] for each in names if each in known}
            else:
                lines[name] = known.get(name, entry)
    return lines


def presets(package: griffe.Module) -> str:
    """Return a table of the optimizers that have a name, ``class Yogi(MADA, name="yogi")``, and what each is."""
    classes = [cls for module in package["optimizers"].modules.values() for cls in module.classes.values()]
    named = {ast.literal_eval(str(cls.keywords["name"])): cls for cls in classes if "name" in cls.keywords}
    rows = (f"| `{name}` | {as_markdown(cls.docstring.value).splitlines()[0]} |" for name, cls in sorted(named.items()))
    return "\n".join(["| name | optimizer |", "| --- | --- |", *rows])


def _is_ours(member: griffe.Object | griffe.Alias, package: griffe.Module) -> bool:
    """Whether a name of the package comes from one of its modules."""
    return isinstance(member, griffe.Alias) and member.target_path.startswith(f"{package.name}.")


class Docstrings(griffe.Extension):
    """Applied to every object of the package."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(linked(obj.docstring.value, obj.package))

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """List the named optimizers, and give a method that says no more than "See X.y" the arguments of X.y."""
        if "load_optimizer" in pkg.members:
            docstring = pkg["load_optimizer"].docstring
            docstring.value = docstring.value.replace("\n\nArgs:", f"\n\n{presets(pkg)}\n\nArgs:", 1)
        classes = [member for member in pkg.members.values() if _is_ours(member, pkg) and member.is_class]
        for method in [each for cls in classes for each in cls.members.values() if each.is_function and each.docstring]:
            see = _SEE_METHOD.match(method.docstring.value)
            section = _ARGUMENTS.search(pkg[see[1]].docstring.value) if see else None
            if section is not None and not _ARGUMENTS.search(method.docstring.value):
                text, doctest, code = method.docstring.value.partition("\n\n>>> ")
                method.docstring.value = f"{text}\n\nArgs:\n{section[0].rstrip()}\n{doctest}{code}"

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Put the arguments of a class in the order of its signature, which is torch's."""
        lines = arguments(cls)
        if "__init__" in cls.members:
            cls.members["__init__"].parameters = griffe.Parameters(*parameters(cls))
        if lines:
            assert cls.docstring is not None
            ordered = {parameter.name: lines[parameter.name] for parameter in cls.parameters if parameter.name in lines}
            section = "".join(f"    {entry}\n" for entry in {**ordered, **lines}.values())
            cls.docstring.value = _ARGUMENTS.sub(lambda _: section, cls.docstring.value, count=1)
