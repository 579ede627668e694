"""Stand-ins for Slurm's commands, and a job's shell between them.

They write down what they were asked, in the folder FAKE, and answer as variables say: REFUSAL is
the preflight's exit code, SECOND that of a second look, CODE that of train, `wait` until a signal
comes.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm_plans import EXAMPLES, MODELS

NAME = next(iter(MODELS))
SRUN = """#!/usr/bin/env bash
case " $* " in *' megatron_prime preflight '*)
  printf '%s\\n' "$@" > "$FAKE/preflight"
  echo look >> "$FAKE/looks"
  if [ "$(wc -l < "$FAKE/looks")" -eq 2 ]; then REFUSAL=${SECOND:-$REFUSAL}; fi
  trap 'echo USR1 >> "$FAKE/signals"; exit "${LOOKED:-75}"' USR1
  if [ "$REFUSAL" = wait ]; then for _ in {1..1200}; do sleep 0.05; done; fi
  exit "$REFUSAL" ;;
esac
printf '%s\\n' "$@" > "$FAKE/srun"
printenv LOCAL_WORLD_SIZE PYTHONPATH MASTER_ADDR > "$FAKE/environment"
for argument; do case $argument in --output=*) logs=${argument#--output=} ;; esac; done
echo 'the last words of rank 0' > "${logs/\\%5t/00000}"
trap 'echo USR1 >> "$FAKE/signals"; exit "${DIES:-75}"' USR1
trap 'echo TERM >> "$FAKE/signals"; exit 137' TERM
touch "$FAKE/started"
if [ -n "${SAVES:-}" ]; then mkdir -p "$SAVES"; fi
if [ "$CODE" != wait ]; then exit "$CODE"; fi
for _ in {1..1200}; do sleep 0.05; done # a minute, should nobody signal
"""
SCONTROL = """#!/usr/bin/env bash
if [ -n "${BUSY:-}" ] && [ -e "$FAKE/srun" ]; then # the controller, from the ranks' end on
  echo "$1" >> "$FAKE/busy"
  if [ "$(wc -l < "$FAKE/busy")" -le "$BUSY" ]; then echo 'no contact' >&2; exit 1; fi
fi
case $* in
  'show hostnames gpu[1-8]') printf 'gpu%d\\n' {1..8}; exit ;;
  '-o show node gpu1') echo 'NodeName=gpu1 NodeAddr=10.0.0.1 Version=22.05'; exit ;;
  'show config') echo "SlurmdTimeout           = ${TIMEOUT:-300} sec"; exit ;;
  requeue*) echo "$*" >> "$FAKE/scontrol"; exit "${REQUEUES:-0}" ;;
esac
echo "$3" > "$FAKE/asked"
echo "JobId=$3 JobName=prime"
echo "   JobState=$STATE Reason=None Dependency=(null)"
echo "   Command=$SCRIPT --run.steps=10"
"""


SLEEP = """#!/usr/bin/env bash
if [ "$1" = 10 ]; then echo 10 >> "$FAKE/waited"; else exec /bin/sleep "$1"; fi
"""


@dataclass(frozen=True)
class Cluster:
    """One job's shell with stand-ins for Slurm's commands."""

    folder: Path
    environment: dict[str, str]

    def submit(self, name: str, **changes: str) -> subprocess.Popen[str]:
        script = EXAMPLES / name / "run.sbatch"
        spooled = self.folder / "slurm_script"  # Slurm runs a copy that has another name
        shutil.copy(script, spooled)
        return subprocess.Popen(
            ["bash", str(spooled), "--run.steps=10"],
            env={**self.environment, "SCRIPT": str(script), **changes},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str = NAME, **changes: str) -> tuple[int, str]:
        job = self.submit(name, **changes)
        output, _ = job.communicate(timeout=60)
        return job.returncode, output

    def said(self, file: str) -> list[str]:
        """Lines that a stand-in wrote."""
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []


def stand_ins(folder: Path) -> Path:
    """Where they are: first on a job's PATH."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": SLEEP}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return commands
