#!/usr/bin/env bash
# Runs the tests in an environment of their own: the fast lane, then the default lane.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tests/run.sh [--fast | --learn] [--oracle] [PYTEST ARGUMENTS...]

Makes .environment-tests/ and runs the fast lane, then the default one. PYTEST ARGUMENTS are passed on and name files
from the repository's root: bash tests/run.sh tests/data -k order

  --fast     the fast lane only: under 5 minutes on two cores
  --learn    the long lane only: trains until it has learnt, compiles for a pod, runs every benchmark at toy size and
             sizes and meshes beyond the other lanes'; one process, up to an hour
  --oracle   installs torch and transformers, which some tests compare with, and libtpu, by which some compile (2 GB),
             and fails where such a test skips
TEXT
}

fast="not slow and not learn"
lanes=("$fast" "slow and not learn")
requirements=(requirements.txt requirements-dev.txt)
workers=2
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage && exit 0 ;;
        --fast) lanes=("$fast") ;;
        --learn) lanes=("learn") && workers=0 && requirements+=(requirements-tpu.txt) ;;
        --oracle) requirements+=(requirements-oracle.txt requirements-tpu.txt) && export VLP_JAX_ORACLE=1 ;;
        *) break ;;
    esac
    shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash launch/environment.sh .environment-tests "${requirements[@]}")
# Compiled programs are kept for a week and shared by the workers and by the programs that tests start.
export JAX_COMPILATION_CACHE_DIR="${python%/bin/python}/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
find "$JAX_COMPILATION_CACHE_DIR" -type f -mtime +7 -delete 2>/dev/null || true

result=5 # pytest's "no test ran", until a lane says otherwise
for lane in "${lanes[@]}"; do
    code=0
    # The fast lane compiles far more than it computes; the others run what users run.
    export JAX_DISABLE_MOST_OPTIMIZATIONS=$([ "$lane" = "$fast" ] && echo true || echo false)
    "$python" -m pytest -m "$lane" -n "$workers" --dist worksteal "$@" || code=$?
    if [ "$code" -ne 5 ] && { [ "$result" -eq 5 ] || [ "$code" -ne 0 ]; }; then result=$code; fi
done
exit "$result"
