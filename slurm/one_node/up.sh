#!/usr/bin/env bash
# A real Slurm on this one machine, for trying jobs and for the tests: munge, mariadb, slurmdbd, slurmctld, slurmd.
# Debian or Ubuntu, as root, without systemd; nothing of the machine's own Slurm is touched. A few seconds:
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server
#   slurm/one_node/up.sh /srv/slurm && export SLURM_CONF=/srv/slurm/etc/slurm.conf
#   sinfo
#   slurm/one_node/down.sh /srv/slurm
#
# usage: up.sh ROOT [--nodes N] [--cpus C] [--gpus G] [--kill-wait S] [--port P]
#   ROOT         folder for configuration, state and logs: an absolute path, short (its sockets may take 107
#                characters), readable by everybody; is made if missing
#   --nodes      virtual nodes on this machine (1)
#   --cpus       CPUs that each node says it has; two per core of yours are fine (number of cores)
#   --gpus       fake GPUs of each node: CUDA_VISIBLE_DEVICES is set, nothing is behind it (0)
#   --kill-wait  seconds between SIGTERM and SIGKILL (30, Slurm's default)
#   --port       first of the N + 3 ports on 127.0.0.1 that are used (16817)
#
# Partitions: `main`, whose jobs `high` sends back to the queue (SIGTERM, ten seconds later SIGKILL).
# Given again while the cluster runs, it only says so. down.sh ROOT stops it; its jobs and accounts stay in ROOT.
set -euo pipefail

die() { printf 'up.sh: %s\n' "$*" >&2; exit 1; }
usage() { die "usage: up.sh ROOT [--nodes N] [--cpus C] [--gpus G] [--kill-wait S] [--port P]"; }

# ---- what was asked for -----------------------------------------------------------------------------------------------
[[ $# -ge 1 && $1 != -* ]] || usage
root=${1%/}; shift
nodes=1 cpus=$(nproc) gpus=0 kill_wait=30 port=16817
while (($#)); do
  [[ $# -ge 2 && $2 =~ ^[0-9]{1,5}$ ]] || usage
  case $1 in
    --nodes) nodes=$2 ;; --cpus) cpus=$2 ;; --gpus) gpus=$2 ;; --kill-wait) kill_wait=$2 ;; --port) port=$2 ;;
    *) usage ;;
  esac
  shift 2
done
((nodes >= 1 && cpus >= 1)) || die "a cluster needs at least one node and one CPU"

# ---- can it be done here? ---------------------------------------------------------------------------------------------
[[ $(id -u) == 0 ]] || die "only root can start a cluster: the daemons run as the users root, munge and mysql"
missing=()
for program in munged munge slurmctld slurmd slurmdbd sbatch sacctmgr mariadbd mariadb mariadb-install-db setsid runuser; do
  command -v "$program" > /dev/null || missing+=("$program")
