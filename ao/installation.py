"""The folder `ao/` belongs to one package. Importing this module raises ImportError where it does not.

On the package index the name `ao` is somebody else's, and that package has a folder of the same name. pip puts the files of both
into one folder without a word: whichever comes last has `ao/__init__.py`, and uninstalling either takes it away.
"""

import sys
from pathlib import Path

_REPAIR = (
    "Run `pip uninstall -y ao ao-lowbit`, then install ao-lowbit again (`pip install .` in its clone); if you need the other "
    "package too, give it an environment of its own"
)


def _check() -> None:
    package = sys.modules[__name__.partition(".")[0]]
    if getattr(package, "__distribution__", None) != "ao-lowbit":
        raise ImportError(
            f"ao/__init__.py is not that of ao-lowbit: it was removed or replaced with another package called 'ao'. {_REPAIR}"
        )
    site = Path(__file__).parent.parent
    if others := sorted(path.name for path in site.glob("ao-*.dist-info")):
        raise ImportError(f"{site} has another package called 'ao', {others[0]}, mixed with ao-lowbit. {_REPAIR}")


_check()
