#!/usr/bin/env bash
# Prints a Markdown table of all benchmarks, for docs/benchmarks.md; about ten minutes when the
# machine does nothing else. Everything runs on the same two cores, with two threads.
#
#   bash tests/bench/run.sh > table.md
#
# BENCH_VENV is the virtual environment with TRL (default .venv-bench; made if it isn't there).
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/venv.sh
VENV=${BENCH_VENV:-$ROOT/.venv-bench}
use_venv bench
export OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 PYTHONPATH=$ROOT

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v taskset >/dev/null; then pin=(taskset --cpu-list "0,1"); else pin=(); fi

bench() {
  local program=$1
  shift
  "${pin[@]}" python "tests/bench/$program.py" "$@" 2>>"$folder/log" && return
  tail -n 30 "$folder/log" >&2
  return 1
}

bench table
bench model "$folder"
bench update "$folder"
bench update "$folder" --hidden 256 --layers 4 --repeat 3
bench rloo_step "$folder"
bench prime_step "$folder"
bench packing
bench bench_reshard
bench bench_scheduler
bench startup "$folder"
