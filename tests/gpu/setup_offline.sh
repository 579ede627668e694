#!/usr/bin/env bash
# Sets up a machine without a network for tests/gpu/run.sh, from bundles of pack_offline.sh.
#
#   bash tests/gpu/setup_offline.sh [--only-store] [--store DIR] [--site DIR] [BUNDLE …]
#   . DIR/env && bash tests/gpu/run.sh --short          # DIR: --site
#
# BUNDLEs are copied to the store (~/.cache/megatron_prime/wheels), where parts are joined as soon as
# all are there. --only-store ends then: bundles may come one by one. Otherwise everything in the
# store is installed into --site (~/.cache/megatron_prime/site), beside the packages that PYTHON
# (python3) has: torch only if it lacks one, Transformer Engine's PyTorch extension compiled against
# the torch at hand (its wheel stays in STORE/built, for the next machine), SGLang in a folder of its
# own with an interpreter sglang-python, for it pins other versions. Again, it does what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() { sed -n '2,13s/^# \{0,1\}//p' tests/gpu/setup_offline.sh; }
base=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_prime
store=$base/wheels site=$base/site only_store='' bundles=()
while [ $# -gt 0 ]; do
  case "$1" in
    --only-store) only_store=yes; shift ;;
    --store) store=${2:?--store wants a folder}; shift 2 ;;
    --site) site=${2:?--site wants a folder}; shift 2 ;;
    --help | -h) usage; exit ;;
    -*) echo "found $1" >&2; usage >&2; exit 2 ;;
    *) bundles+=("$1"); shift ;;
  esac
done
PYTHON=${PYTHON:-python3}
lists=tests/gpu/offline
mkdir -p "$store/built"

for folder in ${bundles[@]+"${bundles[@]}"}; do
  if [ ! -d "$folder" ]; then echo "no bundle $folder" >&2; exit 2; fi
  for file in "$folder"/*; do
    name=$(basename "$file")
    if [ -e "$store/${name%.part[0-9][0-9][0-9]}" ]; then continue; fi # whole already
    cp "$file" "$store/.$name.new"
    mv "$store/.$name.new" "$store/$name"
  done
done

# A wheel or source package whose parts are all there; a sum that differs ends the script.
waits=''
for sum in "$store"/*.sha256; do
  if [ ! -e "$sum" ]; then continue; fi
  name=$(basename "$sum" .sha256)
  if [ -e "$store/$name" ]; then continue; fi
  read -r count wanted <"$sum"
  parts=("$store/$name".part[0-9][0-9][0-9])
  if [ ! -e "${parts[0]}" ] || [ "${#parts[@]}" -lt "$count" ]; then
    waits+=" $name"
    continue
  fi
  cat "${parts[@]}" >"$store/.$name.new"
  found=$(sha256sum <"$store/.$name.new" | cut -d ' ' -f 1)
  if [ "$found" != "$wanted" ]; then
    rm -f "$store/.$name.new" "${parts[@]}"
    echo "$name: found sum $found, wanted $wanted; its parts were removed, bring them again" >&2
    exit 1
  fi
  mv "$store/.$name.new" "$store/$name"
  rm "${parts[@]}"
done
if [ -n "$waits" ]; then echo "parts are missing of:$waits"; fi
if [ -n "$only_store" ]; then exit; fi

pip() { "$PYTHON" -m pip "$@"; }
into() { # FOLDER PACKAGE …: exactly these, once
  local target=$1 stamp
  shift
  if [ $# = 0 ]; then return; fi
  stamp=$target/.installed-$(printf '%s\n' "$@" | sha256sum | cut -c 1-16)
  if [ -e "$stamp" ]; then return; fi
  mkdir -p "$target"
  pip install --quiet --no-index --no-deps --no-build-isolation --no-cache-dir --upgrade \
    --root-user-action=ignore --find-links "$store" --find-links "$store/built" --target "$target" "$@"
  touch "$stamp"
}
# Those of a list whose file is in the store; the names of files may spell -, _ and . as another.
stored() {
  local line name
  while read -r line; do
    case "$line" in '#'* | '') continue ;; esac
    name=${line%%==*}
    name=${name//[-_.]/[-_.]}
    if [ -n "$(find "$store" "$store/built" -maxdepth 1 -iname "$name-${line##*==}[-.]*" \
      \( -name '*.whl' -o -name '*.tar.gz' \) -print -quit)" ]; then echo "$line"; fi
  done <"$1"
}

train=$site/train sglang=$site/sglang
if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
  if ! ls "$store"/torch-*.whl >/dev/null 2>&1; then
    echo "$PYTHON has no torch and the store has none; pack it with TORCH=torch==2.11.0" >&2
    exit 1
  fi
  into "$train" torch
fi
export PYTHONPATH=$train${PYTHONPATH:+:$PYTHONPATH}
mapfile -t wanted < <(stored "$lists/train.txt")
into "$train" ${wanted[@]+"${wanted[@]}"}
mapfile -t sources < <(stored "$lists/sources.txt")

# Headers of the CUDA libraries that came as wheels: cuDNN's and NCCL's are not in the toolkit.
cuda_headers() {
  "$PYTHON" - <<'PY'
import sys
from pathlib import Path

print(":".join(sorted(str(p) for place in sys.path for p in Path(place).glob("nvidia/*/include"))))
PY
}
for source in ${sources[@]+"${sources[@]}"}; do
  if [ "${source%%==*}" = transformer_engine_torch ]; then
    if ! ls "$store"/built/transformer_engine_torch-*.whl >/dev/null 2>&1; then
      # Never look for a wheel on the web; the expert-parallel kernels want NCCL's newest headers.
      NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 \
        NVTE_NO_LOCAL_VERSION=1 NVTE_CUDA_ARCHS=90 MAX_JOBS=$(nproc) CPLUS_INCLUDE_PATH=$(cuda_headers) \
        pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir "$store/built" \
        "$store"/transformer_engine_torch-*.tar.gz
    fi
  fi
  into "$train" "$source"
done

mapfile -t wanted < <(stored "$lists/sglang.txt")
into "$sglang" ${wanted[@]+"${wanted[@]}"}
mkdir -p "$site/bin"
cat >"$site/bin/sglang-python" <<SH
#!/usr/bin/env bash
# $PYTHON with SGLang's packages before its own; made by tests/gpu/setup_offline.sh
export PYTHONPATH=\${PYTHONPATH:+\$PYTHONPATH:}$sglang
exec "$(command -v "$PYTHON")" "\$@"
SH
chmod +x "$site/bin/sglang-python"
{
  echo "export PYTHON=$(command -v "$PYTHON")"
  echo "export PYTHONPATH=$train\${PYTHONPATH:+:\$PYTHONPATH}"
  if [ -d "$sglang/sglang" ]; then echo "export SGLANG_PYTHON=$site/bin/sglang-python"; fi
} >"$site/env"

# What can be imported now; a package that can't is told and is nobody's end.
look() {
  local said
  said=$(PYTHONPATH=$2 "$PYTHON" -c "import $1 as it; print(getattr(it, '__version__', 'imported'))" 2>&1) ||
    said="not importable: ${said##*$'\n'}"
  echo "$1: ${said##*$'\n'}"
}
for name in torch megatron.core transformer_engine.pytorch; do look "$name" "$PYTHONPATH"; done
for name in sgl_kernel sglang; do look "$name" "$sglang"; done
echo "ready: . $site/env && bash tests/gpu/run.sh --short"
