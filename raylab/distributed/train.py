"""One run on Ray: workers are started where the cluster has room, replaced when they die, and told when they must go.

Training itself survives all of that in place: see membership.py for who trains, and raylab.training.loop for how those
who are left go on. Only when no worker is left does the newest checkpoint count.
"""

import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylab.config.recipe import Recipe
from raylab.distributed.cluster_allocator import find_allocator
from raylab.distributed.membership import LEFT, LOAD_SECONDS, Delivery, Membership
from raylab.distributed.memory_monitor import explain_memory_kill
from raylab.distributed.spares import find_pool
from raylab.distributed.worker import End, Worker, note_of
from raylab.errors import IncompleteError, OutOfMemoryError, RaylabError, RunError
from raylab.memory import advise
from raylab.tasks import find_task
from raylab.tasks.plugins import code_of
from raylab.training.run_failure import FILE as FAILURE
from raylab.training.run_failure import read_failure
from raylab.training.run_result import read_result
from raylab.witness import read_death
from raylab.work import write_to

if TYPE_CHECKING:  # it loads torch, which the actors beside the workers do without
    from raylab.training.progress import Metrics

OnRows = Callable[[list["Metrics"]], None]
SampleNode = Callable[[], dict[str, float]]
"""What a node's load is now, or {} where nothing is due; sent to the workers, so it can be pickled."""
OnNodeSample = Callable[[dict[str, float]], None]
OnWarning = Callable[[str], None]

POLL_SECONDS = 0.1  # between two looks at the workers
WITNESS_SECONDS = 1.0  # that the witness of a worker may take to note its death
CLAIM_SECONDS = 60.0  # that the allocator may take to answer
CLOSE_SECONDS = 5.0  # that it may take at the end, when nothing depends on the answer
PLACE_SECONDS = 1.0  # between two looks at the cluster


@dataclass
class Running:
    """A worker that was started: its actor, the end of its `run`, and the node it is bound to."""

    actor: Any
    end: Any
    node: str
    is_leaving: bool = False


def explain_cause(error: BaseException) -> str:
    """What raylab's own error says that Ray has brought from another process; empty if `error` has another cause."""
    cause = getattr(error, "cause", None)
    return f"{cause.what}: {cause.why}" if isinstance(cause, RaylabError) else ""


