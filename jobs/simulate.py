"""raylab simulate: run a resumable sweep of the lung model as Ray tasks, or plot one virtual patient."""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, outputs, provenance, run_tracking
from jobs.common.console import say
from jobs.common.duration import duration
from jobs.common.session import ray_session
from raylab.config.assignments import parse_assignments
from raylab.data.lung.meta import SweepMeta
from raylab.data.lung.sweep_dataset import finish
from raylab.errors import UsageError
from raylab.files import atomic_write, write_json
from raylab.physiology import sweep
from raylab.physiology.parameters import check, inputs
from raylab.physiology.steady import STATUS, steady_state
from raylab.physiology.sweep import Sweep
from raylab.tasks import TASKS
from tracking.outbox import Outbox, append_new_metrics
from tracking.provenance import save_png

EXAMPLE = "raylab simulate living --size 65536 --out sweeps/living"
VIEW = "view"
TELL_SECONDS = 5.0
COURSE_min = 150.0
MANOEUVRE = ("10:fio2=0.8", "30:peep_cmH2O=15", "110:rate_per_min=28")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", choices=[*sweep.RECIPES, VIEW], help="living: all inputs vary; patient: only the "
                        "inputs of --set vary; view: tornado plot and time course of one patient")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="INPUT=VALUE|DIST",
                        help="shunt=0.3, or shunt=uniform(0.05,0.4), loguniform(a,b), normal(mean,sd,low,high), "
                        "lognormal(median,log_sd,low,high)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the sweep on shared storage; the same "
                        "command continues an interrupted sweep")  # fmt: skip
    parser.add_argument("--size", type=int, help="rows (grid: levels of each input; default: of the sweep's recipe)")
    parser.add_argument("--design", choices=["sobol", "lhs", "grid"],
                        help="sampling design (default: of the sweep's recipe)")  # fmt: skip
    parser.add_argument("--seed", type=int, help="seed of the design (default: of the sweep's recipe)")
    parser.add_argument("--chunk", type=int, help="rows per task and file (default: of the sweep's recipe)")
    parser.add_argument("--compiled", action="store_true", help="solve with torch.compile: several times faster after "
                        "about 10 s of compilation; needs a C++ compiler on every node")  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="CPUs of a local Ray; 0 computes in this "
                        "process; if RAY_ADDRESS is set, its whole cluster is used (default: 0)")  # fmt: skip
    parser.add_argument("--change", nargs="+", action="extend", metavar="MINUTE:SETTING=VALUE",
                        help=f"view: changes of ventilator settings (default: {' '.join(MANOEUVRE)})")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=COURSE_min,
                        help=f"view: length of the time course in minutes (default: {COURSE_min:g})")  # fmt: skip
    parser.add_argument("--name", help="name of the tracked run (default: that of --out)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    changes = {name: str(value) for name, value in parse_assignments(args.set).items()}
    if args.sweep == VIEW:
        return view(args, changes)
    if args.out is None:
        raise UsageError("a sweep needs --out", do=f"for example: {EXAMPLE}")
    options = {name: getattr(args, name) for name in ("size", "design", "seed", "chunk", "compiled")}
    made = sweep.recipe(args.sweep, changes, **{k: v for k, v in options.items() if v is not None})
    return run(made, args.out.absolute(), args)


def run(made: Sweep, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Start or continue the sweep in `out`; it stays one MLflow run however often it is interrupted."""
    task = next(task for task in TASKS.values() if task.meta is SweepMeta)
    outputs.check_directory(out, "--out")
    home.check_writable()
    chunks = sweep.begin(made, out)
    directory = run_directory(args.name or out.name, out)
    params = {"design": made.design, "size": made.size, "rows": made.rows(), "chunk": made.chunk, **made.inputs}
    with run_tracking.open_work(directory, "simulate", "sweep", made.seed, True, "lung model sweep", out, params):
        progress = Rate(made, args.quiet, directory)
        remote = args.workers > 0 or bool(os.environ.get("RAY_ADDRESS"))
        with ray_session(args.workers, directory / "ray.log") if remote else nullcontext():
            from raylab.distributed.map import run_chunks

            run_chunks(sweep.write_chunk, chunks, tell=progress)
        meta = finish(made, out, task.name)
        Outbox(directory / "outbox").append(
            {"kind": "tags", "values": {"raylab.data_hash": meta.data_hash}},
            {"kind": "artifact", "path": str(out / "meta.json"), "to": ""},
        )
    task.read_meta(out)  # raises if the task could not load it
    facts = {"rows": meta.rows, "status": meta.status, "counts": meta.counts, "data_hash": meta.data_hash}
    if not args.quiet:
        say(f"{out}: {meta.rows:,} rows, " + "; ".join(f"{n:,} {what}" for what, n in meta.status.items()))
        say(f"data hash {meta.data_hash}")
        say(f"next: raylab train {task.name} --data {out}")
    run_record = home.note(directory)
    return {"run_id": run_record.run_id, "name": directory.name, "out": str(out), "synthetic": True, **facts}


def view_directory(name: str | None) -> Path:
    """The run of a view: the one of this name that was begun, or a new one."""
    begun = None if name is None else home.find_work("simulate", home.home() / "runs" / name, name)
    return begun or home.new_run(name, "patient")


def run_directory(name: str, out: Path) -> Path:
    """The run that tracks the sweep in `out`: the existing one, or a new one."""
    directory = home.home() / "runs" / name
    if (directory / "run.json").is_file():
        run_record = home.note(directory)
        if run_record.kind == "simulate" and run_record.data == str(out):
            return directory
        raise UsageError(f"there is already a run named '{name}'", f"of {run_record.data}", "choose another --name")
    return home.new_run(name, "sweep")


class Rate:
    """Called after every chunk: prints progress every TELL_SECONDS, and logs rows and rows/s to the run."""

    def __init__(self, made: Sweep, quiet: bool, directory: Path) -> None:
        self.made, self.quiet, self.outbox = made, quiet, Outbox(directory / "outbox")
        self.began, self.reported_at, self.first = time.monotonic(), 0.0, 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.reported_at == 0.0:
            self.first, self.began, self.reported_at = done, now, now
            if done and not self.quiet:
                say(f"{done} of {total} chunks exist already")
            if done == total:  # the sweep was interrupted after its last chunk
                append_new_metrics(self.outbox, done, {"rows": self.made.rows()})
            return
        if done < total and now - self.reported_at < TELL_SECONDS:
            return
        self.reported_at = now
        rows = min(done * self.made.chunk, self.made.rows())
        pace = (rows - self.first * self.made.chunk) / (now - self.began)
        self.outbox.append({"kind": "metrics", "step": done, "values": {"rows": rows, "rows_per_s": pace}})
        if not self.quiet:
            left = duration((self.made.rows() - rows) / pace)
            say(f"{rows:,} of {self.made.rows():,} rows  {pace:,.0f} rows/s  {left} left")


def view(args: argparse.Namespace, changes: dict[str, str]) -> dict[str, Any]:
    """Log the tornado plot and time course of one patient as artifacts of a tracked run."""
    from raylab.physiology import views  # imports matplotlib, which sweeps do not need

    try:
        values = {name: float(value) for name, value in changes.items()}
    except ValueError as error:
        raise UsageError("view requires numbers, not distributions", str(error), "--set shunt=0.3") from error
    steps = [change(text) for text in args.change or MANOEUVRE]
    patient = inputs(values)
    check(patient)
    state = steady_state(patient)
    if int(state.status) != 0:
        raise UsageError(f"the model has no solution for this patient: {STATUS[int(state.status)]}", do="change --set")
    table = views.one_at_a_time(patient)
    words = ", ".join(f"{name} {value:g}" for name, value in values.items()) or "usual values"
    title = f"virtual patient (synthetic): {words}"
    figures = {"tornado": views.tornado(table, title), "course": views.traces(patient, steps, args.minutes, title)}
    directory = view_directory(args.name)
    params = {**values, "minutes": args.minutes, "change": " ".join(args.change or MANOEUVRE)}
    with run_tracking.open_work(
        directory, "simulate", "patient", 0, True, "lung model", directory, params, system=False
    ):
        outbox = Outbox(directory / "outbox")
        (directory / "plots").mkdir(exist_ok=True)
        for name, figure in figures.items():
            path = directory / "plots" / f"{name}.png"
            with atomic_write(path) as beside:
                save_png(figure, beside, [provenance.describe(directory)], dpi=110)
            outbox.append({"kind": "artifact", "path": str(path), "to": "plots"})
        write_json(directory / "tornado.json", table)
        outbox.append({"kind": "artifact", "path": str(directory / "tornado.json"), "to": ""})
        here = {name: value.item() for name, value in state.values.items()}
        append_new_metrics(outbox, 0, here)
    if not args.quiet:
        say("  ".join(f"{name} {value:.4g}" for name, value in here.items()))
        say(f"wrote {directory / 'plots' / 'tornado.png'} and course.png")
    run_id = home.note(directory).run_id
    return {"run_id": run_id, "name": directory.name, "directory": str(directory), "outputs": here, "tornado": table}


def change(text: str) -> tuple[float, dict[str, float]]:
    """`10:fio2=0.8` as (10.0, {"fio2": 0.8})."""
    minute, colon, rest = text.partition(":")
    try:
        if not colon:
            raise ValueError("there is no ':'")
        return float(minute), {name: float(value) for name, value in parse_assignments([rest]).items()}
    except (ValueError, TypeError) as error:
        raise UsageError(f"'{text}' is not MINUTE:SETTING=VALUE", str(error), "--change 10:fio2=0.8") from error


if __name__ == "__main__":
    sys.exit(cli.main(["simulate", *sys.argv[1:]]))
