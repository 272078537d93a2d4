"""The part of a batch script that requeues the job shortly before its time limit.

It is bash, in a process of its own next to srun, so it works whatever the ranks are doing: also if
they are stopped, wait for a file system, or save for longer than SLURM's signal leaves them.
"""

from evspan.conf.errors import STOPPED_EXIT_CODE
from evspan.launch.slurm.rank_task import JOB_END, SIGNAL_DELAY
from evspan.pipeline.time_records import JOB_QUEUED, JOB_START

POLL_S = 60  # at most, between two looks at the job's end, which an administrator may change
MOST_LEAD_S = 30
LEAST_LEAD_S = 5
REQUEUE_TRIES = 20  # of a job whose ranks have ended
REQUEUE_PAUSE_S = 3
DECISION_TRIES = 5  # of a command that fails
DECISION_PAUSE_S = 5

ID_LINES = (  # set `id`: JOB, or JOB_INDEX in an array
    "id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
    "id=${id:-$SLURM_JOB_ID}",
)

# Needs the variable `id`. read_job sets `state`, `reason`, `end` (seconds since 1970) and `left`
# (seconds); they are empty if SLURM's controller does not answer, but `end` stays. The first call
# that is answered also sets `queued` and `start` (seconds since 1970) of this allocation.
_FUNCTIONS = r"""
end=
start=
queued=
never=
read_job() {
    local job now preempted=
    job=" $(SLURM_TIME_FORMAT=%s scontrol show job --oneliner "$id" 2>/dev/null | head -n 1)"
    state=
    reason=
    left=
    if [[ $job =~ ' JobState='([A-Z_]+) ]]; then state=${BASH_REMATCH[1]}; fi
    if [[ $job =~ ' Reason='([A-Za-z_]+) ]]; then reason=${BASH_REMATCH[1]}; fi
    if [[ $job =~ ' EndTime='([^ ]+) ]]; then
        end=${BASH_REMATCH[1]}
        if [[ ! $end =~ ^[0-9]+$ ]]; then end=$(date -d "$end" +%s 2>/dev/null); fi
    fi
    if [[ ! $start && $job =~ ' SubmitTime='([0-9]+)' ' ]]; then queued=${BASH_REMATCH[1]}; fi
    if [[ ! $start && $job =~ ' StartTime='([0-9]+)' ' ]]; then start=${BASH_REMATCH[1]}; fi
    if [[ $job =~ ' PreemptTime='[0-9] ]]; then preempted=1; fi
    printf -v now '%(%s)T' -1
    # A job that is preempted has the end of its grace time as its end.
    if [[ $end && ! $preempted ]]; then left=$((end - now)); fi
}
pause() {  # seconds, without a process that would outlive this one
    read -r -t "$1" -u "$never" || true
}
watch_time_limit() {
    local wait decision waited code
    trap '' TERM USR1 USR2
    exec {never}<> <(:)
    while :; do
        read_job
        case $state in
            RUNNING | '') if [[ $left ]] && ((left <= lead)); then break; fi ;;
            SUSPENDED | STOPPED) left= ;;
            *) return ;;
        esac
        wait=$poll
        if [[ $left ]] && ((left - lead < wait)); then wait=$((left - lead)); fi
        pause $((wait > 1 ? wait : 1))
    done
    should_requeue limit "${state:-RUNNING}" "$reason" "$left" &
    decision=$!
    for ((waited = 0; waited < 5 * (lead - lead / 3); waited++)); do
        kill -0 "$decision" 2>/dev/null || break
        pause 0.2
    done
    if ! kill -0 "$decision" 2>/dev/null; then
        wait "$decision"
        code=$?
        if ((code == {do_not_requeue})); then return; fi
    fi
    if [[ ${successor:-} ]]; then return; fi  # it continues the run when this job has ended
    # Later than this SLURM ends the job. A decision that is late is still recorded.
    until scontrol requeue "$id"; do
        pause 2
        read_job
        if [[ $state && $state != RUNNING ]]; then return; fi
    done
}
"""


def lead_s(signal_delay_s: int) -> int:
    """Seconds from the requeue to the time limit.

    Between SLURM's signal and the requeue, the ranks have three quarters of `signal_delay_s`, or
    more, to save; with less than 20 s about half.
    """
    least = min(LEAST_LEAD_S, (signal_delay_s + 1) // 2)
    return min(MOST_LEAD_S, max(least, signal_delay_s // 4))


def watchdog_lines(requeue: str, do_not_requeue: int, signal_delay_s: int) -> list[str]:
    """Lines that start the watchdog, for the end of the setup.

    Args:
        requeue: the command that decides, without its arguments CODE STATE REASON SECONDS.
        do_not_requeue: its exit code for a job that must end; any other one requeues the job.
        signal_delay_s: seconds from SLURM's signal to the time limit.
    """
    functions = _FUNCTIONS.replace("{do_not_requeue}", str(do_not_requeue))
    return [
        "# requeue before the time limit",
        *ID_LINES,
        f"poll={POLL_S}",
        f"lead={lead_s(signal_delay_s)}",
        f'should_requeue() {{ {requeue} "${{SLURM_ARRAY_TASK_ID:-0}}" "$@"; }}',
        *functions.strip().splitlines(),
        "printf -v began '%(%s)T' -1",
        "read_job",
        "start=${start:-$began}",
        f'export {JOB_END}="$end" {SIGNAL_DELAY}={signal_delay_s}',
        f'export {JOB_START}="$start" {JOB_QUEUED}="$queued"',
        "watch_time_limit &",
        "watchdog=$!",
        "disown",
    ]


def end_lines(do_not_requeue: int) -> list[str]:
    """Lines after srun: they end the watchdog, and requeue the job if the command decides so.

    A decision that fails, as where the file system does not answer, is tried again. If it still
    fails, ranks that have saved continue. SLURM's controller may be away for a minute. The script
    does not insist where the job's state has changed since the decision: it was cancelled, or
    requeued already.

    Args:
        do_not_requeue: exit code of the command for a job that must end; 0 requeues it, any other
            one is a failure of the command.
    """
    return [
        "code=$?",
        'kill -KILL "$watchdog" 2>/dev/null',
        "read_job",
        f"for ((tries = 0; tries < {DECISION_TRIES}; tries++)); do",
        '    should_requeue "$code" "$state" "$reason" "$left"',
        "    decision=$?",
        f"    if ((decision == 0 || decision == {do_not_requeue})); then break; fi",
        f"    sleep {DECISION_PAUSE_S}",
        "done",
        f"if ((decision != {do_not_requeue} && code == {STOPPED_EXIT_CODE})); then",
        "    case $state in RUNNING | PREEMPTED | '') decision=0 ;; esac",
        "fi",
        "if ((decision == 0)); then",
        "    decided_in=${state:-RUNNING}",
        f"    for ((tries = 0; tries < {REQUEUE_TRIES}; tries++)); do",
        '        scontrol requeue "$id" && break',
        f"        sleep {REQUEUE_PAUSE_S}",
        "        read_job",
        '        if [[ $state && $state != "$decided_in" ]]; then break; fi',
        "    done",
        "fi",
        'exit "$code"',
    ]
