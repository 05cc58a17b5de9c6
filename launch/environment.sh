#!/usr/bin/env bash
# Makes a virtual environment from requirements files, or reuses it while they are unchanged.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/environment.sh [--dry-run] DIR REQUIREMENTS...
Installs the REQUIREMENTS files (relative to the repository) into the virtual environment DIR and prints the path of
its interpreter. Made anew when Python changes, completed when the files change, otherwise left as it is.
PYTHON=/path/to/python3.11 chooses the interpreter (3.11, 3.12 or 3.13).
TEXT
}

dry=false
case "${1:-}" in
    --help | -h) usage && exit 0 ;;
    --dry-run) dry=true && shift ;;
esac
[ $# -ge 2 ] || { usage >&2 && exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
directory=$1 && shift

if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3.11 python3.12 python3.13 python3); fi
python=""
for candidate in "${candidates[@]}"; do
    # Debian ships venv without ensurepip unless python3-venv is installed, hence both imports.
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
        2>/dev/null; then
        python=$candidate && break
    fi
done
if [ -z "$python" ]; then
    echo "No usable Python was found. Tried: ${candidates[*]}; needed: 3.11, 3.12 or 3.13 with its venv module." >&2
    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3.11" >&2
    exit 2
fi

files=()
for file in "$@"; do files+=(-r "$file"); done
version=$("$python" -c 'import platform; print(platform.python_version())')
stamp=$("$python" -c 'import hashlib, sys
print(sys.version_info[:2], *(hashlib.sha256(open(name, "rb").read()).hexdigest() for name in sys.argv[1:]))' "$@")

if [ -x "$directory/bin/python" ] && [ "$(cat "$directory/stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "environment: $directory is up to date" >&2
elif $dry; then
    echo "would run: $python -m venv $directory" >&2
    echo "would run: $directory/bin/python -m pip install ${files[*]}" >&2
else
    echo "environment: installing $* into $directory (Python $version; about a minute, more on a slow network)" >&2
    # Of another Python, broken, or left in the middle: from nothing. Otherwise pip installs what has changed.
    if [ -x "$directory/bin/python" ] && [ "$(cut -d')' -f1 "$directory/stamp" 2>/dev/null)" = "${stamp%%)*}" ]; then
        rm "$directory/stamp"
    else
        "$python" -m venv --clear "$directory" >&2
    fi
    [ -t 2 ] || quiet=--quiet # no thousand lines in a log
    "$directory/bin/python" -m pip install --disable-pip-version-check ${quiet:+"$quiet"} "${files[@]}" >&2 || {
        code=$?
        echo "environment: pip failed, see above. With network and disk space in order, run the same command again." >&2
        exit "$code"
    }
    echo "$stamp" >"$directory/stamp"
fi
case "$directory" in /*) echo "$directory/bin/python" ;; *) echo "$PWD/$directory/bin/python" ;; esac
