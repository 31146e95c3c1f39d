#!/usr/bin/env bash
# Stops the cluster that up.sh started in ROOT, its jobs first; touches no other process. ROOT itself stays.
# usage: down.sh ROOT
set -uo pipefail
[[ $# == 1 && $1 == /* ]] || { echo "down.sh: usage: down.sh ROOT, with the ROOT that up.sh was given" >&2; exit 1; }
root=${1%/}
[[ -d $root/etc ]] || { echo "down.sh: there is no cluster in $root" >&2; exit 1; }
export SLURM_CONF=$root/etc/slurm.conf

alive() { # where nobody waits for ended processes they stay as zombies: those count as gone
  local state
  state=$(cut -d' ' -f3 "/proc/$1/stat" 2> /dev/null) && [[ $state != Z ]]
}
stop() { # PID_FILE: asks, waits for 15 seconds, then ends it
  local pid
  [[ -s $1 ]] && pid=$(< "$1") && alive "$pid" && [[ $(tr '\0' ' ' < "/proc/$pid/cmdline") =~ munged|mariadbd|slurm ]] || return 0
  kill "$pid"
  for _ in {1..150}; do alive "$pid" || return 0; sleep 0.1; done
  echo "down.sh: process $pid ($1) did not stop within 15 s and is killed" >&2
  kill -9 "$pid"
}

if [[ -s $root/slurmctld.pid ]] && alive "$(< "$root/slurmctld.pid")"; then
  timeout 10 scancel --quiet --full --signal=KILL --state=RUNNING --user=root 2> /dev/null
  timeout 10 scancel --quiet --user=root 2> /dev/null
  for _ in {1..50}; do [[ -z $(timeout 10 squeue -h 2> /dev/null) ]] && break; sleep 0.1; done
fi
for pid_file in "$root"/slurmd-*.pid "$root"/slurmctld.pid "$root"/slurmdbd.pid "$root"/db/mariadbd.pid "$root"/munge/munged.pid; do
  stop "$pid_file"
done
if grep -q " # $root\$" /etc/hosts; then # in place: inside a container the file itself cannot be replaced
  hosts=$(grep -v " # $root\$" /etc/hosts) && printf '%s\n' "$hosts" > /etc/hosts
fi
