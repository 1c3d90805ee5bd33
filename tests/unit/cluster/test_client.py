import hashlib
import json
import re
import time

import pytest

from cluster import client, scripts
from cluster.directory import Directory
from cluster.job_tag import JobTag
from raylab.errors import SlurmError, UsageError


@pytest.fixture
def up(make_spec, slurm, tmp_path):
    """A cluster that has just been submitted: (directory, the head's job)."""
    directory, job = client.up(make_spec(), tmp_path, slurm)
    return directory, next(one for one in slurm.table if one.id == job)


def running(slurm, directory, **facts):
    """The head as Slurm runs it."""
    (slurm.table[0],) = (
        job.__class__(**{**job.__dict__, "state": "RUNNING", "left": 600.0, "node": "n1", **facts})
        for job in slurm.table[:1]
    )
    return slurm.table[0]


def ready(slurm, directory, **facts):
    head = running(slurm, directory)
    note = {"job": head.id, "generation": head.restarts, "node": "n1", "address": "a:1", "dashboard": "a:2"}
    (directory.path / "head.json").write_text(json.dumps({**note, "ports": {}, **facts}))
    return head


def test_up_submits_the_head_and_notes_what_was_asked(up, slurm, tmp_path):
    directory, head = up
    assert directory.path == tmp_path / "clusters" / "ray"
    assert directory.spec.job == head.id
    assert directory.spec.kill_seconds == 25, "Slurm's KillWait"
    assert JobTag.parse(head.comment) == JobTag(directory.spec.id, 0, "head")
    assert slurm.submitted == [directory.scripts / "head.sbatch"]


def test_a_second_up_of_one_name_is_refused_and_changes_nothing(up, make_spec, slurm, tmp_path):
    directory, head = up
    token = directory.token.read_text()
    with pytest.raises(UsageError, match=f"'ray' already exists .job {head.id}, pending"):
        client.up(make_spec(), tmp_path, slurm)
    assert len(slurm.table) == 1
    assert directory.token.read_text() == token and directory.spec.job == head.id


def test_up_is_refused_while_slurm_cannot_say_whether_there_is_one(up, make_spec, slurm, tmp_path):
    slurm.away = True
    with pytest.raises(SlurmError):
        client.up(make_spec(), tmp_path, slurm)


def test_another_name_or_an_ended_one_is_not_refused(up, make_spec, slurm, tmp_path):
    client.up(make_spec(name="other"), tmp_path, slurm)
    slurm.table.clear()
    directory, job = client.up(make_spec(), tmp_path, slurm)
    assert directory.spec.job == job


