import json
import threading
import time

import pytest
from ray.autoscaler._private.providers import _clear_provider_cache, _get_node_provider
from ray.autoscaler.tags import TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import LaunchNodeError, NodeProviderAdapter, TerminateNodeError
from ray.core.generated.instance_manager_pb2 import NodeKind

from cluster import autoscaling
from cluster import provider as module
from cluster.job_tag import JobTag
from cluster.provider import HEAD, SlurmProvider
from raylab.errors import SlurmError

GENERATION = 1


@pytest.fixture(autouse=True)
def always_asked(monkeypatch):
    """Tests look at once; that squeue is asked rarely is a test of its own."""
    monkeypatch.setattr(module, "FRESH_SECONDS", -1.0)


@pytest.fixture
def provider(directory, slurm):
    return SlurmProvider({"directory": str(directory.path), "generation": GENERATION}, "ray", slurm)


def comment(directory, **other) -> JobTag:
    facts = {"cluster": directory.spec.id, "generation": GENERATION, "kind": "worker", "type": "cpu", "request": "r1"}
    return JobTag(**{**facts, **other})


def launch(provider, count=1, kind="cpu", request="r1"):
    provider.create_node_with_resources_and_labels(
        {"type": kind}, {TAG_RAY_LAUNCH_REQUEST: request}, count, {"CPU": 4}, {}
    )


def test_workers_of_this_cluster_and_head_are_listed_and_no_others(provider, directory, slurm):
    ours = slurm.add(comment(directory))
    slurm.add(comment(directory, generation=0))  # of the head before
    slurm.add(comment(directory, cluster="another"))
    slurm.add(comment(directory, kind="head", type=""))
    slurm.add("somebody's")
    slurm.add(comment(directory), "COMPLETING")
    assert provider.non_terminated_nodes({}) == [HEAD, f"{ours.id}.0"]


def test_the_head_is_listed_and_runs(provider):
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "head"}) == [HEAD]
    assert provider.is_running(HEAD) and not provider.is_terminated(HEAD)


def test_a_waiting_job_is_a_node_that_does_not_run_yet(provider, directory, slurm):
    job = slurm.add(comment(directory, type="gpu", request="r7"))
    (id,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    assert id == f"{job.id}.0"
    assert not provider.is_running(id) and not provider.is_terminated(id)
    tags = provider.node_tags(id)
    assert (tags[TAG_RAY_USER_NODE_TYPE], tags[TAG_RAY_LAUNCH_REQUEST]) == ("gpu", "r7")


def test_a_requeued_job_is_another_node(provider, directory, slurm):
    job = slurm.add(comment(directory), "RUNNING")
    (first,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    slurm.table = [job.__class__(**{**job.__dict__, "restarts": 1, "state": "PENDING"})]
    (second,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    assert (first, second) == (f"{job.id}.0", f"{job.id}.1")
    assert provider.is_terminated(first) and not provider.is_running(first)
    provider.terminate_node(first)
    assert slurm.cancelled == [], "the job lives on as another node"
    provider.terminate_node(second)
    assert slurm.cancelled == [job.id]


def test_a_job_that_slurm_holds_after_a_failed_launch_makes_room_for_another(provider, directory, slurm):
    job = slurm.add(comment(directory), restarts=1, reason="launch failed requeued held")
    held_by_its_owner = slurm.add(comment(directory), reason="JobHeldUser")
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}) == [f"{held_by_its_owner.id}.0"]
    assert slurm.cancelled == [job.id]
    assert job.id in directory.problems()[0]["text"]


def test_slurm_away_raises_and_never_reads_as_no_nodes(provider, directory, slurm):
    job = slurm.add(comment(directory), "RUNNING")
    assert provider.non_terminated_nodes({}) == [HEAD, f"{job.id}.0"]
    slurm.away = True
    with pytest.raises(SlurmError):
        provider.non_terminated_nodes({})
    with pytest.raises(SlurmError):
        provider.is_terminated(f"{job.id}.0")


def test_a_node_that_is_gone_between_two_questions_is_no_error(provider, directory, slurm):
    job = slurm.add(comment(directory), "RUNNING")
    (id,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})
    slurm.table.clear()
    assert provider.non_terminated_nodes({}) == [HEAD]
    assert provider.node_tags(id)[TAG_RAY_USER_NODE_TYPE] == "cpu"
    assert not provider.is_running(id)
    assert provider.internal_ip(id) == job.node


