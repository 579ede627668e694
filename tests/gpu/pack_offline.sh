#!/usr/bin/env bash
# Downloads what setup_offline.sh installs, for a machine without a network, cut into bundles.
#
#   bash tests/gpu/pack_offline.sh [--out DIR] [--mib N] [--part train|sglang|all]
#
# DIR (runs/offline) gets bundles 1, 2, 3, … of at most N MiB (60) each: folders of wheels, of parts
# of wheels (NAME.part000, …) and of NAME.sha256 with the number of parts and the whole's sum. Take
# the bundles there in any order, `setup_offline.sh --only-store` each, then setup_offline.sh.
# For Python 3.12 on x86-64; TORCH=torch==2.11.0 packs torch, too. Run again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,10s/^# \{0,1\}//p' tests/gpu/pack_offline.sh; }
out=runs/offline mib=60 part=all
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --mib) mib=${2:?--mib wants a number}; shift 2 ;;
    --part) part=${2:?--part wants train, sglang or all}; shift 2 ;;
    --help | -h) usage; exit ;;
    *) echo "found $1" >&2; usage >&2; exit 2 ;;
  esac
done
case "$part" in train | sglang | all) ;; *) echo "found --part $part, wanted train, sglang or all" >&2; exit 2 ;; esac
PYTHON=${PYTHON:-python3}
lists=tests/gpu/offline
mkdir -p "$out/whole" "$out/trimmed"

platforms=()
for n in 5 12 17 24 27 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
for name in manylinux1 manylinux2010 manylinux2014; do platforms+=(--platform "${name}_x86_64"); done
fetch() {
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest "$out/whole" "$@"
}

# A source package's metadata can only be asked of its own setup.py, and Transformer Engine's asks
# torch for its CUDA version, which a CPU build has none of: so it is told the one to build for.
fetch_sources() {
  local told
  told=$(mktemp -d)
  printf 'import torch\n\ntorch.version.cuda = torch.version.cuda or "13.0"\n' >"$told/sitecustomize.py"
  PYTHONPATH=$told "$PYTHON" -m pip download --quiet --no-deps --no-binary=:all: \
    --no-build-isolation --dest "$out/whole" --requirement "$lists/sources.txt"
  rm -r "$told"
}

if [ "$part" != sglang ]; then
  fetch --requirement "$lists/train.txt"
  fetch_sources
  if [ -n "${TORCH:-}" ]; then fetch "$TORCH"; fi
fi
if [ "$part" != train ]; then fetch --requirement "$lists/sglang.txt"; fi

for wheel in "$out"/whole/sglang_kernel-*.whl; do
  if [ ! -e "$wheel" ]; then continue; fi
  "$PYTHON" tests/gpu/trim_wheel.py "$wheel" --out "$out/trimmed"
done

# Bundles: one file after the other; what does not fit into the rest of one begins the next. Parts
# are a quarter of a bundle, so that little is left empty.
rm -rf "$out"/[0-9]*
bundle=1 filled=0
limit=$((mib * 1024 * 1024))
mkdir -p "$out/$bundle"
put() {
  local size
  size=$(stat -c %s "$1")
  if [ $((filled + size)) -gt "$limit" ] && [ "$filled" -gt 0 ]; then
    bundle=$((bundle + 1)) filled=0
    mkdir -p "$out/$bundle"
  fi
  mv "$1" "$out/$bundle/$2"
  filled=$((filled + size))
}
pieces=$(mktemp -d "$out/pieces.XXXX")
for file in "$out"/whole/*; do
  name=$(basename "$file")
  if [ -e "$out/trimmed/$name" ]; then file=$out/trimmed/$name; fi
  split --bytes="$((limit / 4))" --numeric-suffixes --suffix-length=3 "$file" "$pieces/$name.part"
  parts=("$pieces/$name".part*)
  echo "${#parts[@]} $(sha256sum <"$file" | cut -d ' ' -f 1)" >"$pieces/$name.sha256"
  for one in "${parts[@]}"; do put "$one" "$(basename "$one")"; done
  put "$pieces/$name.sha256" "$name.sha256"
done
rmdir "$pieces"
du -sh "$out"/[0-9]*