done
((${#missing[@]} == 0)) || die "missing: ${missing[*]}; on Debian: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server"
[[ $root == /* && $root != *[[:space:]]* ]] || die "ROOT must be an absolute path without spaces, not '$root'"
((${#root} <= 80)) || die "ROOT is ${#root} characters long: sockets need a path of at most 80"

running() { [[ -s $1 ]] && [[ -r /proc/$(< "$1")/stat ]] && [[ $(cut -d' ' -f3 "/proc/$(< "$1")/stat" 2> /dev/null) != Z ]]; }
export SLURM_CONF=$root/etc/slurm.conf
started=()
for pid_file in "$root"/{munge/munged,db/mariadbd,slurmdbd,slurmctld}.pid; do
  if running "$pid_file"; then started+=("$pid_file"); fi
done
if ((${#started[@]} == 4)) && sinfo > /dev/null 2>&1; then
  printf 'up.sh: runs already\nexport SLURM_CONF=%s\n' "$SLURM_CONF"
  exit 0
fi
((${#started[@]} == 0)) || die "half of a cluster runs in $root: stop it first with $(dirname "$0")/down.sh $root"

mkdir -p "$root" || die "ROOT cannot be made: name another folder"
for user in munge mysql; do
  runuser -u "$user" -- test -x "$root" -a -r "$root" \
    || die "user $user cannot read $root: chmod a+rx it and the folders above it, or name another (homes and pytest's are closed)"
done
ports=$((nodes + 3))
for ((i = 0; i < ports; i++)); do
  # a connection that is accepted means that somebody listens there
  if (exec 3<> "/dev/tcp/127.0.0.1/$((port + i))") 2> /dev/null; then
    die "port $((port + i)) is in use (another cluster?): stop that, or say --port with the first of $ports free ports"
  fi
done

# ---- start ------------------------------------------------------------------------------------------------------------
wait_for() { # SECONDS WHAT COMMAND...: until the command succeeds
  local tenths=$(($1 * 10)) what=$2; shift 2
  for ((i = 0; i < tenths; i++)); do "$@" > /dev/null 2>&1 && return 0; sleep 0.1; done
  tail -n 5 "$root"/log/*.log >&2 || true
  "$(dirname "$0")/down.sh" "$root" || true
  die "$what did not start (last lines of its log above, all in $root/log)"
}
host=$(hostname -s) last=$((nodes - 1))
if ((nodes == 1)); then names=$host; else names="n[0-$last]"; fi
database_port=$port slurmdbd_port=$((port + 1)) slurmctld_port=$((port + 2)) slurmd_port=$((port + 3))
mkdir -p "$root"/{etc,state,log,dev,munge,db}

# Jobs find each other by node name; down.sh takes these lines out again.
mapfile -t each < <(if ((nodes == 1)); then echo "$host"; else seq -f 'n%.0f' 0 $last; fi)
for name in "${each[@]}"; do
  mkdir -p "$root/spool-$name"
  getent hosts "$name" > /dev/null || printf '127.0.0.1 %s # %s\n' "$name" "$root" >> /etc/hosts
done

chown munge:munge "$root/munge"
chmod 755 "$root/munge"
[[ -s $root/munge/key ]] || (umask 077 && head -c 128 /dev/urandom > "$root/munge/key" && chown munge:munge "$root/munge/key")
runuser -u munge -- "$(command -v munged)" --force --key-file="$root/munge/key" --socket="$root/munge/s" \
  --pid-file="$root/munge/munged.pid" --log-file="$root/munge/munged.log" --seed-file="$root/munge/seed" > "$root/log/munge.log" 2>&1
wait_for 5 munge sh -c "munge -S '$root/munge/s' -n | unmunge -S '$root/munge/s'"

if [[ ! -d $root/db/mysql ]]; then
  chown -R mysql:mysql "$root/db"
  mariadb-install-db --no-defaults --user=mysql --datadir="$root/db" --auth-root-authentication-method=normal --skip-test-db \
    > "$root/log/mariadb_install.log" 2>&1 || die "the database cannot be made: see $root/log/mariadb_install.log"
fi
setsid mariadbd --no-defaults --user=mysql --datadir="$root/db" --socket="$root/db/s" --pid-file="$root/db/mariadbd.pid" \
  --bind-address=127.0.0.1 --port=$database_port --innodb-buffer-pool-size=128M --innodb-log-file-size=64M \
  --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 > "$root/log/mariadb.log" 2>&1 < /dev/null &
sql() { mariadb --no-defaults -uroot -S "$root/db/s" -e "$1"; }
wait_for 30 mariadb sql 'select 1'
sql "create database if not exists slurm_acct;
     create user if not exists slurm@'127.0.0.1' identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1';
     create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct.* to slurm@localhost;"

cat > "$root/etc/slurmdbd.conf" << END
AuthType=auth/munge
AuthInfo=$root/munge/s
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$slurmdbd_port
SlurmUser=root
PidFile=$root/slurmdbd.pid
LogFile=$root/log/slurmdbd.log
CommitDelay=1
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
END
chmod 600 "$root/etc/slurmdbd.conf"

gres=
if ((gpus)); then
  gres="Gres=gpu:fake:$gpus"
  for ((i = 0; i < gpus; i++)); do
    [[ -e $root/dev/gpu$i ]] || mknod "$root/dev/gpu$i" c 195 $((200 + i)) # only looked at, never opened
  done
  printf 'AutoDetect=off\nNodeName=%s Name=gpu Type=fake File=%s/dev/gpu[0-%d]\n' "$names" "$root" $((gpus - 1)) > "$root/etc/gres.conf"
else
  echo 'AutoDetect=off' > "$root/etc/gres.conf"
fi
echo 'CgroupPlugin=cgroup/v1' > "$root/etc/cgroup.conf"
# cred_expire: a job that was requeued may start again only then (two minutes by default)
cat > "$root/etc/slurm.conf" << END
ClusterName=one_node
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$root/munge/s,cred_expire=5
CredType=cred/munge
SlurmctldPort=$slurmctld_port
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool-%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd-%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$slurmdbd_port
AccountingStoragePass=$root/munge/s
AccountingStorageTRES=gres/gpu
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=$kill_wait
OverTimeLimit=0
MinJobAge=600
ReturnToService=2
InactiveLimit=0
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=$names NodeHostname=$host NodeAddr=127.0.0.1 Port=$(if ((nodes == 1)); then echo $slurmd_port; else echo "[$slurmd_port-$((slurmd_port + last))]"; fi) CPUs=$cpus Sockets=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=8000 $gres State=UNKNOWN
PartitionName=main Nodes=$names Default=YES MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=$names MaxTime=60 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
END

slurmdbd
wait_for 30 slurmdbd sacctmgr -n show cluster
sacctmgr -n show cluster format=cluster | grep -qw one_node || sacctmgr -i -Q add cluster one_node > /dev/null
slurmctld
wait_for 15 slurmctld scontrol ping
for name in "${each[@]}"; do slurmd -N "$name"; done
idle() { [[ $(sinfo -h -N -p main -o %t | grep -cx idle) == "$nodes" ]]; }
wait_for 20 slurmd idle
printf 'export SLURM_CONF=%s\n' "$SLURM_CONF"
