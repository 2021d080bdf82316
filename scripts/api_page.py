"""Write docs/api.md: every public name, its signature, and the first paragraph of its docstring.

    .venv/bin/python scripts/api_page.py          rewrite the page
    .venv/bin/python scripts/api_page.py --check  exit with an error if that would change anything

Public is what `__all__` of the modules below names. The sources are read, not imported, so that no optional package is needed.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"

MODULES = {
    "ao": "Quantizing models, and the formats.",
    "ao.dtypes": "What a number is: Specs, the tensors that they make, layouts, and building blocks for formats of your own.",
    "ao.quant.qat": "Quantization-aware training.",
    "ao.quant.kv_cache": "Keys and values of attention in few bits.",
    "ao.optim": "Optimizers with states of few bits.",
    "ao.train": "Training with products of few bits.",
    "ao.sparsity": "Pruning, storing and training weights with zeros.",
    "ao.integrations.transformers": "Hugging Face transformers.",
    "ao.integrations.peft": "PEFT. Importing the module makes adapters over quantized layers merge without loss.",
    "ao.integrations.diffusers": "Hugging Face diffusers.",
    "ao.integrations.vllm": "vLLM.",
    "ao.integrations.folder_quantizer": "Model folders: what `ao quantize` does.",
    "ao.integrations.model_folder": "Model folders: loading, texts, perplexity.",
    "ao.integrations.html_report": "The page that `ao quantize --report` writes.",
    "ao.integrations.layer_latency": "What `ao quantize --latency` measures.",
}

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """Where a name is defined, and what stands there. doc: "" for none."""

    module: str
    node: Definition
    doc: str


@functools.cache
def tree(module: str) -> ast.Module:
    """The source of a module."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public(module: str) -> list[str]:
    """The names in `__all__`, sorted."""
    found = find(module, "__all__")
    assert found is not None, f"{module} has no __all__"
    assert isinstance(found.node, (ast.Assign, ast.AnnAssign)) and isinstance(found.node.value, ast.List)
    names: list[str] = ast.literal_eval(found.node.value)
    for node in statements(module):
        if (
            isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "__all__"
        ):  # += the __all__ of another module
            theirs = ast.unparse(node.value)
            names += public(next(s for s, name, local in imports(module) if local == theirs and name == "__all__"))
    return sorted(names, key=str.lower)


def statements(module: str) -> list[ast.stmt]:
    """Those of a module, and those below `if TYPE_CHECKING`."""
    body = tree(module).body
    return [*body, *(node for block in body if isinstance(block, ast.If) for node in block.body)]


def imports(module: str) -> Iterator[tuple[str, str, str]]:
    """(module, name, local name) of what a module imports from others of `ao`."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    for node in statements(module):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ao"):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source, alias.name, alias.asname or alias.name


def find(module: str, name: str) -> Found | None:
    """The definition of a name in a module, or in the one that it is imported from."""
    body = tree(module).body
    for i, node in enumerate(body):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return Found(module, node, ast.get_docstring(node) or "")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            after = body[i + 1] if i + 1 < len(body) else None
            text = after.value if isinstance(after, ast.Expr) else None
            said = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
            return Found(module, node, said)  # type: ignore[arg-type]
    for source, original, local in imports(module):
        if local == name or (original == "*" and name in public(source)):
            return find(source, name if original == "*" else original)
    return None


def signature(name: str, found: Found) -> str:
    """How a name is called, or, of what is not called, its value or its type."""
    node = found.node
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
        return call(name, [*arguments(node.args)], returns)
    if isinstance(node, ast.ClassDef):
        return call(name, parameters(found.module, node) or [], "")
    if isinstance(node, ast.AnnAssign):
        return f"{name}: {ast.unparse(node.annotation)}"
    value = re.sub(r"\.called\('\w+'\)$", "", ast.unparse(node.value))
    return f"{name} = {value}" if len(value) < 100 else name


def call(name: str, parts: list[str], returns: str) -> str:
    """On one line if that is short enough, else one line for each parameter."""
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"


def arguments(args: ast.arguments) -> Iterator[str]:
    """The parameters of a function, as they are written, without self and cls."""
    before = [None] * (len(args.posonlyargs) + len(args.args) - len(args.defaults))
    for arg, default in zip([*args.posonlyargs, *args.args], [*before, *args.defaults]):
        if arg.arg not in ("self", "cls"):
            yield parameter(arg.arg, arg.annotation, default)
    if args.vararg or args.kwonlyargs:
        yield "*" + (parameter(args.vararg.arg, args.vararg.annotation, None) if args.vararg else "")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults):
        yield parameter(arg.arg, arg.annotation, default)
    if args.kwarg:
        yield "**" + parameter(args.kwarg.arg, args.kwarg.annotation, None)


def parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> str:
    """`name: annotation = default`."""
    text = name if annotation is None else f"{name}: {ast.unparse(annotation)}"
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if annotation is not None else f"{text}={ast.unparse(default)}"


def parameters(module: str, node: ast.ClassDef) -> list[str] | None:
    """The parameters of a class: of its `__init__` or `__new__`, the fields of a dataclass, or those of a base; else None."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name in ("__init__", "__new__"):
            return [*arguments(member.args)]
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        usual, keyword = fields(module, node)
        return [*usual.values(), *(["*", *keyword.values()] if keyword else [])]
    for base in node.bases:
        found = find(module, ast.unparse(base))
        if found is not None and isinstance(found.node, ast.ClassDef):
            return parameters(found.module, found.node)
    return None


