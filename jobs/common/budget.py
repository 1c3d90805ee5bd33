"""Whether what is about to be submitted to a cluster costs more than what is left."""

from pathlib import Path

from cluster import bills
from cluster.directory import Directory
from cluster.slurm import Slurm
from jobs.common import costs

VERBS = ("train", "tune")


def check_command(command: list[str], directory: Directory) -> None:
    """Raise UsageError if `command` trains a run or search that costs more than what is left of the cluster's budget.

    Nothing is measured where no budget is known.
    """
    words, site = find_verb(command), directory.site
    billing = costs.billing_of(site.name, site.billing)
    if words is not None and (billing.budget is not None or bills.remaining_hours(Slurm(), site.account)):
        from jobs import estimate  # loads torch

        estimate.estimate(words, site.name)


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
