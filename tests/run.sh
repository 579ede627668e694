#!/usr/bin/env bash
# Sets up .venv and runs every check: lint, types, architecture, tests.
#
#   bash tests/run.sh            what CI runs
#   bash tests/run.sh --fast     lint, types and short unit tests (two minutes),
#                                without SGLang and Slurm
#   bash tests/run.sh --full     also what is marked slow: every model in every layout, more kills,
#                                the quickstart with three seeds
#   bash tests/run.sh -- ARGS    pytest with ARGS
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh
use_venv dev
if [ "${1:-}" != --fast ]; then use_sglang; use_slurm; fi

select=(-m "not slow")
case "${1:-}" in
  --fast) select=(-m "not slow and not long and not distributed and not sglang and not slurm") ;;
  --full) select=() ;;
  --) shift; exec python -m pytest "$@" ;;
  "") ;;
  *) echo "found $1, wanted --fast, --full or --" >&2; exit 2 ;;
esac

ruff check .
ruff format --check .
mypy
lint-imports
# Two processes, on which tests/conftest.py tells the tests where to stay together.
python -m pytest -n 2 --dist loadscope --no-loadscope-reorder --durations=25 "${select[@]}"