def test_a_job_that_slurm_refuses_leaves_nothing(make_spec, slurm, tmp_path):
    slurm.refusal = "invalid partition specified: x"
    with pytest.raises(UsageError, match="invalid partition"):
        client.up(make_spec(), tmp_path, slurm)
    assert not (tmp_path / "clusters" / "ray").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"name": "a/b"}, "'a/b' is not a valid cluster name"),
        ({"name": ""}, "is not a valid cluster name"),
        ({"low": 3, "high": 2}, "--min 3 --max 2"),
        ({"high": 0}, "--max 0"),
        ({"types": ["gpus"]}, "unknown node type of site 'here': 'gpus'"),
        ({"static": 0}, "--static 0"),
        ({"time": "00:01:00"}, "too short"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(make_spec, other, said):
    with pytest.raises(UsageError) as caught:
        make_spec(**other)
    assert said in caught.value.what


def test_without_types_the_first_of_the_site_is_meant(make_spec):
    assert make_spec(types=[]).types == ["cpu"]


def test_status_while_the_head_waits(up, slurm):
    directory, head = up
    found = client.status(directory, slurm)
    assert found["state"] == "waiting" and found["head"] is None
    assert found["jobs"] == [
        {
            "job": head.id, "kind": "head", "type": "", "state": "pending", "node": "", "seconds_left": None,
            "why": "other jobs have a higher priority",
        }
    ]  # fmt: skip


def test_status_while_the_head_starts_and_once_it_is_ready(up, slurm):
    directory, _ = up
    running(slurm, directory)
    assert client.status(directory, slurm)["state"] == "starting"
    ready(slurm, directory)
    found = client.status(directory, slurm)
    assert found["state"] == "ready" and found["head"]["address"] == "a:1"
    assert found["jobs"][0]["seconds_left"] == 600.0


def test_a_requeued_head_is_not_ready_by_what_the_one_before_wrote(up, slurm):
    directory, _ = up
    ready(slurm, directory)
    running(slurm, directory, restarts=1)
    assert client.status(directory, slurm)["state"] == "starting"


def test_a_cluster_whose_head_is_gone_is_down_though_workers_are_left(up, slurm):
    directory, _ = up
    ready(slurm, directory)
    slurm.table.clear()
    slurm.add(JobTag(directory.spec.id, 0, "worker", "cpu", "r"), "RUNNING", node="n2")
    found = client.status(directory, slurm)
    assert found["state"] == "down" and [job["kind"] for job in found["jobs"]] == ["worker"]


def test_what_ray_says_is_shown_while_it_is_fresh(up, slurm):
    directory, _ = up
    ready(slurm, directory)
    worker = slurm.add(JobTag(directory.spec.id, 0, "worker", "cpu", "r"), "RUNNING", left=42.0, node="n2")
    seen = {"nodes": [{"instance": f"{worker.id}.0"}], "demand": [{"count": 1}], "jobs": [{"id": "j"}]}
    (directory.path / "status.json").write_text(json.dumps({**seen, "time": time.time()}))
    found = client.status(directory, slurm)
    assert found["nodes"][0]["seconds_left"] == 42.0
    assert found["demand"] and found["ray_jobs"]
    (directory.path / "status.json").write_text(json.dumps({**seen, "time": time.time() - 60}))
    found = client.status(directory, slurm)
    assert (found["nodes"], found["demand"], found["ray_jobs"]) == ([], [], [])


def test_status_says_why_nodes_did_not_come_up(up, slurm):
    directory, _ = up
    directory.problem("7.0", "n2: no scratch")
    assert client.status(directory, slurm)["problems"][0]["text"] == "n2: no scratch"


def test_status_without_slurm_is_an_error_and_not_down(up, slurm):
    slurm.away = True
    with pytest.raises(SlurmError):
        client.status(up[0], slurm)


def test_down_ends_what_is_ours_and_nothing_else(up, make_spec, slurm, tmp_path):
    directory, head = up
    worker = slurm.add(JobTag(directory.spec.id, 0, "worker", "cpu", "r"), "RUNNING")
    other, _ = client.up(make_spec(name="other"), tmp_path, slurm)
    foreign = slurm.add("somebody's", "RUNNING")
    done = client.down(directory, slurm)
    assert sorted(done["ended"]) == sorted([head.id, worker.id])
    assert sorted(slurm.cancelled) == sorted([head.id, worker.id])
    assert [job.id for job in slurm.table] == [other.spec.job, foreign.id]
    assert not directory.token.exists(), "a stale token is of no use to anybody"
    assert (directory.path / "down").exists(), "a head on its way back must see that it is over"
    assert other.token.exists()


def test_down_of_a_cluster_that_is_gone_tidies_up(up, slurm):
    directory, _ = up
    slurm.table.clear()
    assert client.down(directory, slurm)["ended"] == []
    assert not (directory.path / "cluster.json").exists()


def test_down_says_which_jobs_stay(up, slurm, monkeypatch):
    directory, head = up
    monkeypatch.setattr(client, "DOWN_SECONDS", 0.0)
    monkeypatch.setattr(slurm, "cancel", lambda ids: None)
    with pytest.raises(SlurmError, match=f"jobs {head.id} are still running"):
        client.down(directory, slurm)
    assert directory.token.exists(), "it is not down: `status` and a second `down` still work"


def test_wait_tells_what_it_waits_for_and_ends_when_the_head_is_ready(up, slurm, monkeypatch):
    directory, _ = up
    told = []

    def tick(seconds):
        if len(told) == 1:
            running(slurm, directory)
        if len(told) == 2:
            ready(slurm, directory)

    monkeypatch.setattr(client.time, "sleep", tick)
    assert client.wait(directory, slurm, 60, told.append)["state"] == "ready"
    assert told == ["the head waits in the queue: other jobs have a higher priority", "the head is starting"]


def test_wait_ends_with_the_reason_when_the_head_has_ended(up, slurm, monkeypatch):
    directory, _ = up
    slurm.table.clear()
    directory.problem("1.0", "n1: this node has Python 3.9")
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with pytest.raises(SlurmError, match=r"(?s)has ended.*this node has Python 3.9"):
        client.wait(directory, slurm, 60, lambda text: None)


def test_wait_outlives_a_controller_that_is_away(up, slurm, monkeypatch):
    directory, _ = up
    ready(slurm, directory)
    slurm.away = True
    told = []

    def back(seconds):
        slurm.away = False

    monkeypatch.setattr(client.time, "sleep", back)
    assert client.wait(directory, slurm, 60, told.append)["state"] == "ready"
    assert told == ["Slurm does not answer"]


def test_wait_has_an_end(up, slurm):
    with pytest.raises(SlurmError, match="not ready after 0 s"):
        client.wait(up[0], slurm, 0.0, lambda text: None)


def test_a_dry_run_shows_every_text_and_touches_nothing(make_spec, tmp_path):
    texts = client.dry_run(make_spec(), tmp_path / "clusters" / "ray")
    assert sorted(texts) == ["autoscaling.json", "cpu.sbatch", "gpu.sbatch", "head.sbatch"]
    assert not (tmp_path / "clusters").exists()
    assert "cluster.node.agent" in texts["head.sbatch"] and "--gres=gpu:2" in texts["gpu.sbatch"]
    assert set(json.loads(texts["autoscaling.json"])["available_node_types"]) == {"head", "cpu", "gpu"}


def test_what_a_dry_run_shows_is_what_up_submits(make_spec, slurm, tmp_path):
    spec = make_spec()
    shown = client.dry_run(spec, tmp_path / "clusters" / "ray")
    directory, _ = client.up(spec, tmp_path, slurm)
    assert (directory.scripts / "head.sbatch").read_text() == shown["head.sbatch"]


def test_a_static_cluster_is_one_allocation(make_spec, slurm, tmp_path):
    spec = make_spec(static=3, types=["gpu"])
    assert list(client.dry_run(spec, tmp_path / "clusters" / "ray")) == ["head.sbatch"]
    directory, _ = client.up(spec, tmp_path, slurm)
    text = (directory.scripts / "head.sbatch").read_text()
    assert "#SBATCH --nodes=3" in text and "#SBATCH --gres=gpu:2" in text and " static " in text


@pytest.fixture
def whole(site):
    """The site, where a job is allocated whole nodes."""
    head = site.head.model_copy(update={"cpus": 1, "memory_mb": 1500, "partition": "small"})
    return site.model_copy(update={"whole_nodes": True, "head": head})


def test_where_nodes_are_allocated_whole_the_head_takes_a_node_that_works(make_spec, whole, slurm, tmp_path):
    directory, _ = client.up(make_spec(site=whole, types=["gpu"]), tmp_path, slurm)
    text = (directory.scripts / "head.sbatch").read_text()
    for option in ("--cpus-per-task=8", "--mem=16000M", "--gres=gpu:2", "--job-name=raylab-ray-head"):
        assert f"#SBATCH {option}" in text
    assert "--partition=small" not in text and " head --generation 0" in text
    tag = JobTag.parse(slurm.table[0].comment)
    assert (tag.kind, tag.type) == ("head", "gpu")
    assert client.status(directory, slurm)["jobs"][0]["kind"] == "head"


def test_a_dedicated_head_has_a_small_node_as_everywhere_else(make_spec, whole, site, slurm, tmp_path):
    assert make_spec(site=site).head_type == ""
    spec = make_spec(site=whole, dedicated_head=True)
    assert spec.head_type == ""
    text = client.dry_run(spec, tmp_path)["head.sbatch"]
    assert "#SBATCH --cpus-per-task=1\n" in text and "#SBATCH --partition=small" in text


def test_a_node_without_room_beside_the_head_is_refused(make_spec, whole):
    for share in ({"cpus": 4}, {"memory_mb": 4000}):
        site = whole.model_copy(update={"head": whole.head.model_copy(update=share)})
        with pytest.raises(UsageError, match="no room for the head and a worker") as refused:
            make_spec(site=site)
        assert "--dedicated-head" in refused.value.do
        assert make_spec(site=site, dedicated_head=True).head_type == ""


def test_a_directory_of_nothing_is_no_cluster(tmp_path, slurm):
    with pytest.raises(SlurmError):
        client.status(Directory(tmp_path / "none"), slurm)


def test_an_images_digest_is_taken_once_and_reaches_every_node(make_spec, site, slurm, tmp_path):
    image = tmp_path / "raylab.sif"
    image.write_bytes(b"an image")
    spec = make_spec(site=site.model_copy(update={"image": str(image)}))
    assert spec.python == "python", "the image's own"
    directory, _ = client.up(spec, tmp_path, slurm)
    wanted = "sha256:" + hashlib.sha256(b"an image").hexdigest()
    assert directory.spec.image_digest == wanted
    image.unlink()  # the nodes' scripts are written later, by the head
    worker = scripts.worker(directory, JobTag(spec.id, 0, "worker", "cpu", "r"))
    for script in (directory.scripts / "head.sbatch", worker):
        assert f"export RAYLAB_IMAGE_DIGEST={wanted}\n" in script.read_text()
    assert "slurm_proxy.py" in (directory.scripts / "head.sbatch").read_text()
    assert "slurm_proxy.py" not in worker.read_text(), "a worker has no need of Slurm"


def test_an_image_that_is_not_there_is_refused(make_spec, site, tmp_path):
    with pytest.raises(UsageError, match=r"(?s)image of site 'here' does not exist.*apptainer build"):
        make_spec(site=site.model_copy(update={"image": str(tmp_path / "none.sif")}))


def test_without_an_image_there_is_no_digest(up):
    directory, _ = up
    assert "RAYLAB_IMAGE_DIGEST" not in (directory.scripts / "head.sbatch").read_text()


def test_a_login_lies_in_a_private_file_and_jobs_get_its_path(make_spec, slurm, tmp_path):
    text = '{"http://t": {"username": "me", "password": "hunter2-Z9"}}'
    spec = make_spec(tracking="http://t", login=True)
    directory, _ = client.up(spec, tmp_path, slurm, {scripts.LOGIN: text})
    path = directory.path / scripts.LOGIN
    assert path.read_text() == text and path.stat().st_mode & 0o777 == 0o600
    others = [one for one in directory.path.rglob("*") if one.is_file() and one != path]
    assert not [one for one in others if "hunter2" in one.read_text()]
    script = (directory.scripts / "head.sbatch").read_text()
    assert f"export RAYLAB_MLFLOW_LOGIN={path}" in script
    assert re.search(r"^unset .*MLFLOW_TRACKING_PASSWORD", script, re.MULTILINE)
    client.down(directory, slurm)
    assert not path.exists()
    directory, _ = client.up(make_spec(), tmp_path, slurm)
    assert "RAYLAB_MLFLOW_LOGIN" not in (directory.scripts / "head.sbatch").read_text()
