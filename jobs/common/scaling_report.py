"""What a scaling benchmark has found: summarised, as a table in Markdown, and as a report with figures."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.common import scaling_figures
from jobs.common.costs import JOULES
from jobs.common.scaling_model import Network, StepModel, Sum, busiest_samples, fit_network
from jobs.common.scaling_points import FLOAT_BYTES, PARTS, Point
from raylab.config.recipe import Recipe
from raylab.documents import to_plain
from raylab.files import atomic_write, write_json, write_text

MOST_WORKERS = 64  # up to which the model is drawn, or four times as many as were measured
MILLION = 1_000_000
BUSY = 0.5  # processes per core from which a measurement is said to have been disturbed
PUBLISHED = (
    {
        "what": "COVID-Net with Horovod on 1 to 32 GPU nodes",
        "scaling": "strong",
        # 207, 187, 132, 93, 65 and 54 minutes on 1, 2, 4, 8, 16 and 32 nodes
        "efficiency": {"2 nodes": 0.55, "4": 0.39, "8": 0.28, "16": 0.20, "32": 0.12},
        "source": "Diagnostics 2023, 13(3):391",
    },
    {
        "what": "Horovod on 512 Pascal GPUs in 128 servers, RoCE at 25 Gbit/s",
        "scaling": "weak",  # they kept the batch of each GPU
        "efficiency": {"Inception V3": 0.90, "ResNet-101": 0.90, "VGG-16": 0.68},
        "source": "Horovod's documentation, docs/benchmarks.rst; method: Sergeev & Del Balso 2018, arXiv 1802.05799",
    },
)
"""Efficiencies on other machines and networks."""


def summarise(recipe: Recipe, parameters: int, synthetic: bool, points: list[Point]) -> dict[str, Any]:
    """All results as JSON: one row for each point, the model with its errors, and what to know about them."""
    sums = [Sum(p.workers, size, seconds) for p in points for size, seconds in p.sums.items()]
    undisturbed = [
        Sum(p.workers, size, seconds) for p in points if not p.shares_cores for size, seconds in p.sums.items()
    ]
    network = fit_network(undisturbed or sums)
    model = None if network is None else StepModel(compute_times(points), network, FLOAT_BYTES * parameters)
    rows = [describe_point(p, points, recipe, model) for p in points]
    errors = [abs(row["model_error"]) for row in rows if row["model_error"] is not None and not row["shares_cores"]]
    return {
        "task": recipe.task,
        "model": recipe.model.name,
        "synthetic": synthetic,
        "parameters": parameters,
        "batch": recipe.loop.global_batch_size,
        "shards": recipe.loop.shards,
        "cpus_per_worker": recipe.scaling.cpus_per_worker,
        "points": rows,
        "network": None if network is None else network._asdict(),
        "sums": [one._asdict() for one in sums],
        "modelled": [] if model is None else list(extrapolate(model, recipe, points)),
        "largest_error": max(errors, default=None),
        "notes": list(notes(points, recipe, network)),
        "published": PUBLISHED,
    }  # fmt: skip


def compute_times(points: list[Point]) -> dict[int, float]:
    """Seconds that a worker takes for numbers of samples: as one process does, times what one worker takes for the
    whole batch against the process, if one worker was measured."""
    alone = {p.batch: p.parts.compute + p.parts.input for p in points if p.scaling == "process"}
    one = next((p for p in points if p.workers == 1), None)
    ratio = 1.0 if one is None else (one.parts.compute + one.parts.input) / alone[one.batch]
    return {samples: ratio * seconds for samples, seconds in alone.items()}


def describe_point(point: Point, points: list[Point], recipe: Recipe, model: StepModel | None) -> dict[str, Any]:
    """A row: rates against the smallest number of workers of the same scaling, cost, and what the model says."""
    first = reference(point, points)
    workers = max(1, point.workers)
    speed_up = None if first is None else point.rate / first.rate
    core_hours = workers * recipe.scaling.cpus_per_worker * point.seconds / point.batch * MILLION / 3600
    modelled = None
    if model is not None and point.workers > 1 and model.covers(point.busiest):
        modelled = model.step_seconds(point.workers, point.busiest)
    step = point.step
    assert step.low is not None and step.high is not None
    return {
        "scaling": point.scaling,
        "workers": point.workers,
        "batch": point.batch,
        "shards": point.shards,
        "steps": point.steps,
        "samples_per_s": point.rate,
        "samples_per_s_low": point.batch / step.high,
        "samples_per_s_high": point.batch / step.low,
        "speed_up": speed_up,
        "efficiency": None if first is None or speed_up is None else speed_up * first.workers / point.workers,
        "step_seconds": point.seconds,
        **{name: getattr(point.parts, name) for name in PARTS},
        "cpu_hours_per_million": point.parts.cpu / point.batch * MILLION / 3600,
        "core_hours_per_million": core_hours,
        "kwh_per_million": {
            kind: joules / JOULES / point.batch * MILLION for kind, joules in point.parts.joules.items()
        },
        "shares_cores": point.shares_cores,
        "modelled_samples_per_s": None if modelled is None else point.batch / modelled,
        "model_error": None if modelled is None else modelled / point.seconds - 1,
    }


def reference(point: Point, points: list[Point]) -> Point | None:
    """The point against which a point is compared: that with the fewest workers; none for one process."""
    if point.workers == 0:
        return None
    own = [
        p for p in points if p.workers > 0 and (p.scaling == "strong" if p.workers == 1 else p.scaling == point.scaling)
    ]
    return min(own, key=lambda p: p.workers)


def extrapolate(model: StepModel, recipe: Recipe, points: list[Point]) -> Iterator[dict[str, Any]]:
    """What the model says for 1, 2, 4, ... workers, as far as the samples of a worker lie between measured sizes."""
    batch, shards = recipe.loop.global_batch_size, recipe.loop.shards
    most = max(MOST_WORKERS, 4 * max(p.workers for p in points))
    counts = [1 << k for k in range(most.bit_length()) if 1 << k <= most]
    for scaling, of in (("strong", 1), ("weak", 0)):
        for workers in counts:
            whole = batch if of else batch * workers
            if of and workers > batch:
                continue
            busiest = busiest_samples(whole, max(shards, workers) if of else shards * workers, workers)
            if model.covers(busiest):
                seconds = model.step_seconds(workers, busiest)
                yield {"scaling": scaling, "workers": workers, "batch": whole, "samples_per_s": whole / seconds}


def notes(points: list[Point], recipe: Recipe, network: Network | None) -> Iterator[str]:
    """What a reader must know to take the figures for what they are."""
    sharing = sorted({p.workers for p in points if p.shares_cores})
    if sharing:
        cores = max(p.cores for p in points if p.shares_cores)
        yield (f"{' and '.join(map(str, sharing))} workers shared {cores:g} cores: with more workers than cores they "
               "take turns, so these points show no scaling, and the model's error does not count them")  # fmt: skip
    busy = max(p.load for p in points)
    if busy > BUSY:
        yield f"other processes ran on the machine: up to {busy:.1f} per core before a measurement began"
    nodes = max(p.nodes for p in points)
    if network is None:
        yield "there is no model: it needs sums between two workers or more"
    elif nodes == 1:
        yield ("all workers were on one node, so alpha and beta are those of its memory: on several nodes measure "
               "again, because a network is slower")  # fmt: skip
    else:
        yield f"alpha and beta are those of the network between up to {nodes} nodes, and of their memory"
    if recipe.scaling.gpu:
        yield "on GPUs the time of a step is not divided: all of it counts as compute"
    kinds = {kind for p in points for kind in p.parts.joules}
    if recipe.scaling.gpu and "gpu" not in kinds:
        yield "the energy of the GPUs was not measured: they have no counter that may be read"
    if "cpu" not in kinds:
        yield ("the energy of the processors was not measured: that needs a Slurm job that has its whole node, and "
               "counters that may be read")  # fmt: skip


def table(result: dict[str, Any]) -> list[list[str]]:
    """The head of the table and its rows, as text; without energy where none was measured."""
    has_energy = any(row["kwh_per_million"] for row in result["points"])
    rows = [cells(row, has_energy) for row in result["points"]]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def cells(row: dict[str, Any], has_energy: bool) -> dict[str, str]:
    """A row as text, by column."""
    rate, low, high = (row[f"samples_per_s{end}"] for end in ("", "_low", "_high"))
    energy = " + ".join(f"{value:.3g} ({kind.upper()})" for kind, value in row["kwh_per_million"].items())

    def shown(name: str, form: str) -> str:
        return "–" if row[name] is None else format(row[name], form)

    return {
        "scaling": "one process" if row["scaling"] == "process" else row["scaling"],
        "workers": f"{row['workers']}{' (share cores)' if row['shares_cores'] else ''}",
        "batch": str(row["batch"]),
        "samples/s [95% CI]": f"{rate:,.4g} [{low:,.4g}, {high:,.4g}]",
        "speed-up": shown("speed_up", ".2f"),
        "efficiency": shown("efficiency", ".0%"),
        "model": shown("modelled_samples_per_s", ",.4g"),
        "error of its step": shown("model_error", "+.0%"),
        "step, ms": f"{1000 * row['step_seconds']:.1f}",
        **{name: f"{1000 * row[name]:.1f}" for name in PARTS},
        "core-hours *": f"{row['core_hours_per_million']:.3g}",
        "CPU-hours *": f"{row['cpu_hours_per_million']:.3g}",
        **({"kWh *": energy or "not measured"} if has_energy else {}),
    }


FOOTNOTE = "* for a million samples: the hours of the cores that the workers hold, and the CPU time that they use"


def markdown(result: dict[str, Any]) -> str:
    """The table of a benchmark in Markdown, with what to know about it."""
    data = ", SYNTHETIC data" if result["synthetic"] else ""
    lines = [f"# Scaling of {result['task']}{data}", "", describe_run(result), ""]
    head, *rows = [f"| {' | '.join(cells)} |" for cells in table(result)]
    lines += [head, "|---" * (head.count(" | ") + 1) + "|", *rows, "", FOOTNOTE, "", describe_model(result), ""]
    lines += [f"- {note}" for note in result["notes"]]
    lines += ["", "Published, on other machines and networks:", ""]
    return "\n".join([*lines, *(f"- {text}" for text in describe_published(result))]) + "\n"


def describe_run(result: dict[str, Any]) -> str:
    first = result["points"][0]
    size = f"{result['parameters']:,} parameters, batch {result['batch']} in {result['shards']} shards"
    return f"{result['model']}, {size}, {first['steps']} steps of each point"


def describe_model(result: dict[str, Any]) -> str:
    """The model in one sentence or two, with its errors."""
    network = result["network"]
    if network is None:
        return "No model."
    error = result["largest_error"]
    against = "was checked against no step" if error is None else f"at most {error:.0%} off the steps"
    bandwidth = "no measurable time for bytes" if network["beta"] == 0 else f"{1e-9 / network['beta']:.3g} GB/s"
    alpha = f"alpha {1000 * network['alpha']:.3g} ms for each message and {bandwidth}"
    fit = f"at most {network['error']:.0%} off the measured sums"
    return (f"Model: the measured computation of a worker's samples, and an all-reduce with {alpha}. It is {fit}, and "
            f"{against} measured on two workers or more.")  # fmt: skip


def describe_published(result: dict[str, Any]) -> list[str]:
    """The published figures, for reference, a sentence for each source."""

    def describe(one: dict[str, Any]) -> str:
        efficiencies = ", ".join(f"{name} {value:.0%}" for name, value in one["efficiency"].items())
        return f"{one['what']}, {one['scaling']} scaling: efficiency {efficiencies} ({one['source']})"

    return [describe(one) for one in result["published"]]


def write(result: dict[str, Any], out: Path) -> None:
    """Write all files of a benchmark into `out`."""
    write_json(out / "table.json", to_plain(result))
    write_text(out / "table.md", markdown(result))
    figures = scaling_figures.draw(result)
    for name, figure in figures.items():
        with atomic_write(out / f"{name}.png") as beside:
            figure.savefig(beside, format="png", dpi=110)
    write_text(out / "report.html", render(result, {name: out / f"{name}.png" for name in figures}))


def render(result: dict[str, Any], pictures: dict[str, Path]) -> str:
    """The report as one HTML file that needs nothing else."""
    # autoescape, because a model's name may come from outside
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}
    return environment.get_template("scaling_report.html.j2").render(
        result=result,
        title=f"raylab report: scaling of {result['task']}",
        table=table(result),
        footnote=FOOTNOTE,
        run=describe_run(result),
        model=describe_model(result),
        published=describe_published(result),
        images=images,
        texts=scaling_figures.TEXTS,
    )
