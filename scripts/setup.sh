#!/usr/bin/env bash
# Create .venv and install the pinned stack into it; do nothing when that is done already.
#
#     scripts/setup.sh [base|dev|distributed]      PYTHON=python3.12 picks the interpreter
#
# A finished layer leaves a stamp (.venv/.base, .venv/.dev, .venv/.distributed) that holds the checksum of the requirements it was
# installed from. The stamp goes before an install starts and comes back when it has ended, so an interrupted one is done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

layer=${1:-base}
case $layer in
    base) requirements=requirements.txt ;;
    dev | distributed) requirements=requirements/$layer.txt ;;
    *)
        echo "usage: scripts/setup.sh [base|dev|distributed]" >&2
        exit 2
        ;;
esac

fail() {
    echo "error: $*" >&2
    exit 2
}

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ -n ${PYTHON:-} && -x .venv/bin/python ]]; then
    asked=$(version_of "$PYTHON") || fail "PYTHON=$PYTHON does not run"
    there=$(version_of .venv/bin/python) || there=broken
    [[ $asked == "$there" ]] || fail ".venv holds Python $there, and PYTHON=$PYTHON is $asked: delete .venv to build it anew"
fi

[[ $layer == base ]] || bash scripts/setup.sh base

stamp=.venv/.$layer
wanted=$(cat "$requirements" requirements/constraints.txt | cksum)
if [[ -x .venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

if [[ ! -x .venv/bin/python ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=${PYTHON:-python3}
    found=$(version_of "$python") || fail "$python was not found: install Python 3.11 or newer, or say where it is with PYTHON=/path/to/python"
    if ! new_enough "$python"; then
        others=""
        for other in python3.11 python3.12 python3.13 python3.14; do
            if new_enough "$other"; then others="; $other is here: add PYTHON=$other"; fi
        done
        fail "$python is Python $found, and 3.11 or newer is needed${others}"
    fi
    echo "setup: creating .venv with Python $found"
    "$python" -m venv --clear .venv || fail "no virtual environment could be made (Debian, Ubuntu: apt-get install python3-venv)"
fi
new_enough .venv/bin/python || fail ".venv holds Python $(version_of .venv/bin/python), and 3.11 or newer is needed: delete .venv"

rm -f "$stamp"
pip() {
    .venv/bin/python -m pip install --disable-pip-version-check --no-input "$@" ||
        fail "pip could not install the $layer requirements (its message is above); run the same command again to go on"
}

echo "setup: installing $requirements (once; a few minutes)"
if [[ $layer == base ]]; then
    pip -c requirements/constraints.txt "$(grep '^torch==' requirements.txt)" # first, so that nothing else pulls another torch
fi
pip -r "$requirements"

if [[ $layer == base ]]; then
    # `import recipes` works from any folder, for python, accelerate, torchrun and deepspeed alike. The path in this file is relative
    # to the folder that holds it, so the checkout may be moved.
    site_packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -c 'import os, sys; print(os.path.relpath(os.getcwd(), sys.argv[1]))' "$site_packages" >"$site_packages/recipes.pth"

    headers=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
        echo "setup: no C++ compiler was found: torch.compile stays off and training is slower (Debian, Ubuntu: apt-get install g++)"
    elif [[ ! -f $headers/Python.h ]]; then
        echo "setup: the Python headers are missing: torch.compile stays off and training is slower (Debian, Ubuntu: apt-get install python3-dev)"
    fi
fi

echo "$wanted" >"$stamp.new"
mv "$stamp.new" "$stamp"
echo "setup: done"
