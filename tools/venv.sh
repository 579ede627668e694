# shellcheck shell=bash
# Sourced by run scripts; use_venv makes .venv with the package, or reuses it, and puts it on PATH.
#
#   source tools/venv.sh
#   use_venv          # the plain CPU install
#   use_venv dev      # with an extra of setup.py
#   use_sglang        # after that: .venv-sglang, SGLang for a CPU; exports SGLANG_PYTHON
#   use_slurm         # Slurm and shellcheck from apt, where that may be used
#
# PYTHON chooses the interpreter (3.11 or 3.12), TORCH the torch to install first (torch==2.13.0).
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
TORCH=${TORCH:-torch==2.13.0}

find_python() {
  for candidate in "${PYTHON:-python3}" python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "megatron_prime needs Python 3.11 or 3.12; set PYTHON to one" >&2
  return 1
}

# pip knows where this machine keeps its wheels; uv has to be told, with commas between places.
pip_setting() { "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null | tr -s ' \n' ',' || true; }

uv_install() {
  local links=${PIP_FIND_LINKS:-$(pip_setting find-links)} index=${PIP_INDEX_URL:-$(pip_setting index-url)}
  links=${links//[[:space:]]/,} index=${index%,}
  local backend=()
  # Without an NVIDIA driver take the CPU build of torch, unless the machine brings wheels of its own.
  if [ -z "$links" ] && ! command -v nvidia-smi >/dev/null; then backend=(--torch-backend cpu); fi
  UV_FIND_LINKS=${links%,} UV_DEFAULT_INDEX=$index UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy \
    "$VENV/bin/python" -m uv pip install --quiet --python "$TARGET/bin/python" ${backend[@]+"${backend[@]}"} "$@"
}

# Into the environment TARGET, with the tools of .venv.
install() {
  if "$VENV/bin/python" -m uv --version >/dev/null 2>&1; then
    uv_install "$@" && return
    echo "uv could not install $*; trying pip" >&2
  fi
  "$VENV/bin/python" -m pip --python "$TARGET/bin/python" install --quiet "$@"
}

make_venv() {
  local extra=$1 wanted stamp TARGET=$VENV
  wanted=$(cat "$ROOT/setup.py"; echo "$TORCH")
  for stamp in "$extra" ${extra:-dev}; do # dev has all that the plain install has
    if [ "$(cat "$VENV/.installed-$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
  done
  echo "setting up $VENV (once) …" >&2
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$(find_python)" -m venv --clear "$VENV"
  "$VENV/bin/python" -m pip install --quiet uv 2>/dev/null || echo "no uv here; pip takes longer" >&2
  # Torch by itself first: asked for by other packages, a newer build may win.
  install "$TORCH"
  install --editable "$ROOT${extra:+[$extra]}"
  echo "$wanted" >"$VENV/.installed-$extra"
}

use_venv() {
  make_venv "${1:-}"
  export PATH=$VENV/bin:$PATH OMP_NUM_THREADS=1
}

# SGLang's own wheel asks for a CUDA build of torch and for kernels that have none for CPUs. So its
# list of dependencies is ours, tools/sglang_cpu.txt, and none of them brings others along.
make_sglang() {
  local wanted TARGET=$ROOT/.venv-sglang
  wanted=$(cat "$ROOT/tools/sglang_cpu.txt")
  if [ "$(cat "$TARGET/.installed" 2>/dev/null)" = "$wanted" ]; then return; fi
  echo "setting up $TARGET (once) …" >&2
  "$(find_python)" -m venv --clear --without-pip "$TARGET"
  install torch==2.13.0
  install --no-deps --requirement "$ROOT/tools/sglang_cpu.txt"
  echo "$wanted" >"$TARGET/.installed"
}

use_sglang() {
  make_sglang
  export SGLANG_PYTHON=$ROOT/.venv-sglang/bin/python
}

# For tests/slurm, which otherwise skip and say why. Installs for the whole machine: only as root.
use_slurm() {
  local program lacking=''
  for program in slurmctld slurmd sbatch munged shellcheck; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || lacking+=" $program"
  done
  if [ -z "$lacking" ]; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
  echo "installing Slurm and shellcheck (once) …" >&2
  local said
  # A list that can't be brought up to date may still do.
  said=$({
    apt_get update || true
    apt_get install -y --no-install-recommends slurmctld slurmd slurm-client munge shellcheck
  } </dev/null 2>&1) || echo "apt could not install$lacking: ${said##*$'\n'}; some tests will skip" >&2
}

# Asks nobody anything, and waits neither for a mirror nor for another apt for ever.
apt_get() {
  DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 \
    -o Acquire::Retries=1 -o DPkg::Lock::Timeout=120 "$@"
}
