"""The snippets of the documentation run, and its links lead somewhere."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import spawn

import ao
from ao.dtypes.caching import cache_directory
from ao.integrations.command_line.program import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import api_page  # noqa: E402
import moving_page  # noqa: E402

PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
RUN = [
    page
    for page in PAGES
    if "```python\n" in page.read_text()
    and page.stem not in ("huggingface", "serving", "CONTRIBUTING")
    and page.name != "api.md"
]
"""Blocks marked `python`, and lines of `bash` that begin with `ao ` or `eval`, run as they stand, in order, in an empty
folder. The pages on Hugging Face and on serving have tests of their own, test_docs_huggingface.py and test_docs_serving.py."""
INSTALLS = ("README.md", "quickstart.md", "performance.md", "CONTRIBUTING.md")
"""Pages with lines of `bash` that set up a machine or measure one."""


def run_page(page, folder):
    names = {"__name__": page.stem}
    for kind, block in re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(), re.S | re.M):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
            continue
        for line in block.splitlines():
            if line.startswith("ao "):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
            elif line.startswith("eval "):
                program = f'ao() {{ {sys.executable} -m ao "$@"; }}'
                subprocess.run(
                    ["bash", "-ec", f"{program}\n{line}"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
                )
            else:
                assert page.name in INSTALLS, line


@pytest.mark.parametrize("page", [page for page in RUN if page.stem != "training"], ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A cache of its own, but for what is the same and takes seconds.
    kernels = cache_directory() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("AO_CACHE_DIR", str(tmp_path / "cache"))
    if page.stem == "command-line":  # what its lines compile, they also run
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run_page(page, tmp_path)


def training(rank, page, folder):
    os.chdir(folder)
    run_page(page, folder)


def test_snippets_of_training_run(tmp_path):
    """One of its blocks is for torchrun, which starts a process with these variables."""
    spawn(training, 1, ROOT / "docs" / "training.md", tmp_path, backend=None)


def test_blocks_that_do_not_run():
    """There are none but the signatures of api.md: another fence would hide them from the tests above."""
    for page in (p for p in PAGES if p.name != "api.md"):
        kinds = set(
            re.findall(r"^```(\w*)\n", re.sub(r"^```python.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
        )
        assert kinds <= {"", "bash"}, page.name


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "huggingface"], ids=lambda page: page.stem)
def test_names_exist(page):
    """What the other blocks import from ao is there, and so is what they call in it."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
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
