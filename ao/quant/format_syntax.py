"""What an expression of a format may say, read from the sources of the configs: a mistake is told without importing torch.

Nothing is imported here but the standard library, so that the command line can load this file by its place.
"""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_ROOTS = ("Config", "Spec", "Granularity", "Layout", "Recipe", "Enum")
"""What a class of an expression derives from."""
_TORCH = re.compile(r"u?int([1-8]|16|32|64)|float(16|32|64)|bfloat16|float[48]_\w+")


@dataclass(frozen=True)
class Parameter:
    """choices: the strings that its annotation lists, if it does. number: whether its annotation is int. default: a literal, or
    `...` where there is none."""

    name: str
    required: bool = False
    positional: bool = True
    choices: tuple[str, ...] = ()
    number: bool = False
    default: Any = ...


@dataclass(frozen=True)
class Known:
    """A class that an expression may name. members: of an Enum. recipe: the name of a Recipe. calibrates: whether it may have
    ranges of activations to find."""

    name: str
    root: str
    parameters: tuple[Parameter, ...]
    members: tuple[str, ...] = ()
    recipe: str = ""
    calibrates: bool = False


def problem_of_call(name: str, parameters: Sequence[Parameter], positional: int, keywords: Collection[str]) -> str:
    """What is wrong with a call of `name` with so many arguments without a name, and these keywords; "" where nothing is."""
    names = [p.name for p in parameters]
    unknown = [keyword for keyword in keywords if keyword not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 1, cutoff=0.4)
        hint = f"; near to it is {near[0]}" if near else ""
        return f"{name} has no parameter {unknown[0]!r}{hint}. It has {', '.join(names) or 'none'}"
    places = [p.name for p in parameters if p.positional]
    if positional > len(places):
        return f"{name} takes {len(places)} arguments without a name at most, got {positional}"
    twice = [each for each in places[:positional] if each in keywords]
    if twice:
        return f"{name} got two values for {twice[0]}"
    missing = [p.name for p in parameters if p.required and p.name not in (*places[:positional], *keywords)]
    return f"{name} needs {' and '.join(missing)}" if missing else ""


