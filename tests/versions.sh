#!/usr/bin/env bash
# The tests with the oldest supported versions, or with the newest that there are:
#
#   tests/versions.sh oldest|newest [ARGUMENT OF PYTEST]...
#
# Makes a fresh environment, and removes it at the end. VENV=FOLDER keeps it there, or takes the one that is there as it
# is. PYTHON is the interpreter to make it with, python3 by default.
set -euo pipefail
which=${1:-}
case $which in
    # numpy 2.4 refuses to make a scalar of an array of one element, as the interpreter of triton 3.6 does
    oldest) versions=("torch==2.11.*" "triton==3.6.*" "numpy<2.4") ;;
    newest) versions=(torch triton numpy) ;;
    *) echo "usage: tests/versions.sh oldest|newest [ARGUMENT OF PYTEST]..." >&2; exit 2 ;;
esac
shift
cd "$(dirname "$0")/.."

if [ -z "${VENV:-}" ]; then
    VENV=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$VENV")"' EXIT
fi
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/pip" install -q --upgrade --upgrade-strategy eager "${versions[@]}" ".[test]"
    "$VENV/bin/pip" uninstall -q -y fastprior
fi

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # this checkout, whatever else the environment holds
"$VENV/bin/python" tests/versions.py
"$VENV/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