class Supervisor:
    """Keeps a run supplied with workers until it is over. It lives in the driver.

    Made as soon as the recipe is known: the processes of the workers start and import what training needs, while the
    driver still checks its input. `train` or `close` must follow.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.scaling = recipe.scaling
        low, _ = self.scaling.workers
        self.bundle = self.scaling.resources()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        members = ray.remote(num_cpus=0)(Membership)
        self.membership = members.options(scheduling_strategy=here).remote(low, self.scaling.silence_seconds)
        self.allocator = find_allocator()
        self.spares = find_pool()
        self.claim = secrets.token_hex(8)
        self.workers: dict[str, Running] = {}
        self.refused: dict[str, str] = {}  # why, by node: code, packages or data differ, so none is started there again
        self.started = 0
        self.step = 0  # the last one whose row has come
        self.failures = 0  # deaths of workers since the run has got further
        self.failed_at = -1
        self.is_closing = False  # a worker has finished: the others do as well, and rank 0 writes the result
        self.has_ended = False
        self.is_closed = False
        self.placed_at = float("-inf")
        self.work: dict[str, dict[str, Any]] = {}  # the last record of each worker
        self.warm: dict[str, list[tuple[str, Any]]] = {}  # workers by node, which have no work yet: name and actor
        # Actors that were killed. Where the last reference goes together with the kill, Ray may take the kill for
        # superfluous and wait for the actor's own end, up to 30 s, in which it keeps its CPUs.
        self.killed: list[Any] = []
        self.told: set[str] = set()  # workers of whose slow start the user was told
        for node, count in self.allowed_workers().items():
            self.warm[node] = [self.create_worker(node) for _ in range(count)]

    def train(
        self,
        recipe: Recipe,
        data: Path,
        directory: Path,
        on_rows: OnRows,
        parent: Path | None = None,
        sample_node: SampleNode = dict,
        on_node_sample: OnNodeSample = lambda sample: None,
        on_warning: OnWarning = lambda text: None,
        time_sums: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Run `recipe` on the connected Ray cluster with recipe.scaling.workers; return the result of `execute`.

        `on_rows` gets each bundle of metrics, `on_node_sample` what `sample_node` returns on each node, and
        `on_warning` what the user must know, in this thread. With `time_sums`, numbers of elements, each worker
        measures sums of these sizes and where the time of its steps goes (step_times.py).
        Raises the run's own error, RunError when workers died more often than recipe.scaling.max_failures without
        getting further, and IncompleteError when they end without a result.
        """
        (directory / FAILURE).unlink(missing_ok=True)
        shutil.rmtree(directory / "deaths", ignore_errors=True)
        self.directory, self.write_work = directory, write_to(directory)
        self.on_rows, self.on_node_sample, self.on_warning = on_rows, on_node_sample, on_warning
        self.arguments = {
            "plugins": code_of(recipe),
            "recipe": recipe.model_dump(mode="json"),
            "data": str(data),
            "data_hash": find_task(recipe.task).read_meta(data).data_hash,
            "directory": str(directory),
            "parent": None if parent is None else str(parent),
            "sample_node": sample_node,
            "time_sums": tuple(time_sums),
        }
        try:
            self.place_workers()
            self.drop_warm()
            self.run()
        finally:
            self.close()
        return outcome(directory)

    def run(self) -> None:
        """Until a worker reports the run's end."""
        while not self.has_ended:
            if not self.is_closing and time.monotonic() - self.placed_at >= PLACE_SECONDS:
                self.place_workers()
            ends = {running.end: name for name, running in self.workers.items()}
            ended, _ = ray.wait(list(ends), timeout=POLL_SECONDS) if ends else ([], None)
            for end in ended:
                self.note_end(ends[end])
            self.receive()
            if not ends:
                time.sleep(POLL_SECONDS)

    def place_workers(self) -> None:
        """Start workers where the run may have more, and tell those to leave that must."""
        self.placed_at = time.monotonic()
        placed = Counter(running.node for running in self.workers.values() if not running.is_leaving)
        allowed = self.allowed_workers(placed)
        if not self.workers and allowed and self.refused.keys() >= allowed.keys():
            self.fail_refused()
        for node, count in allowed.items():
            for _ in range(0 if node in self.refused else count - placed[node]):
                self.start_worker(node)
        for name, running in reversed(self.workers.items()):  # the youngest first
            if not running.is_leaving and placed[running.node] > allowed.get(running.node, 0):
                placed[running.node] -= 1
                running.is_leaving = True
                self.membership.leave.remote(name)

    def allowed_workers(self, placed: Mapping[str, int] = {}) -> dict[str, int]:
        """How many workers the run may have on each node, of which it has those `placed`."""
        scaling, membership = self.scaling, self.membership._actor_id.hex()
        claim = self.allocator.claim.remote(
            self.claim, membership, *scaling.workers, self.bundle, dict(placed), scaling.priority
        )
        try:
            allowed: dict[str, int] = ray.get(claim, timeout=CLAIM_SECONDS)
        except ray.exceptions.GetTimeoutError as error:
            raise RunError(
                f"Ray's processes on {os.uname().nodename} do not answer within {CLAIM_SECONDS:.0f} s",
                "the machine is overloaded, or Ray ends them again and again, because the memory is nearly used up: "
                f"{psutil.virtual_memory().percent:.0f}% at present, by all processes",
                "free memory, or use another machine; then: raylab resume NAME, if the run has begun",
            ) from error
        return allowed

    def create_worker(self, node: str) -> tuple[str, Any]:
        name = f"worker-{self.started}"
        self.started += 1
        actor = self.take_spare() or self.create_actor(node)
        actor.belong.remote(name, self.membership)
        actor.load_libraries.remote()
        return name, actor

    def take_spare(self) -> Any:
        """A worker that waits on this Ray, which then has one node; None if there is none, or none with a GPU."""
        return None if self.spares is None or self.scaling.gpu else ray.get(self.spares.take.remote())

    def create_actor(self, node: str) -> Any:
        resources = {"num_cpus": self.bundle["CPU"], "num_gpus": self.bundle.get("GPU", 0)}
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(Worker).options(**resources, scheduling_strategy=there).remote()

    def start_worker(self, node: str) -> None:
        name, actor = self.warm[node].pop(0) if self.warm.get(node) else self.create_worker(node)
        self.workers[name] = Running(actor, actor.run.remote(self.arguments), node)

    def note_end(self, name: str) -> None:
        """`run` of the worker `name` is over."""
        running = self.workers[name]
        death = None
        try:
            how, why = ray.get(running.end)
        except ray.exceptions.RayError as error:
            death, how = error, "died"
        has_died = how in ("died", "lacked memory")
        self.end_worker(name, f"it has {how}", was_needed=has_died)
        if death is not None:  # the others go on meanwhile
            how, why = self.explain_death(name, death)
        self.has_ended = how == "failed" or (how == "finished" and (self.directory / "result.json").is_file())
        self.is_closing = (self.is_closing or how == "finished") and bool(self.workers)
        if how == "lacked memory" and not running.is_leaving:
            self.on_warning(why)
        if has_died and not running.is_leaving:
            self.note_failure(why, OutOfMemoryError if how == "lacked memory" else RunError)
        if how == "refused":
            self.note_refusal(running.node, why)

    def explain_death(self, name: str, error: Exception) -> End:
        """Why the process of a worker has died: as its witness saw it, or as Ray tells."""
        if why := explain_memory_kill(error):
            return End("lacked memory", why)
        if why := explain_cause(error):
            return End("died", why)
        death = read_death(note_of(self.directory, name), self.directory.name, WITNESS_SECONDS)
        if isinstance(death, OutOfMemoryError):
            return End("lacked memory", f"{death.what}: {death.why}")
        return End("died", death.what if death else str(error).strip().splitlines()[-1])

    def note_failure(self, why: str, kind: type[RunError] = RunError) -> None:
        """A worker has died; raises an error of this kind when that happens again and again without a step between."""
        self.placed_at = float("-inf")  # look for a place for another at once
        self.failures = self.failures + 1 if self.step <= self.failed_at else 1
        self.failed_at = max(self.step, self.failed_at)
        if self.failures > self.scaling.max_failures:
            raise kind(
                f"the workers of run {self.directory.name} died {self.failures} times without a step between",
                why,
                advise(self.directory.name)
                if kind is OutOfMemoryError
                else f"see Ray's logs, then: raylab resume {self.directory.name}",
            )

    def note_refusal(self, node: str, why: str) -> None:
        """A worker on `node` was refused; the run goes on without that node, once it has taken steps elsewhere."""
        self.refused[node] = why
        if self.step == 0 or not self.workers:
            self.fail_refused()
        self.on_warning(f"a new worker was refused: {why}; training goes on without its node")

    def fail_refused(self) -> NoReturn:
        do = f"make code, packages and data the same on all nodes, then: raylab resume {self.directory.name}"
        why = "; ".join(sorted(set(self.refused.values())))
        raise RunError(f"the workers of run {self.directory.name} differ", why, do)

    def receive(self) -> None:
        """Pass on the metrics and loads that have come, and end the workers that were expelled."""
        delivery: Delivery = ray.get(self.membership.receive.remote(self.step))
        for name, record in delivery.work:
            self.work[name] = record
            self.write_work(record)
        first = first_on_node({name: running.node for name, running in self.workers.items()})
        for name, sample in delivery.node_samples:
            if name in first:
                self.on_node_sample(sample)
        new = [
            row for row in delivery.rows if row["step"] > self.step
        ]  # rank 0 sends again what the one before it has sent
        if new:
            self.on_rows(new)
            self.step = new[-1]["step"]
        gone = delivery.gone
        for name in [name for name in self.workers if name in gone and gone[name] != LEFT]:
            where = self.describe_place(name)
            self.end_worker(name, gone[name])
            self.note_failure(f"a worker was expelled, {where}: {gone[name]}")
        self.tell_slow(delivery.starting)

    def tell_slow(self, starting: Mapping[str, float]) -> None:
        """Warn, once, of each worker that takes long to start; by member since how many seconds it does."""
        slow = {name for name, seconds in starting.items() if seconds > LOAD_SECONDS} & self.workers.keys()
        for name in sorted(slow - self.told):
            self.on_warning(
                f"{self.describe_place(name)} is not ready after {starting[name]:.0f} s: it checks and loads the data, "
                "or its disk hangs; `ls` of the data directory on that node tells"
            )
        self.told |= slow

    def describe_place(self, name: str) -> str:
        """`worker-1 on node7`"""
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        return f"{name} on {hosts.get(self.workers[name].node, 'a node that is gone')}"

    def end_worker(self, name: str, why: str, was_needed: bool = True) -> None:
        ray.get(self.membership.remove.remote(name, why, was_needed))
        self.kill(self.workers.pop(name).actor)
        self.close_work(name)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)
        ray.kill(actor)

    def close_work(self, name: str) -> None:
        """Write that the worker `name` was there until now, if it has reported any work."""
        if (record := self.work.pop(name, None)) is not None:
            self.write_work({**record, "end": time.time()})

    def close(self) -> None:
        """End all workers and give their places back."""
        if self.is_closed:
            return
        self.is_closed = True
        self.drop_warm()
        for name, running in self.workers.items():
            self.kill(running.actor)
            self.close_work(name)
        with suppress(ray.exceptions.RayError):  # Ray itself may be ending; the allocator drops claims of the dead
            ray.get(self.allocator.release.remote(self.claim), timeout=CLOSE_SECONDS)
        ray.kill(self.membership)

    def drop_warm(self) -> None:
        for _, actor in chain(*self.warm.values()):
            self.kill(actor)
        self.warm.clear()


def first_on_node(nodes: dict[str, str]) -> set[str]:
    """Of the workers {name: node} the first of each node: all of a node send the same load."""
    return set({node: name for name, node in reversed(nodes.items())}.values())


def raise_failure(directory: Path) -> None:
    """Raise the error in the run's failure.json, if there is one."""
    if (failure := read_failure(directory)) is not None:
        raise failure


def outcome(directory: Path) -> dict[str, Any]:
    """Return the result that the workers wrote, or raise their failure."""
    raise_failure(directory)
    if not (directory / "result.json").is_file():
        raise IncompleteError(
            f"run {directory.name} ended without reaching its last step", do=f"raylab resume {directory.name}"
        )
    content = read_result(directory)
    if content["stopped"] == "planned" and content["steps"] != content["planned_steps"]:
        raise IncompleteError(f"run {directory.name} ended at step {content['steps']} of {content['planned_steps']}")
    return content
