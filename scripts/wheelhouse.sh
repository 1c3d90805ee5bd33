#!/usr/bin/env bash
# Downloads every pinned package as a wheel into the directory $1, for `make setup WHEELHOUSE=$1` without internet. The
# wheels are those of the Python, system and processor of this machine, and complete as soon as the directory is there.
set -euo pipefail
to=$1
if [ -e "$to" ]; then
  echo "$to exists: remove it to download again, or: make wheelhouse WHEELHOUSE=DIR" >&2
  exit 2
fi
if [ -z "${PYTHON:-}" ]; then
  echo "raylab needs Python 3.11, 3.12 or 3.13; there is none here: make wheelhouse PYTHON=/path/to/python3.11" >&2
  exit 2
fi
partial=$to.partial
venv=$(mktemp -d)
trap 'rm -rf "$venv" "$partial"' EXIT
"$PYTHON" -m venv "$venv"
echo "downloading the pinned packages for $("$PYTHON" --version) on $(uname -sm) (a few GB)"
mkdir -p "$partial"
"$venv/bin/python" -m pip download -q --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
  -r requirements.lock -d "$partial"
mv "$partial" "$to"
echo "$(find "$to" -name '*.whl' | wc -l) wheels, $(du -sh "$to" | cut -f1), in $to"
echo "next: copy this clone and $to to the machine without internet, and there: make setup WHEELHOUSE=$to"