def check_expression(text: str) -> None:
    """Raise ValueError, which names the parameter that is wrong, for an expression that makes no config and no Spec."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"it is no expression: {error.msg}") from None
    if not isinstance(node, (ast.Call, ast.Name)) or _check(node) not in ("Config", "Spec"):
        raise ValueError("it makes no config and no Spec")


def needs_data(text: str, without: Collection[str], recipe: str | None = None) -> bool:
    """Whether an expression that `check_expression` takes has ranges to find, or a recipe other than those `without` data.

    recipe: which takes the place of its own.
    """
    calibrates = recipe is not None and not set(recipe.split("+")) <= set(without)
    for call in (node for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Call)):
        assert isinstance(call.func, ast.Name)
        what, keywords = known(call.func.id), {k.arg: k.value for k in call.keywords}
        assert what is not None
        calibrates |= what.calibrates and "scale" not in keywords and not call.args
        if recipe is None:
            calibrates |= _wants_data(_literal(keywords.get("algorithm")), without)
            calibrates |= what.root == "Recipe" and what.recipe not in without
    return calibrates


def dict_needs_data(data: Any, without: Collection[str], recipe: str | None = None) -> bool:
    """`needs_data` of what `config_to_dict` wrote. Raises ValueError, which names what is wrong, where it is no such thing."""
    what = known(str(data.get("type"))) if isinstance(data, Mapping) else None
    if what is None or what.root not in ("Config", "Spec"):
        raise ValueError(f"{data!r} is no config of this version of ao")
    problem = problem_of_call(what.name, what.parameters, 0, [key for key in data if key != "type"])
    if problem:
        raise ValueError(problem)
    calibrates = what.calibrates and data.get("scale") is None
    if recipe is None:
        algorithm = data.get("algorithm")
        inner = known(str(algorithm.get("value"))) if isinstance(algorithm, Mapping) else None
        return calibrates or _wants_data(algorithm if inner is None else inner.recipe, without)
    return calibrates or not set(recipe.split("+")) <= set(without)


def _wants_data(algorithm: Any, without: Collection[str]) -> bool:
    return isinstance(algorithm, str) and not set(algorithm.split("+")) <= set(without)


def check_recipe(name: str) -> None:
    """Raise ValueError for what names no recipe, and for several that cannot be joined."""
    classes = (each for each, file in _places().items() if file.parent.name == "algorithms")
    recipes = {what.recipe: what for what in map(known, classes) if what is not None and what.recipe}
    parts = name.lower().split("+")
    if not set(parts) <= set(recipes):
        raise ValueError(f"must be among {', '.join(sorted(recipes))}, or several joined by '+'; got {name!r}")
    for part, following in itertools.pairwise(parts):
        if "rounding" not in (p.name for p in recipes[part].parameters):
            raise ValueError(
                f"{part!r} decides the codes, and must come last; in {name!r} it is followed by {following!r}"
            )


def _check(node: ast.expr) -> str:
    """The root of what a node makes: one of _ROOTS, or "" for a literal or a dtype."""
    if isinstance(node, ast.Call):
        return _check_call(node)
    if isinstance(node, ast.Name):
        if node.id in named_specs():
            return "Spec"
        _class_of(node.id)
        raise ValueError(f"{node.id} is a class: write {node.id}(...)")
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "torch":
            if not _TORCH.fullmatch(node.attr):
                raise ValueError(f"torch.{node.attr} is no dtype of a number")
            return ""
        what = _class_of(node.value.id)
        if node.attr not in what.members:
            some = f"; it has {', '.join(what.members)}" if what.members else ""
            raise ValueError(f"there is no {node.value.id}.{node.attr}{some}")
        return what.root
    if isinstance(node, (ast.Tuple, ast.List)):
        for each in node.elts:
            _check(each)
        return ""
    if isinstance(node, ast.Dict):
        for each in node.values:
            _check(each)
        return ""
    try:
        ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is neither a literal nor a name of ao or torch") from None
    return ""


def _check_call(node: ast.Call) -> str:
    if not isinstance(node.func, ast.Name):
        raise ValueError(f"{ast.unparse(node.func)} cannot be called here")
    if node.func.id in named_specs():
        raise ValueError(f"{node.func.id} takes no parameters; leave out the brackets")
    what = _class_of(node.func.id)
    if any(isinstance(each, ast.Starred) for each in node.args) or any(k.arg is None for k in node.keywords):
        raise ValueError(f"{what.name} takes its arguments one by one here, without * and **")
    keywords = {k.arg: k.value for k in node.keywords if k.arg is not None}
    problem = problem_of_call(what.name, what.parameters, len(node.args), keywords)
    if problem:
        raise ValueError(problem)
    places = [p for p in what.parameters if p.positional]
    values = [*zip(places, node.args), *((p, keywords[p.name]) for p in what.parameters if p.name in keywords)]
    for parameter, value in values:
        _check(value)
        _check_value(what.name, parameter, value)
    return what.root


def _check_value(owner: str, parameter: Parameter, node: ast.expr) -> None:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return
    name = parameter.name
    if parameter.choices and value not in parameter.choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(parameter.choices)}, got {value!r}")
    if parameter.number and type(value) is not int:
        raise ValueError(f"{owner}: {name} must be a whole number, got {value!r}")
    if (name in _SIZES or (parameter.number and name in _BOUNDS)) and isinstance(value, int):
        _BOUNDS.get(name, _size)(owner, name, value)
    if name in _SIZES and isinstance(value, (tuple, list)):
        for each in value:
            _size(owner, name, each)


def _bits(owner: str, name: str, value: Any) -> None:
    if not 1 <= value <= 8:
        raise ValueError(f"{owner}: {name} must be 1 to 8, got {value!r}")


def _size(owner: str, name: str, value: Any) -> None:
    if type(value) is not int or (value < 1 and value != -1):
        raise ValueError(f"{owner}: {name} must be a number such as 128, or -1 for the whole row, got {value!r}")


_BOUNDS: dict[str, Callable[[str, str, Any], None]] = {"bits": _bits}
_SIZES = ("group_size", "block", "block_size")
"""Parameters that have these names mean the same wherever they are."""


def _class_of(name: str) -> Known:
    what = known(name)
    if what is not None:
        return what
    near = [
        each
        for each in difflib.get_close_matches(name, [*_places(), *named_specs()], 6)
        if each in named_specs() or known(each)
    ]
    raise ValueError(
        f"ao has no {name} that says how to quantize" + (f"; near to it: {' and '.join(near[:2])}" if near else "")
    )


@functools.cache
def known(name: str) -> Known | None:
    """The class of that name, or None for what an expression may not name."""
    chain = _chain(name)
    if not chain or chain[-1][0] not in _ROOTS or len(chain) < 2:
        return None
    root, recipe = chain[-1][0], ""
    parameters: dict[str, Parameter] = {}
    members: list[str] = []
    for _, node in reversed(chain):
        for statement in node.body if node else ():
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                read = _parameter(statement.target.id, ast.unparse(statement.annotation), statement.value)
                if read is not None:
                    parameters[read.name] = read
                elif statement.target.id == "name" and isinstance(statement.value, ast.Constant):
                    recipe = str(statement.value.value)
            if root == "Enum" and isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                members.append(statement.targets[0].id)
    calibrates = any(
        isinstance(each, ast.FunctionDef) and each.name == "act_range"
        for owner, node in chain if owner != root and node is not None
        for each in node.body
    )  # fmt: skip
    ordered = sorted(parameters.values(), key=lambda p: not p.positional)
    return Known(name, root, tuple(ordered), tuple(members), recipe, calibrates)


def _parameter(name: str, annotation: str, value: ast.expr | None) -> Parameter | None:
    """A field of a dataclass as a parameter, or None for a constant of the class."""
    if annotation.startswith("ClassVar"):
        return None
    options = (
        {k.arg for k in value.keywords}
        if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")
        else None
    )
    required = value is None or (options is not None and not options & {"default", "default_factory"})
    literal = re.fullmatch(r"Literal\[(.*)\]", annotation)
    choices = tuple(ast.literal_eval(f"({literal[1]},)")) if literal else ()
    if options is not None:
        assert isinstance(value, ast.Call)
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
    return Parameter(
        name, required, not (options and "kw_only" in options), choices, annotation == "int", _literal(value)
    )


def _literal(node: ast.expr | None) -> Any:
    try:
        return ... if node is None else ast.literal_eval(node)
    except ValueError:
        return ...


def _chain(name: str) -> list[tuple[str, ast.ClassDef | None]]:
    """A class, its base, the base of that, up to one of _ROOTS; empty where there is none in these folders."""
    chain: list[tuple[str, ast.ClassDef | None]] = []
    while name not in ("", "ABC"):
        node = _classes(_places()[name]).get(name) if name in _places() else None
        chain.append((name, node))
        if name in _ROOTS or node is None:
            break
        name = ast.unparse(node.bases[-1]) if node.bases else ""  # what is mixed in comes before it
    return chain


@functools.cache
def _sources() -> dict[Path, str]:
    folders = (_PACKAGE / "quant", _PACKAGE / "quant" / "algorithms", _PACKAGE / "dtypes")
    return {file: file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.glob("*.py"))}


@functools.cache
def _places() -> dict[str, Path]:
    """The public classes, and the files that define them."""
    return {
        name: file
        for file, text in _sources().items()
        for name in re.findall(r"^class ([A-Z]\w*)[(:]", text, re.MULTILINE)
    }


@functools.cache
def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(_sources()[file]).body if isinstance(node, ast.ClassDef)}


def named_specs() -> tuple[str, ...]:
    """The Specs that are public by a name of their own, such as NF4."""
    return tuple(sorted(_named_expressions()))


def spec_label(spec: Mapping[str, Any]) -> str:
    """What a Spec prints as, from the dict that `Spec.to_dict` wrote: its name, or the first field and those that differ from
    their defaults. Long tables are told by their length."""
    spec = _plain(spec)
    name = next((name for name, each in _named_dicts().items() if each == spec), None)
    if name is not None:
        return name
    what = known(str(spec["type"]))
    usual = {} if what is None else {p.name: p.default for p in what.parameters[1:]}
    shown = {key: value for key, value in spec.items() if key != "type" and (key not in usual or usual[key] != value)}
    act = shown.pop("act", None)
    shown |= {} if act is None else {"act": act}
    return f"{spec['type']}({', '.join(f'{key}={_shown(value)}' for key, value in shown.items())})"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return spec_label(value)
    return f"{len(value)} numbers" if isinstance(value, tuple) and len(value) > 8 else repr(value)


def _plain(value: Any) -> Any:
    """The dict of a Spec with tuples for lists, and None where `Intx` sets its `symmetric` itself."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if not isinstance(value, Mapping):
        return value
    spec = {key: _plain(each) for key, each in value.items()}
    itself = spec["type"] == "Intx" and spec.get("symmetric") == (spec.get("bits") == 8)
    return spec | {"symmetric": None} if itself else spec


@functools.cache
def _named_dicts() -> dict[str, dict[str, Any]]:
    """What `Spec.to_dict` gives for the Specs that have names."""
    return {name: _plain(_dict_of(ast.parse(text, mode="eval").body)) for name, text in _named_expressions().items()}


def _dict_of(node: ast.expr) -> Any:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return ast.literal_eval(node)
    what = known(node.func.id)
    assert what is not None
    values = {p.name: p.default for p in what.parameters}
    values |= {p.name: _dict_of(each) for p, each in zip(what.parameters, node.args)}
    return {"type": what.name, **values, **{str(k.arg): _dict_of(k.value) for k in node.keywords}}


@functools.cache
def _named_expressions() -> dict[str, str]:
    pattern = re.compile(r'^\w+ = (.*)\.called\("(\w+)"\)$', re.MULTILINE)
    return {name: expression for text in _sources().values() for expression, name in pattern.findall(text)}


def config_names() -> tuple[str, ...]:
    """The configs that say how to quantize a weight."""
    return tuple(name for name in _places() if name.endswith("Config") and _is_config(name))


def _is_config(name: str) -> bool:
    what = known(name)
    return what is not None and what.root == "Config" and name not in ("FqnToConfig", "SpecConfig", "ModelConfig")
