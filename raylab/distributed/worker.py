"""One worker of a run: an actor in a process of its own, which trains with the others until the run is over."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ray

from raylab.distributed.membership import WATCH_SECONDS
from raylab.errors import RaylabError, RunError
from raylab.files import hash_files
from raylab.interfaces import interface_of
from raylab.memory import explain_memory_error
from raylab.training.run_failure import explain_own_failure, write_failure
from raylab.witness import witness

SAMPLE_SECONDS = 1.0  # between two questions whether a sample of the node's load is due
PACKAGES = ("torch", "numpy", "polars")  # what decides the bits of a step
ROOT = Path(__file__).parents[1]


class End(NamedTuple):
    """How a worker ended: "finished", "left", "failed" (failure.json says why), "refused", "died" or "lacked memory"
    (`why` says how)."""

    how: str
    why: str = ""


class Worker:
    """The actor of one worker: `belong`, `load_libraries` and `run` are called in this order, or the first two in the
    other, if it was started before its run."""

    def belong(self, name: str, membership: Any) -> None:
        """Be the worker `name` of the run of `membership`, and tell it from now on that this process is alive."""
        self.name, self.membership = name, membership
        threading.Thread(target=self._greet, name="greeting", daemon=True).start()

    def load_libraries(self) -> None:
        """Import what training needs, while this worker waits for its work."""
        import raylab.distributed.member
        import raylab.training.run  # noqa: F401

    def run(self, arguments: Mapping[str, Any]) -> End:
        """Train until the run is over. Whatever is raised is a crash of this worker, not the end of the run."""
        # In the method, so that the process that starts it is quick to answer
        import torch

        from raylab.distributed.member import Expelled, Member, Refused
        from raylab.distributed.metering import meter_work
        from raylab.tasks.plugins import load_all
        from raylab.tasks.recipes import parse_recipe
        from raylab.training.loop import AttemptHandedOver
        from raylab.training.run import execute, load_samples
        from raylab.training.step_times import StepTimes

        directory, parent = Path(arguments["directory"]), arguments["parent"]
        load_all(arguments["plugins"])
        recipe = parse_recipe(arguments["recipe"])
        interface = interface_of(ray.util.get_node_ip_address())
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # = is exact; else eth1 means eth10 as well
        sampling = threading.Thread(target=self._sample_node, args=(arguments["sample_node"],), daemon=True)
        sampling.start()
        identity = identify(arguments["data_hash"])
        member = Member(self.name, self._call, recipe.scaling.silence_seconds, identity, recipe.scaling.gpu)
        meter = meter_work(self.name, recipe.scaling, self._send_work)
        sizes = arguments["time_sums"]
        step_times = StepTimes(directory, self.name, recipe, sizes, meter.read_joules) if sizes else None
        try:
            with meter, witness(note_of(directory, self.name)):
                execute(
                    recipe,
                    *load_samples(recipe, Path(arguments["data"])),
                    directory,
                    lambda rows: int(self._call("send", rows)),
                    None if parent is None else Path(parent),
                    peers=member,
                    on_training=meter.note_training,
                    step_times=step_times,
                )
        except AttemptHandedOver:
            member.leave()
            return End("left")
        except Expelled as error:
            raise RunError("this worker was expelled", str(error)) from error
        except Refused as error:
            return End("refused", str(error))
        except RaylabError as error:
            if member.signal.expelled is not None:  # the others go on: this is not the run's failure
                raise
            write_failure(directory, error)
            return End("failed")
        except Exception as error:
            if failure := explain_memory_error(error, directory.name):  # there may be room in another process
                return End("lacked memory", f"{failure.what}: {failure.why}")
            own = explain_own_failure(error)
            if own is None or isinstance(error, OSError | torch.AcceleratorError):  # another worker may do without it
                raise
            write_failure(directory, own)
            return End("failed")
        return End("finished")

    def _call(self, method: str, *values: Any) -> Any:
        return ray.get(getattr(self.membership, method).remote(*values))

    def _send_work(self, record: dict[str, Any]) -> None:
        with suppress(ray.exceptions.RayError):  # the driver is gone; what it has written says until when
            self._call("send_work", self.name, record)

    def _greet(self) -> None:
        """Tell the membership that this process is alive, until it trains and its watch does so."""
        with suppress(ray.exceptions.RayError):  # the run is over
            while self._call("greet", self.name):
                time.sleep(WATCH_SECONDS)

    def _sample_node(self, sample_node: Callable[[], dict[str, float]]) -> None:
        """Send the load of this node whenever a sample is due, until the process ends."""
        while True:
            if sample := sample_node():
                self._call("send_node_sample", self.name, sample)
            time.sleep(SAMPLE_SECONDS)


def note_of(directory: Path, worker: str) -> Path:
    """Where the witness of a run's worker notes its death."""
    return directory / "deaths" / f"{worker}.json"


def identify(data_hash: str) -> dict[str, str]:
    """What must be the same on all workers of a run, by name."""
    code = hash_files(sorted(ROOT.rglob("*.py")), ROOT)
    versions = {f"version of {package}": version(package) for package in PACKAGES}
    return {"raylab code": code[:16], "data": data_hash[:16], **versions}
