"""The entry point of the program `ao`.

It loads the folder of the command line by its place rather than by name, since importing anything of the package `ao`
imports torch, which takes seconds, and half of the commands do without.

Nothing is imported before `main` is running, where Ctrl-C is waited for.
"""


def main() -> int:
    """Run `ao` and return the exit code, 130 where Ctrl-C has ended it."""
    import sys

    try:
        code: int = _program().main()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _program():  # type: ignore[no-untyped-def]  # to name its type would be to import it
    """The module `program` of the command line. Raises SystemExit where another package is called `ao`."""
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    name = "ao_command_line"
    package = PathFinder.find_spec("ao", sys.path) or importlib.util.find_spec("ao")
    if package is None or package.origin is None or "ao-lowbit" not in Path(package.origin).read_text(encoding="utf-8"):
        raise SystemExit(
            "ao: ao/__init__.py is missing, or that of another package called 'ao'. Run `pip uninstall -y ao ao-lowbit`, then "
            "install ao-lowbit again (`pip install .` in its clone)"
        )
    folder = Path(package.origin).parent / "integrations" / "command_line"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.program")


if __name__ == "__main__":
    import sys

    sys.exit(main())
