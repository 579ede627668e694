#!/usr/bin/env bash
# The whole job on one machine, no GPU needed: data → SFT → PRIME → a Hugging Face model to ask.
#
#   bash examples/quickstart/run.sh [--seed N] [--out DIR] [--section.key=value …]
#
# Knobs go to the PRIME stage. The same command again continues an interrupted run.
set -euo pipefail
cd "$(dirname "$0")/../.."
source tools/venv.sh
use_venv

seed=0 out=runs/quickstart knobs=()
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seed=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --*.*=*) knobs+=("$1"); shift ;;
    *) echo "found $1, wanted --seed N, --out DIR or --section.key=value" >&2; exit 2 ;;
  esac
done
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
  --run.folder="$out/prime" --model.hf="$out/sft/hf" \
  --data.train="$out/data/train.jsonl" --data.eval="$out/data/test.jsonl" "${knobs[@]}"
echo
echo "ask it:   .venv/bin/python examples/quickstart/ask.py $out/prime/hf '8+7+6+5+9='"
