# shellcheck shell=bash
# What all run.sbatch files do: look at the nodes, start a rank per GPU, pass signals on, requeue
# what was saved.
#
# Sourced, because Slurm runs a copy of run.sbatch out of its spool folder. Wants FOLDER (of
# prime.toml), MODEL, TRAIN, EVAL (may be empty), RUN, PYTHON and the array CONTAINER (options of
# srun, may be empty). PREFLIGHT=no starts without a look at the nodes; anything else in it are
# options of it (--seconds 120, --warn-only). Arguments of `sbatch run.sbatch --section.key=value …` go to the run.

say() { echo "[prime] $(date '+%F %T') $*"; }

# Signals that Slurm sends to this shell go to srun as USR1, which it passes to all ranks. Of TERM it
# would kill them at once.
srun_pid='' asked='' interrupted=''
# shellcheck disable=SC2317 # reached, by the traps
pass_on() {
  asked=yes interrupted=yes
  say "$1: ranks finish their step and save it"
  if [ -n "$srun_pid" ]; then kill -s USR1 "$srun_pid" 2>/dev/null || true; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

knobs=(--model.hf="$MODEL" --data.train="$TRAIN")
if [ -n "$EVAL" ]; then knobs+=(--data.eval="$EVAL"); fi
job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # sbatch --array=0-2: a run per seed
  RUN=$RUN/seed_$SLURM_ARRAY_TASK_ID
  knobs+=(--run.seed="$SLURM_ARRAY_TASK_ID")
  # The last task of an array has the array's own number: as a job that means all of its tasks.
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
knobs+=(--run.folder="$RUN" "$@")
logs=$RUN/logs/$SLURM_JOB_ID
mkdir -p "$logs"
ln -sfn "$SLURM_JOB_ID" "$RUN/logs/latest"

repository=$(cd "$FOLDER/../.." && pwd)
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron: exchanges begin in the order they were issued
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Some containers' hooks set torchrun's variables for srun's tasks, but not this one.
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
# Where ranks meet: the first node, by the address that Slurm itself uses; its name may mean nothing
# to the others.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || address=''
export MASTER_ADDR=${MASTER_ADDR:-${address:-$first}}

newest() { printf '%s\n' "$RUN"/checkpoints/step_* | tail -n 1; }
before=$(newest)

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST," \
  "requeued ${SLURM_RESTART_COUNT:-0} times; rank 0: tail -F $logs/rank_00000.txt"

# A task on every device, until all have ended; `code`: the highest of theirs.
#
# Ranks end each other when one is lost. --kill-on-bad-exit would kill, on the first 75, the ranks
# that are about to say 75, and srun would return 143.
on_all_ranks() {
  code=75
  if [ -n "$asked" ]; then return; fi # before there was anything to save
  srun --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    ${CONTAINER[@]+"${CONTAINER[@]}"} "$@" &
  srun_pid=$!
  if [ -n "$asked" ]; then kill -s USR1 "$srun_pid" 2>/dev/null || true; fi
  while :; do # a signal ends `wait`, not srun
    interrupted='' code=0
    wait "$srun_pid" || code=$?
    if [ -z "$interrupted" ]; then break; fi
  done
  srun_pid=''
  # So young a rank that it does not listen to signals yet dies of them.
  if [ -n "$asked" ]; then case $code in 138 | 143) code=75 ;; esac; fi
}

code=0
if [ "${PREFLIGHT:-}" != no ]; then # at every start: a requeued job has other nodes
  read -ra options <<<"${PREFLIGHT:-}"
  # Who is late is looked at once more: the first look has read Python into the nodes' memory.
  # 128 and above: a rank was killed, most often by --wait, for it began so late.
  for look in 1 2; do
    # All end within a second or two of each other, but for one whose file system hangs.
    on_all_ranks --wait=30 "$PYTHON" -m megatron_prime preflight "$FOLDER/prime.toml" \
      ${options[@]+"${options[@]}"} "${knobs[@]}"
    if [ "$code" -ne 77 ] && [ "$code" -lt 128 ]; then break; fi
    if [ "$look" -eq 1 ]; then say "exit code $code: not all answered in time; a second look"; fi
  done
  # Not all lived to hear it, or came, but that was the verdict.
  if [ "$code" -eq 77 ] || [ "$code" -ge 128 ]; then code=78; fi
fi
if [ "$code" -eq 0 ]; then
  # --wait ends what is left after a while: longer than Slurm's SlurmdTimeout (300 s unless the site
  # says otherwise), so that it misses a lost node and requeues the job.
  timeout=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9][0-9]*\) sec.*/\1/p') || timeout=''
  if [ "${timeout:-0}" -lt 300 ]; then timeout=300; fi
  on_all_ranks --wait="$((timeout + 100))" --output="$logs/rank_%5t.txt" --open-mode=append \
    "$PYTHON" -m megatron_prime train "$FOLDER/prime.toml" "${knobs[@]}"
  if [ "$code" -ne 0 ]; then
    lines=20
    if [ "$code" -eq 75 ]; then lines=1; fi
    tail -n "$lines" "$logs/rank_00000.txt" 2>/dev/null || true
    # What another rank said of itself, which rank 0 may not have heard.
    grep -hE '^\[rank [1-9]' "$logs"/rank_*.txt 2>/dev/null | grep -v ' ended because ' | tail -n 5 || true
  fi
fi
trap : USR1 TERM # nobody is left to pass them on to

case $code in
  0) meaning='done' ;;
  2) meaning='bad configuration: mend it, submit again' ;;
  69) meaning='a rank was lost, which the line above names: submit again' ;;
  70) meaning="a phase did not end: look at $RUN/stuck, submit again" ;;
  75) meaning='asked to end; what there was to save is saved' ;;
  78) meaning='refused for the reasons above: mend them, or sbatch --exclude=NODE …; PREFLIGHT=no starts anyway' ;;
  137) meaning='killed, most often out of memory: submit again' ;;
  *) meaning="see above, $logs and docs/operations.md" ;;
esac
say "exit code $code: $meaning"

# The controller may be busy or restart just now, so it is asked more than once.
requeue() {
  local tries=0 state
  while [ $((tries += 1)) -le 6 ]; do
    state=$(scontrol show job "$job" | sed -n 's/^ *JobState=\([A-Z_]*\).*/\1/p') || state=''
    case $state in
      RUNNING)
        say requeue
        if scontrol requeue "$job"; then return; fi
        ;;
      ?*) # cancelled, at its limit, or Slurm itself requeues it
        say "the job is $state: not requeued; the same sbatch command continues the run"
        return
        ;;
    esac
    sleep 10
  done
  say "could not requeue: the same sbatch command continues the run"
}

if [ "$code" -eq 75 ]; then
  # A time limit that is too short for a first step would requeue for ever.
  vain=0
  if [ "$(newest)" = "$before" ]; then
    date >>"$logs/saved_nothing"
    vain=$(wc -l <"$logs/saved_nothing")
  else
    rm -f "$logs/saved_nothing"
  fi
  if [ "$vain" -ge 5 ]; then
    say "$vain starts in a row have saved nothing: not requeued; is the time limit too short?"
  else
    requeue
  fi
fi
exit "$code"