def fields(module: str, node: ast.ClassDef) -> tuple[dict[str, str], dict[str, str]]:
    """The fields of a dataclass and of its bases, in order: those that may be given by position, and the others."""
    usual: dict[str, str] = {}
    keyword: dict[str, str] = {}
    for base in node.bases:
        found = find(module, ast.unparse(base))
        if found is not None and isinstance(found.node, ast.ClassDef):
            more = fields(found.module, found.node)
            usual |= more[0]
            keyword |= more[1]
    for member in node.body:
        if not isinstance(member, ast.AnnAssign) or not isinstance(member.target, ast.Name):
            continue
        if "ClassVar" in ast.unparse(member.annotation):
            continue
        default, only = member.value, False
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            given = {keyword.arg: keyword.value for keyword in default.keywords}
            only = "kw_only" in given
            factory = given.get("default_factory")
            default = given.get("default") or (ast.Call(factory, [], []) if factory is not None else None)
        (keyword if only else usual)[member.target.id] = parameter(member.target.id, member.annotation, default)
    return usual, keyword


def paragraph(name: str, found: Found) -> str:
    """The first paragraph of the docstring, for Markdown; "" where there is none."""
    value = found.node.value if isinstance(found.node, ast.Assign) else None
    if not found.doc and isinstance(value, ast.Name):
        return f"Another name of `{value.id}`."
    first = " ".join(found.doc.strip().partition("\n\n")[0].split())
    pieces = first.split("`")
    pieces[::2] = [piece.replace("*", r"\*").replace("<", r"\<").replace("[", r"\[") for piece in pieces[::2]]
    return "`".join(pieces)


def undocumented() -> list[str]:
    """Full names of what is public, or a public method or property of it, and has no docstring."""
    lacking = []
    for module in MODULES:
        for name in public(module):
            found = find(module, name)
            if found is None or not paragraph(name, found):
                lacking.append(f"{module}.{name}")
            elif isinstance(found.node, ast.ClassDef):
                lacking += [f"{module}.{name}.{method}" for method in undocumented_methods(found)]
    return lacking


def undocumented_methods(found: Found) -> list[str]:
    """Public methods and properties of a class without a docstring, of their own or of a base."""
    classes = list(ancestry(found.module, found.node))
    return [
        method.name
        for method in methods(found.node)
        if not method.name.startswith("_")
        and not any(m.name == method.name and ast.get_docstring(m) for cls in classes for m in methods(cls))
    ]


def ancestry(module: str, node: Definition) -> Iterator[Definition]:
    """A class, and those of its bases that are in `ao`."""
    yield node
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        found = find(module, ast.unparse(base))
        if found is not None:
            yield from ancestry(found.module, found.node)


def methods(node: Definition) -> list[ast.FunctionDef]:
    """The functions of a class."""
    return [m for m in node.body if isinstance(m, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []


def page() -> str:
    """The text of docs/api.md."""
    parts = [
        "# Public names\n\n"
        "Made by `scripts/api_page.py` from the sources: signatures, and the first paragraph of each docstring.\n"
        "`help(name)` has the parameters, the shapes, what is raised, and where the formula comes from. A name that is\n"
        "listed under `ao` is in `ao.quant` or `ao.dtypes` as well.\n"
    ]
    parts.append("\n".join(f"- [{m}](#{m.replace('.', '')}): {about}" for m, about in MODULES.items()) + "\n")
    seen: set[tuple[str, str]] = set()
    for module in MODULES:
        parts.append(f"## {module}\n")
        for name in public(module):
            found = find(module, name)
            assert found is not None, f"{module}.{name} is not defined"
            if (found.module, name) in seen:
                continue
            seen.add((found.module, name))
            parts.append(f"### {name}\n\n```py\n{signature(name, found)}\n```\n\n{paragraph(name, found)}\n")
    return "\n".join(parts)


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
