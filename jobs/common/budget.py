"""Whether what is about to be submitted to a cluster costs more than what is left."""

from pathlib import Path

from cluster import bills
from cluster.directory import Directory
from cluster.sites import Site
from cluster.slurm import Slurm
from jobs.common import costs
from jobs.common.submitted import Submission, arguments_of

VERBS = ("train", "tune")


def check_command(command: list[str], directory: Directory) -> None:
    """Raise UsageError if `command` trains a run or search that costs more than what is left of the cluster's budget.

    Nothing is measured where no budget is known.
    """
    words = find_verb(command)
    if words is not None and has_budget(directory.site):
        from jobs import estimate  # loads torch

        estimate.estimate(words, directory.site.name)


def check_call(call: Submission, directory: Directory) -> None:
    """Like `check_command`, for a call that Python code submits."""
    if call.function in VERBS and has_budget(directory.site):
        from jobs import estimate  # loads torch

        estimate.estimate_call(call.function, arguments_of(call), directory.site.name)


def has_budget(site: Site) -> bool:
    """Whether the site file, or Slurm for the account, limits what may be spent."""
    billing = costs.billing_of(site.name, site.billing)
    return billing.budget is not None or bool(bills.remaining_hours(Slurm(), site.account))


def find_verb(command: list[str]) -> list[str] | None:
    """The verb and the arguments of a command that trains: raylab train ..., python -m jobs.train ...; else None."""
    match command:
        case [_, "-m", "jobs.cli", verb, *more]:
            words = [verb, *more]
        case [_, "-m", module, *more]:
            words = [module.removeprefix("jobs."), *more]
        case [program, verb, *more] if Path(program).name == "raylab":
            words = [verb, *more]
        case _:
            return None
    return words if words[0] in VERBS else None
