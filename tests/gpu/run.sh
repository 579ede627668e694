#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then what the scheduler's copies reach.
#
#   bash tests/gpu/run.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pytest -q -rs tests/gpu
PYTHONPATH=$PWD python tests/bench/bench_scheduler.py --hidden 2048 --layers 8
