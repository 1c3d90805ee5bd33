"""raylab cost: split the bills of Slurm jobs over runs, and print what runs, idle nodes and heads cost."""

import argparse
import sys
from collections import defaultdict
from typing import Any

from cluster.bills import HEAD
from cluster.slurm import Slurm
from jobs import cli
from jobs.common import costs, run_tracking
from jobs.common.console import say
from jobs.common.costs import Costs, RunWork, owner_of, show_energy, to_hours
from jobs.common.split_bill import HEAD as OF_HEAD
from jobs.common.split_bill import IDLE, LOST, START_UP, WORK, Line, count_parts

EXAMPLE = "raylab cost --experiment raylab"
OF_RUNS = (WORK, START_UP, LOST)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", metavar="E", help="list only the runs of this MLflow experiment (default: all)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    found = costs.collect_costs(Slurm())
    for directory in costs.tell_mlflow(found):
        run_tracking.forward_now(directory)
    if not args.quiet and args.json is None:
        say(table(found, args.experiment))
    return to_json(found, args.experiment)


def group(found: Costs, experiment: str | None) -> dict[str, list[RunWork]]:
    """The runs to list, and the trials of each search by its name."""
    groups: dict[str, list[RunWork]] = defaultdict(list)
    for run in found.runs:
        if experiment is None or run.record.experiment == experiment:
            groups[owner_of(run).name].append(run)
    return groups


def table(found: Costs, experiment: str | None) -> str:
    """The costs as aligned plain text: for each unit the runs, then what no listed run pays, then the sum."""
    groups = group(found, experiment)
    blocks = [_table_of(found, unit, groups) for unit in found.units]
    if not found.bills:
        blocks.append(_unbilled(groups))
    if any(bill.source == HEAD for bill in found.bills):
        blocks.append(f"* from {HEAD}: Slurm's accounting does not know these jobs")
    if running := [bill.job for bill in found.bills if bill.is_running]:
        blocks.append(f"still running, billed up to now: {', '.join(running)}")
    if found.unbilled:
        blocks.append(f"jobs without a bill: {', '.join(sorted(found.unbilled))}")
    return "\n\n".join(blocks)


def _table_of(found: Costs, unit: str, groups: dict[str, list[RunWork]]) -> str:
    listed = {run.name for runs in groups.values() for run in runs}
    rows = [["", *OF_RUNS, unit, "energy"]]
    for name, runs in groups.items():
        names = {run.name for run in runs}
        lines = [line for line in found.lines if line.run in names]
        parts = found.total(unit, lines)
        if any(parts.values()):
            label = name if len(runs) == 1 and runs[0].name == name else f"{name} ({len(runs)} trials)"
            marked = any(found.of_job[line.job].source == HEAD for line in lines)
            rows.append([f"{label}{' *' if marked else ''}", *_cells(parts), show_energy(run.energy() for run in runs)])
    others = found.total(unit, [line for line in found.lines if line.run and line.run not in listed])
    if any(others.values()):
        rows.append(["runs of other experiments", *_cells(others), ""])
    nobody = found.total(unit, [line for line in found.lines if not line.run])
    for kind, label in ((START_UP, "start of nodes"), (IDLE, "idle"), (OF_HEAD, "heads")):
        if nobody[kind]:
            rows.append([label, "", "", "", _show(nobody[kind]), ""])
    jobs = [bill for bill in found.bills if bill.unit == unit]
    whole = found.total(unit, found.lines)
    rows.append([f"bill of {len({bill.job for bill in jobs})} jobs", "", "", "", _show(sum(whole.values())), ""])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:5], strict=True)), row[5]])
        .rstrip()
        for row in rows
    )  # fmt: skip


def _cells(parts: dict[str, int]) -> list[str]:
    return [*(_show(parts[kind]) for kind in OF_RUNS), _show(sum(parts.values()))]


def _show(parts: int) -> str:
    return f"{to_hours(parts):.4f}"


def _unbilled(groups: dict[str, list[RunWork]]) -> str:
    if not groups:
        return "no run has a record of its work yet"
    lines = ["no Slurm job, so no bill; core-hours of workers:"]
    for name, runs in groups.items():
        hours = sum(run.core_hours() for run in runs)
        lines.append(f"  {name}  {hours:.4f}  {show_energy(run.energy() for run in runs)}")
    return "\n".join(lines)


def to_json(found: Costs, experiment: str | None) -> dict[str, Any]:
    """{"jobs": each start of a job with its bill, "lines": of all bills, "runs": work of the listed runs}.

    `parts` are integers that sum exactly: 3,600,000 are one of the unit.
    """
    return {
        "jobs": [
            {
                "job": bill.job,
                "start": bill.start,
                "end": bill.end,
                "nodes": bill.nodes,
                "rate": float(bill.rate),
                "unit": bill.unit,
                "amount": float(bill.amount),
                "parts": count_parts(bill),
                "source": bill.source,
                "running": bill.is_running,
            }
            for bill in found.bills
        ],
        "lines": [_line_to_json(line, found) for line in found.lines],
        "runs": [
            {"run": run.name, "core_hours": run.core_hours(), "energy_kwh": run.energy()}
            for runs in group(found, experiment).values()
            for run in runs
        ],
        "without_bill": sorted(found.unbilled),
    }


def _line_to_json(line: Line, found: Costs) -> dict[str, Any]:
    return {**line._asdict(), "amount": to_hours(line.parts), "unit": found.of_job[line.job].unit}


if __name__ == "__main__":
    sys.exit(cli.main(["cost", *sys.argv[1:]]))
