#!/usr/bin/env bash
# Creates the virtual environment for `make setup`, from the wheels in $WHEELHOUSE where that is set (make wheelhouse).
# Errors name the package to install.
set -euo pipefail
venv=$1
if [ -z "${PYTHON:-}" ]; then
  echo "raylab needs Python 3.11, 3.12 or 3.13; found $(python3 --version 2>/dev/null || echo none)." >&2
  echo "  next: install one (Debian, Ubuntu: apt-get install python3 python3-venv), or: make setup PYTHON=/path/to/python3.11" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
  echo "raylab needs Python 3.11, 3.12 or 3.13; $PYTHON is $("$PYTHON" --version 2>&1 || true)." >&2
  exit 2
fi
if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
  version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  echo "this Python has no venv module (Debian has it in a separate package)." >&2
  echo "  next: apt-get install python$version-venv   and then: make setup" >&2
  exit 2
fi
from=()
if [ -n "${WHEELHOUSE:-}" ]; then
  if [ -z "$(find "$WHEELHOUSE" -name '*.whl' -print -quit 2>/dev/null)" ]; then
    echo "there are no wheels in $WHEELHOUSE." >&2
    echo "  next: on a machine with internet: make wheelhouse; copy the directory here, and: make setup WHEELHOUSE=DIR" >&2
    exit 2
  fi
  from=(--no-index --find-links "$WHEELHOUSE")
fi
echo "setting up $venv (once; a few GB, including torch with CUDA)"
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
# uv, which the lock also pins, installs in a fraction of pip's time
uv=$(mktemp)
trap 'rm -f "$uv"' EXIT
awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' requirements.lock > "$uv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "${from[@]}" --require-hashes -r "$uv"
# Compile bytecode now: if Python cannot write it later (PYTHONDONTWRITEBYTECODE, a read-only environment), each of Ray's
# many processes compiles torch, pandas and Ray again, which takes more than half of its start-up time
"$venv/bin/uv" pip sync -q "${from[@]}" --compile-bytecode --python "$venv/bin/python" --require-hashes requirements.lock
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --no-deps --no-build-isolation --offline -e .
touch "$venv/.ready"
