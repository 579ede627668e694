#!/usr/bin/env bash
# The whole job on one machine, no GPU needed: data → SFT → PRIME → a Hugging Face model to ask.
#
#   bash examples/quickstart/run.sh [--engine sglang] [--seed N] [--out DIR] [--section.key=value …]
#
# --engine sglang samples with real SGLang servers, which it installs into a .venv-sglang (3 GB).
# Knobs go to the PRIME stage. The same command again continues an interrupted run; another seed or
# other knobs want another --out. DIR is relative to the root of the repository.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,8s/^# \{0,1\}//p' examples/quickstart/run.sh; }
seed=0 out='' engine=local knobs=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seed=${2:?--seed wants a number}; shift 2 ;;
    --engine) engine=${2:?--engine wants local or sglang}; shift 2 ;;
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --*.*=*) knobs+=("$1"); shift ;;
    --help | -h) usage; exit ;;
    *) echo "found $1" >&2; usage >&2; exit 2 ;;
  esac
done
case "$engine" in local | sglang) ;; *) echo "found --engine $engine, wanted local or sglang" >&2; exit 2 ;; esac
if [ -z "$out" ]; then
  out=runs/quickstart
  if [ "$engine" != local ]; then out=$out-$engine; fi
  if [ "$seed" != 0 ]; then out=$out-seed$seed; fi
fi

source tools/venv.sh
use_venv ''
if [ "$engine" = sglang ]; then
  use_sglang
  # Two servers of two ranks each, on the four ranks of the trainer.
  knobs=(--rollout.engine=sglang --rollout.sglang_python="$SGLANG_PYTHON"
    --rollout.tensor_parallel_size=2 ${knobs[@]+"${knobs[@]}"})
fi
# Ranks of one machine talk over loopback.
if [ -e /sys/class/net/lo ]; then export GLOO_SOCKET_IFNAME=lo; fi
ranks() { torchrun --standalone --nproc-per-node "$@"; }

if [ ! -e "$out/data/test.jsonl" ]; then
  python examples/quickstart/make_data.py --out "$out/data" --seed "$seed"
fi
if [ ! -e "$out/sft/hf/config.json" ]; then
  ranks 2 -m megatron_prime sft examples/quickstart/sft.toml --run.seed="$seed" \
    --run.folder="$out/sft" --model.hf="$out/data/model" --data.train="$out/data/train.jsonl" \
    --sft.data="$out/data/sft.jsonl" --sft.output="$out/sft/hf"
fi
ranks 4 -m megatron_prime train examples/quickstart/prime.toml --run.seed="$seed" \
  --run.folder="$out/prime" --model.hf="$out/sft/hf" --data.train="$out/data/train.jsonl" \
  --data.eval="$out/data/test.jsonl" ${knobs[@]+"${knobs[@]}"}
echo
echo "ask it:   .venv/bin/python examples/quickstart/ask.py $out/prime/hf '8+7+6+5+9='"
