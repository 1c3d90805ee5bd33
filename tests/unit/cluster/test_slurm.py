import os

import pytest

from cluster import slurm
from cluster.slurm import COLUMNS, REASONS, Slurm, parse_job, read_columns
from raylab.errors import SlurmError, UsageError

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
# Slurm 22.05's `squeue --noheader --Format=` with COLUMNS, on the test cluster
REAL = [
    ("41", "RUNNING", "0", "29:57", "n1", "None", "raylab:1a2b3c4d:0:head::"),
    ("42", "PENDING", "2", "30:00", "", "BeginTime", "raylab:1a2b3c4d:1:worker:cpu:9f0c"),
    ("43", "RUNNING", "0", "1-02:03:04", "n[1-3]", "None", "(null)"),
    ("44_7", "PENDING", "0", "UNLIMITED", "", "ReqNodeNotAvail,_UnavailableNodes:n2", "somebody's own: comment"),
    ("45", "COMPLETING", "0", "0:00", "n2", "None", ""),
]


def table(rows) -> str:
    return "".join(
        "".join(field.ljust(width) for field, width in zip(row, COLUMNS.values(), strict=True)) + "\n" for row in rows
    )


def parse(text: str) -> list[slurm.Job]:
    return [parse_job(row) for row in read_columns(text, COLUMNS)]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """How long was waited between tries, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(slurm, "sleep", waited.append)
    return waited


def calls(where, name) -> list[str]:
    path = where / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def test_jobs_are_read_from_squeues_table(commands, tmp_path):
    (tmp_path / "table").write_text(table(REAL))
    where = commands(squeue=f'cat "{tmp_path}/table"')
    head, requeued, wide, odd, ending = Slurm(where).jobs()
    assert (head.id, head.running, head.left, head.node) == ("41", True, 1797.0, "n1")
    assert head.comment == "raylab:1a2b3c4d:0:head::"
    assert (requeued.restarts, requeued.why()) == (2, REASONS["BeginTime"])
    assert wide.left == 26 * 3600 + 3 * 60 + 4
    assert (odd.id, odd.left, odd.alive) == ("44_7", None, True)
    assert odd.why() == REASONS["ReqNodeNotAvail"]
    assert not ending.alive and not ending.running
    (asked,) = calls(where, "squeue")
    assert f"--user={os.getuid()}" in asked and "--noheader" in asked and "Comment:200" in asked


def test_no_jobs_are_no_jobs(commands):
    assert Slurm(commands(squeue="true")).jobs() == []


@pytest.mark.parametrize("left", ["INVALID", "NOT_SET", "UNLIMITED", ""])
def test_a_time_left_that_is_none(left):
    (job,) = parse(table([("1", "RUNNING", "", left, "n1", "None", "")]))
    assert job.left is None and job.restarts == 0


def test_a_reason_that_has_no_plain_words_is_shown_as_it_is():
    (job,) = parse(table([("1", "PENDING", "0", "1:00", "", "(QOSGrpNodeLimit)", "")]))
    assert job.why() == "QOSGrpNodeLimit"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STAGE_OUT"])
def test_what_may_still_run_is_alive(state):
    (job,) = parse(table([("1", state, "0", "1:00", "", "None", "")]))
    assert job.alive


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "PREEMPTED", "CANCELLED", "COMPLETING"])
def test_what_is_over_is_not(state):
    (job,) = parse(table([("1", state, "0", "1:00", "", "None", "")]))
    assert not job.alive


def test_submit_gives_the_id(commands, tmp_path):
    where = commands(sbatch="echo '1234;cluster2'")
    assert Slurm(where).submit(tmp_path / "my job.sbatch") == "1234"
    assert calls(where, "sbatch") == [f"--parsable {tmp_path}/my job.sbatch"]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("sbatch: error: invalid partition specified: gpu", "`partition`"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "`account` or `partition`",
        ),
        ("sbatch: error: Batch job submission failed: Invalid account", "`account`"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "`qos`"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", "shorter --time"),
        (
            "sbatch: error: Batch job submission failed: Requested node configuration is not available",
            "smaller node type",
        ),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", "`features`"),
        (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: "
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "fewer",
        ),
    ],
)
def test_a_refusal_keeps_slurms_words_and_says_what_to_change(commands, tmp_path, words, advice):
    where = commands(sbatch=f"cat >&2 <<'END'\n{words}\nEND\nexit 1")
    with pytest.raises(UsageError) as caught:
        Slurm(where).submit(tmp_path / "head.sbatch")
    for line in words.splitlines():
        assert line.removeprefix("sbatch: error: ") in caught.value.why
    assert advice in caught.value.do
    assert caught.value.exit_code == 2
    assert len(calls(where, "sbatch")) == 1, "a refusal is not tried again"


def test_a_controller_that_is_away_is_tried_again_and_then_an_error_never_none(commands, pauses):
    where = commands(squeue=f"echo '{AWAY}' >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        Slurm(where).jobs()
    assert "does not answer (squeue)" in caught.value.what and "Unable to contact" in caught.value.why
    assert len(calls(where, "squeue")) == slurm.TRIES == len(pauses) + 1
    assert pauses == sorted(pauses) and pauses[0] > 0


def test_a_controller_that_comes_back_in_time_answers(commands, tmp_path):
    (tmp_path / "table").write_text(table(REAL[:1]))
    back = f'[ $(wc -l <"$0.calls") -ge 3 ] || {{ echo "{AWAY}" >&2; exit 1; }}; cat "{tmp_path}/table"'
    assert [job.id for job in Slurm(commands(squeue=back)).jobs()] == ["41"]


def test_a_command_that_hangs_is_no_answer(commands, monkeypatch):
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    where = commands(squeue="exec sleep 30")
    with pytest.raises(SlurmError, match="no answer within"):
        Slurm(where).jobs()
    assert len(calls(where, "squeue")) == slurm.TRIES


@pytest.mark.parametrize(
    "lines", ["exec sleep 30", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"]
)
def test_a_job_that_may_have_been_taken_is_not_submitted_twice(commands, monkeypatch, tmp_path, lines):
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    where = commands(sbatch=lines)
    with pytest.raises(SlurmError, match="does not answer"):
        Slurm(where).submit(tmp_path / "x.sbatch")
    assert len(calls(where, "sbatch")) == 1


def test_a_job_that_cannot_have_been_taken_is_submitted_again(commands, tmp_path):
    lines = f'[ $(wc -l <"$0.calls") -ge 2 ] || {{ echo "sbatch: error: {AWAY}" >&2; exit 1; }}; echo 7'
    where = commands(sbatch=lines)
    assert Slurm(where).submit(tmp_path / "x.sbatch") == "7"


def test_a_machine_without_slurm_says_so(tmp_path):
    with pytest.raises(SlurmError, match=r"(?s)squeue was not found.*login node"):
        Slurm(tmp_path).jobs()


def test_another_failure_of_squeue_is_an_error_and_not_none(commands):
    with pytest.raises(SlurmError, match="Invalid user"):
        Slurm(commands(squeue="echo 'squeue: error: Invalid user: 7' >&2; exit 1")).jobs()


def test_cancelling_what_has_ended_is_no_error_and_nothing_asks_nothing(commands):
    where = commands(scancel="echo 'scancel: error: Kill job error on job id 5: Invalid job id specified' >&2; exit 1")
    Slurm(where).cancel([])
    assert calls(where, "scancel") == []
    Slurm(where).cancel(["5", "6"])
    assert calls(where, "scancel") == ["5 6"]


def test_cancelling_what_is_not_ours_is_an_error(commands):
    words = "scancel: error: Kill job error on job id 5: Access/permission denied"
    with pytest.raises(SlurmError, match="permission denied"):
        Slurm(commands(scancel=f"echo '{words}' >&2; exit 1")).cancel(["5"])


def test_requeue_and_configuration(commands):
    where = commands(
        scontrol='[ "$1" = requeue ] || printf "Configuration data as of X\\nKillWait                = 30 sec\\n'
        'PreemptMode             = REQUEUE\\nSchedulerParameters     = a=1,b=2\\n"'
    )
    Slurm(where).requeue("8")
    assert Slurm(where).config() == {
        "KillWait": "30 sec",
        "PreemptMode": "REQUEUE",
        "SchedulerParameters": "a=1,b=2",
    }
    assert calls(where, "scontrol") == ["requeue 8", "show config"]


def test_slurm_is_handed_no_secret_of_the_environment(commands, tmp_path, monkeypatch):
    """sbatch sends its whole environment to the controller, which stores it."""
    for name in slurm.SECRETS:
        monkeypatch.setenv(name, "hunter2-Z9")
    monkeypatch.setenv("KEPT", "yes")
    Slurm(commands(sbatch=f"env > {tmp_path}/env; echo 7")).submit(tmp_path / "x.sbatch")
    seen = (tmp_path / "env").read_text()
    assert "KEPT=yes" in seen and "hunter2" not in seen


def test_a_job_that_is_submitted_from_another_inherits_nothing_of_it():
    own = {"SLURM_CONF": "/etc/s.conf", "SBATCH_ACCOUNT": "lungs", "PATH": "/bin"}
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_MEM_PER_CPU": "9",
        "SRUN_CPUS_PER_TASK": "1",
    }
    assert slurm.clean_environment({**own, **job}) == own
    login = {**own, "SLURM_ACCOUNT": "lungs"}
    assert slurm.clean_environment(login) == login, "a default of the user's, outside of jobs"
