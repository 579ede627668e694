#!/usr/bin/env bash
# Everything that needs a GPU, in six stages: models fp8 engine colocation speed learning.
#
#   bash tests/gpu/run.sh [--stage NAME …] [--short] [--seconds N] [--out DIR] [--keep]
#   bash tests/gpu/run.sh --small        the same code with tiny shapes, on a CPU, too
#
# A line per check, a table at the end; DIR (runs/gpu) gets JSON, logs and the table. --short takes
# under eight minutes on one Hopper GPU. PYTHON is the interpreter (python3); SGLANG_PYTHON the one
# that has SGLang, if that is another. On a machine without a network: setup_offline.sh first.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" tests/gpu/run_stages.py "$@"
