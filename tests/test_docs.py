"""The snippets of the documentation run, and its links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import ao

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import api_page  # noqa: E402
import moving_page  # noqa: E402

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
RUN = [
    page
    for page in PAGES
    if page.parent.name == "docs" and "```python\n" in page.read_text() and page.stem != "huggingface"
]
"""Blocks marked `python` run, one after the other; those marked `py` need something that is not here. The page on Hugging Face
has a test of its own, test_docs_huggingface.py."""


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))
    exec(compile(code, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "huggingface"], ids=lambda page: page.stem)
def test_names_exist(page):
    """What the other blocks import from ao is there, and so is what they call in it."""
    for block in re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.S | re.M):
        names = {"ao": ao}
        exec("\n".join(re.findall(r"^from ao\b.*$", block, re.M)), names)
        for name in re.findall(r"\bao((?:\.\w+)+)\(", block):
            assert eval(f"ao{name}", names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_the_tables_of_other_libraries_names_are_up_to_date():
    text = moving_page.PAGE.read_text(encoding="utf-8")
    assert text == moving_page.page(text), "run scripts/moving_page.py"
    assert all(f"`{name}`" in text for library in ("quanto", "bitsandbytes") for name in moving_page.names(library))


def test_the_page_of_public_names_is_up_to_date():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert text == api_page.page(), "run scripts/api_page.py"


def test_every_public_name_has_a_docstring():
    assert api_page.undocumented() == []


@pytest.mark.parametrize("module", [m for m in api_page.MODULES if "integrations" not in m])
def test_the_page_has_what_python_has(module):
    """The sources are read rather than imported; what is found is what an import gives."""
    imported = importlib.import_module(module)
    assert set(api_page.public(module)) == set(imported.__all__)
    for name in imported.__all__:
        value, found = getattr(imported, name), api_page.find(module, name)
        if isinstance(value, type) and isinstance(found.node, ast.ClassDef):
            assert (value.__module__, value.__qualname__) == (found.module, found.node.name)
