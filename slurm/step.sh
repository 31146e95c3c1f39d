# For batch scripts, to be sourced: `step [SRUN_OPTIONS] COMMAND` is srun that survives being asked to stop.
#
# The signal of `#SBATCH --signal`, `scancel --signal` and the SIGTERM that announces a preemption go to job steps, that
# is to what srun started. The work saves and puts its job back into the queue; from inside a container, where there is
# no scontrol, it cannot, and ends with 138 (stopped by SIGUSR1): then this does.
step() {
  # `scancel --full` tells the batch script too, which would die of it; so does its child, unless it decides otherwise
  trap : USR1 USR2
  # one launch for all tasks of the array and all their starts: force=true does what they share once
  export FASTAR_LAUNCH=${FASTAR_LAUNCH:-slurm-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
  # from 22.05 on srun does not look at what sbatch was asked for: all but one CPU would lie idle
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  local code=0 job=$SLURM_JOB_ID
  # the number of an array's last task is that of the whole array
  [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  srun "$@" || code=$?
  if ((code == 138)) && [[ $(scontrol -o show job "$job") == *JobState=RUNNING* ]]; then scontrol requeue "$job"; fi
  return $code
}