def test_launch_submits_a_job_a_node_whose_state_is_all_in_slurm(provider, directory, slurm):
    launch(provider, 2, "gpu", "r9")
    assert [JobTag.parse(job.comment) for job in slurm.table] == [comment(directory, type="gpu", request="r9")] * 2
    assert "--gres=gpu:2" in slurm.submitted[0].read_text()
    another = SlurmProvider(provider.provider_config, "ray", slurm)
    assert len(another.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})) == 2, "a restarted head loses nothing"


def test_nodes_that_keep_failing_to_come_up_are_not_asked_for_for_ever(provider, directory, slurm):
    for job in ("1.0", "2.0"):
        directory.problem(job, "no scratch")
    launch(provider)
    directory.problem("3.0", "no network interface 'ib9'")
    with pytest.raises(SlurmError, match="ib9"):
        launch(provider)
    assert len(slurm.table) == 1


def test_a_launch_is_seen_at_once_though_squeue_is_asked_rarely(provider, slurm, monkeypatch):
    monkeypatch.setattr(module, "FRESH_SECONDS", 60.0)
    asked = []
    real = slurm.jobs
    monkeypatch.setattr(slurm, "jobs", lambda: asked.append(1) or real())
    for _ in range(5):
        assert provider.non_terminated_nodes({}) == [HEAD]
    assert len(asked) == 1
    launch(provider)
    assert len(provider.non_terminated_nodes({})) == 2
    provider.terminate_nodes(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}))
    assert provider.non_terminated_nodes({}) == [HEAD]


def test_launching_listing_and_ending_from_threads_at_once(provider, slurm):
    """Ray lists from one thread, launches from others and terminates from another yet."""
    errors, stop = [], threading.Event()

    def again(what):
        while not stop.is_set():
            try:
                what()
            except Exception as error:
                errors.append(error)
                return

    def look():
        for id in provider.non_terminated_nodes({}):
            provider.node_tags(id)
            provider.is_running(id)
            provider.is_terminated(id)

    def end():
        provider.terminate_nodes(provider.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"})[:2])

    threads = [threading.Thread(target=again, args=(what,)) for what in (look, look, lambda: launch(provider), end)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert len(slurm.submitted) == len(slurm.cancelled) + len(slurm.table)
    assert len(slurm.cancelled) == len(set(slurm.cancelled)), "each job is cancelled once"


class Reader:
    """What Ray gives the adapter: the autoscaling configuration, as the head's file says it."""

    def __init__(self, text: str) -> None:
        self.config = AutoscalingConfig(json.loads(text))

    def get_cached_autoscaling_config(self):
        return self.config


@pytest.fixture
def adapter(directory, slurm, monkeypatch):
    """The locked Ray's own way to our provider: by its name in the file, and through its adapter."""
    monkeypatch.setattr(module, "Slurm", lambda: slurm)
    reader = Reader(autoscaling.configuration(directory.spec, directory.path, GENERATION))
    _clear_provider_cache()
    found = _get_node_provider(reader.config.get_provider_config(), "ray")
    assert isinstance(found, SlurmProvider)
    yield NodeProviderAdapter(found, reader)
    _clear_provider_cache()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_locked_ray_lists_launches_and_terminates_through_its_adapter(adapter, slurm):
    """Held to this Ray: its makers do not support the way (ray#57153)."""
    adapter.launch({"cpu": 2, "gpu": 1}, "request-1")
    until(lambda: len(slurm.table) == 3)
    nodes = adapter.get_non_terminated()
    assert nodes[HEAD].node_kind == NodeKind.HEAD and nodes[HEAD].is_running
    workers = {id: node for id, node in nodes.items() if id != HEAD}
    assert sorted(node.node_type for node in workers.values()) == ["cpu", "cpu", "gpu"]
    assert {node.node_kind for node in workers.values()} == {NodeKind.WORKER}
    assert {node.request_id for node in workers.values()} == {"request-1"}
    assert not any(node.is_running for node in workers.values()), "they still queue"
    adapter.terminate(list(workers), "request-2")
    until(lambda: not slurm.table)
    assert list(adapter.get_non_terminated()) == [HEAD]
    assert adapter.poll_errors() == []


def test_the_locked_ray_hears_of_a_refused_launch_and_a_failed_end(adapter, slurm):
    slurm.refusal = "invalid partition"
    adapter.launch({"cpu": 1}, "request-1")
    errors = []
    until(lambda: errors.extend(adapter.poll_errors()) or errors)
    assert isinstance(errors[0], LaunchNodeError) and errors[0].request_id == "request-1"
    slurm.refusal, slurm.away = "", True
    adapter.terminate(["5.0"], "request-2")
    errors.clear()
    until(lambda: errors.extend(adapter.poll_errors()) or errors)
    assert isinstance(errors[0], TerminateNodeError)
    with pytest.raises(SlurmError):
        adapter.get_non_terminated()
