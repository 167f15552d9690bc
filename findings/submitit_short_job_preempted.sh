#!/usr/bin/env bash
# submitit 1.5.4: a job that gets the preemption signal is "timed out" from min(0.8 limit, limit - 10 minutes) on. For a
# limit of up to 10 minutes that is at once: a job that is preempted in its first second is counted as timed out. With
# max_num_timeout=0, the default of Hydra's Slurm launcher, it does not go back into the queue although it has a
# checkpoint method; a preempted job should, "any number of time" (its docs/checkpointing.md).
# Seen, local executor: limit 12 minutes: "this job is preempted", goes on; limit 10: "this job is timed-out", "Job not
# requeued because: timed-out too many times". (facebookincubator/submitit issue 1656 is closed.)
# Ends with 0 while that is so, else with 1. $PYTHON makes the environment. Takes about a minute at most.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet submitit==1.5.4
cd "$folder"
timeout 60 "$folder/venv/bin/python" - <<'PY'
import signal, sys
from pathlib import Path
import submitit

print("submitit", submitit.__version__)


class Job(submitit.helpers.Checkpointable):
    def __call__(self, begun: str) -> str:
        if Path(begun).exists():
            return "went on in a second life"
        Path(begun).touch()
        signal.raise_signal(signal.SIGUSR2)  # as the cluster preempts it
        return "was not stopped"


ends = {}
for limit in (12, 10):
    executor = submitit.AutoExecutor(folder=f"{limit}", cluster="local", local_max_num_timeout=0)
    executor.update_parameters(timeout_min=limit)
    job = executor.submit(Job(), f"begun_{limit}")
    try:
        ends[limit] = job.result()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        ends[limit] = next(line for line in str(error).splitlines() if "not requeued" in line)
    said = [line[line.index("this job is") :] for line in job.stderr().splitlines() if "this job is" in line]
    print(f"limit {limit} minutes:", *said, ends[limit])
sys.exit(0 if ends[12] == "went on in a second life" and "timed-out too many times" in ends[10] else 1)
PY
