"""Write the tables of docs/moving.md: what each name of torchao, optimum-quanto and bitsandbytes is here.

    .venv/bin/python scripts/moving_page.py          rewrite the tables, and leave the rest of the page as it is
    .venv/bin/python scripts/moving_page.py --check  exit with an error if that would change anything

A table is made from `NAMES`, or `table()`, of ao/compat/LIBRARY/names.py, and stands between two comments of the page.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "moving.md"

LIBRARIES = {"torchao": "torchao", "quanto": "optimum.quanto", "bitsandbytes": "bitsandbytes"}
"""Where the names of a library are -> what it is imported as."""


def names(library: str) -> dict[str, tuple[str, str]]:
    """Foreign name -> (what it is here, note); empty where there is no such package."""
    path = f"ao.compat.{library}"
    if importlib.util.find_spec(path) is None or importlib.util.find_spec(f"{path}.names") is None:
        return {}
    module = importlib.import_module(f"{path}.names")
    if hasattr(module, "NAMES"):
        return dict(module.NAMES)
    prefix = f"{LIBRARIES[library]}."
    return {name.removeprefix(prefix): (f"`{e.here}`", "" if e.same else e.note) for name, e in module.table().items()}


def table(library: str) -> str:
    """The rows of a library, one for each name; a name that is the same at several places stands at the shortest."""
    rows: dict[tuple[str, str], tuple[str, str]] = {}
    for name, (here, note) in names(library).items():
        key = name.rpartition(".")[2], here
        if here == "the same" or key not in rows or len(name) < len(rows[key][0]):
            rows[key if here != "the same" else (name, here)] = name, note
    lines = [f"| {LIBRARIES[library]} | ao.compat.{library} | note |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {here} | {note} |" for (_, here), (name, note) in rows.items()]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables made anew; that of a library that is not there stays."""
    for library in LIBRARIES:
        start, end = f"<!-- names of {library} -->", f"<!-- end of the names of {library} -->"
        if start not in text or end not in text:
            raise ValueError(f"{PAGE} lacks the comments {start} and {end}, between which the table stands")
        if names(library):
            found = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
            made = f"{start}\n\n{table(library)}\n\n{end}"
            text = found.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


def main() -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in sys.argv:
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
