#!/usr/bin/env bash
# Does a sweep do under Slurm what it does without? For a Debian machine and root: a Slurm of one node is set up in a
# temporary folder, runs the sweep by profiles/slurm, and loses one job in the middle of its training. The sweep has to end
# all the same, the job has to go on from its last state, and every result has to equal that of a local run.
#
#   benchmarks/slurm.sh [SWEEP] [LOCAL_OUTPUTS]      (sweeps/quick.yaml; where no outputs are given, they are made first)
#   STOP=kill benchmarks/slurm.sh ...                (kill -9 of the notebook's kernel in place of scancel)
#
# A sweep of minutes: python tests/reduced.py sweeps/quick.yaml /tmp/reduced > /tmp/reduced.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
sweep=${1:-sweeps/quick.yaml} local=${2:-} stop=${STOP:-scancel}
export PATH="$PWD/.venv/bin:$PATH"
cores=$(getconf _NPROCESSORS_ONLN) # nproc would obey OMP_NUM_THREADS

if ! { command -v slurmctld && command -v slurmd && command -v munged; } > /dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null
fi

# ---- Slurm --------------------------------------------------------------------------------------------------------

work=$(mktemp -d) daemons=() snakemake=
chmod 755 "$work" # munged wants to be reachable
finish() {
  code=$?
  set +e
  if kill -9 $snakemake 2> /dev/null; then # stopped half way: asked kindly, it would wait for its jobs
    scancel --user root
    while squeue --noheader --states=running,completing | grep -q .; do sleep 1; done
  fi
  for ((i = ${#daemons[@]} - 1; i >= 0; i--)); do kill "${daemons[i]}" && wait "${daemons[i]}"; done 2> /dev/null
  if [ $code = 0 ]; then rm -rf "$work"; else echo "failed: see $work" >&2; fi
  exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

mkdir "$work"/{state,spool,bin}
cat > "$work/slurm.conf" << END
ClusterName=check
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$work/munge.socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MinJobAge=86400
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$work/slurm.conf
# The steps that Snakemake starts inside a job forget SLURM_CONF: a cluster has its file in /etc/slurm.
printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v srun)" > "$work/bin/srun"
chmod +x "$work/bin/srun"

head -c 128 /dev/urandom > "$work/munge.key"
chmod 600 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" \
  --pid-file="$work/munge.pid" --seed-file="$work/munge.seed" --log-file="$work/munge.log" > "$work/munged.out" 2>&1 &
daemons+=($!)
until [ -S "$work/munge.socket" ]; do sleep 0.2; done
slurmctld -D > "$work/slurmctld.out" 2>&1 &
daemons+=($!)
slurmd -D > "$work/slurmd.out" 2>&1 &
daemons+=($!)
for ((i = 0; i < 60; i++)); do
  [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ] && break || sleep 1
done
sinfo --noheader --format="Slurm %v: node %n is %T, %c cores, %m MB" || sinfo

# ---- the same sweep twice -----------------------------------------------------------------------------------------

elapsed() { echo "$1: $(($(date +%s) - began)) s"; }
if [ -z "$local" ]; then
  local=$work/local began=$(date +%s)
  python tests/reduced.py --whole "$sweep" "$local" > "$work/local.yaml"
  snakemake --profile profiles/local --cores "$cores" --configfile "$work/local.yaml"
  elapsed "local sweep"
fi

out=$work/slurm began=$(date +%s)
python tests/reduced.py --whole "$sweep" "$out" > "$work/sweep.yaml"
PATH="$work/bin:$PATH" snakemake --profile profiles/slurm --configfile "$work/sweep.yaml" --quiet all \
  --slurm-status-command squeue --slurm-init-seconds-before-status-checks 3 &
snakemake=$!

# The first run that has saved a state and has epochs left loses its job.
epochs() { grep -oP '"(num_train_|finetune_)?epochs": \K\d+' "$1/params.json" || echo 0; }
trained() { cat "$1/metrics.jsonl" 2> /dev/null | wc -l; }
victim=
while [ -z "$victim" ]; do
  kill -0 $snakemake 2> /dev/null || { echo "the sweep ended before a job could be stopped" >&2 && exit 1; }
  sleep 0.2
  for state in "$out"/*/*/last/state-*.pt; do
    run=${state%/last/*}
    if [ -e "$state" ] && [ -e "$run/lock.pid" ] && [ "$(trained "$run")" -lt "$(epochs "$run")" ]; then victim=$run; fi
  done
done
name=${victim#"$out/"}
job=$(squeue --noheader --format="%i %k" | awk -v job="rule_notebook_wildcards_${name/\//_}" '$2 == job {print $1}')
echo "$stop of job $job, $name, after $(trained "$victim") of $(epochs "$victim") epochs"
if [ "$stop" = kill ]; then kill -9 "$(cat "$victim/lock.pid")"; else scancel "$job"; fi
wait $snakemake
snakemake=
elapsed "Slurm sweep"

squeue --noheader --states=all --format="%T" | sort | uniq -c
grep -q "(resumes)" "$victim/notebook.ipynb" || { echo "$name did not go on from its last state" >&2 && exit 1; }
echo "$name went on from its last state"
python benchmarks/same_results.py "$local" "$out"
