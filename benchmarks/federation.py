"""Compare exact federated training, averaged weights (FedAvg), each site alone and pooled training on PhysioNet 2012.

    python benchmarks/federation.py --physionet DIR --scratch DIR [--seeds 3] [--epochs 20] [--landmark 12]

Three sites, split by the type of unit, so that they are not alike: coronary, surgical (with cardiac surgery) and
medical. Each prepares its own stays; the task is death in hospital. All methods take the same steps of the same rows.
Federated runs are three processes that share only an exchange directory; one run on pooled rows must have the weights
of the exact ones, to the bit, and stands for them with the other seeds. "Alone" takes the rows that the site gives
to a step. What is done is kept in the scratch directory: the same command continues.

It prints a table: AUROC on the test rows of each site and of all, as the mean over the seeds, with 95% CI over 1,000
resamples of patients; the paired difference to exact; rounds, bytes that a site sends, and seconds per step of the
first site, with those in which it waited for others. All sites share this machine, with a thread each, so these say
little where it has fewer cores than sites, or other work.
"""

import argparse
import io
import json
import multiprocessing
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raylab.config.overrides import override
from raylab.data.icu.prepare import prepare_icu
from raylab.evaluation.intervals import Floats, resample_weights
from raylab.evaluation.metrics import _auroc_unsorted
from raylab.federation.agreement import Agreement, LocalSteps, propose, sign, write_agreement
from raylab.federation.exchange import Exchange
from raylab.federation.keys import PrivateKeys
from raylab.federation.run import join, train
from raylab.federation.sums import PooledSums, SiteSums
from raylab.files import write_json
from raylab.tasks import find_task
from raylab.tasks.mortality import LABELS
from raylab.tasks.recipes import shipped_recipe
from raylab.training.checkpoint import list_checkpoints
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import execute, read_model

TASK, BOOTSTRAPS = "mortality", 1000
UNITS = {"coronary": (1,), "surgical": (2, 4), "medical": (3,)}  # values of ICUType
ROWS = {"coronary": 18, "surgical": 62, "medical": 48}  # of a step: in proportion to the stays
METHODS: Mapping[str, LocalSteps | None] = {"exact": None, "average/5": 5, "average/epoch": "epoch"}
TITLES = {
    "exact": "exact sums (= pooled)",
    "average/5": "averaged every 5 steps",
    "average/epoch": "averaged every epoch",
    "alone": "each site alone",
}


def split_by_unit(physionet: Path, out: Path) -> None:
    """Write the records of each unit as a directory that `prepare` reads."""
    sites = {str(unit): name for name, units in UNITS.items() for unit in units}
    for name in UNITS:
        (out / name / "set-a").mkdir(parents=True)
        (out / name / "Outcomes-a.txt").write_bytes((physionet / "Outcomes-a.txt").read_bytes())
    with tarfile.open(fileobj=io.BytesIO((physionet / "set-a.tar.gz").read_bytes())) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                text = file.read()
                unit = next(line for line in text.decode().splitlines() if ",ICUType," in line).rpartition(",")[2]
                (out / sites[unit] / "set-a" / Path(member.name).name).write_bytes(text)
    for name in UNITS:  # only the outcomes of the site's own stays
        table = pl.read_csv(out / name / "Outcomes-a.txt", infer_schema=False)
        own = [path.stem for path in (out / name / "set-a").iterdir()]
        table.filter(pl.col("RecordID").is_in(own)).write_csv(out / name / "Outcomes-a.txt")


def prepare_sites(physionet: Path, scratch: Path, landmark: float) -> dict[str, Path]:
    """Return the prepared directory of each site."""
    raw, data = scratch / "raw", {name: scratch / "data" / name for name in UNITS}
    if not raw.exists():
        split_by_unit(physionet, raw)
    for name, directory in data.items():
        if not (directory / "meta.json").is_file():
            prepare_icu(
                TASK, "physionet2012", raw / name, directory, landmark=landmark, rule=LABELS["in-hospital-death"]
            )
    return data


def agree(seed: int, epochs: int, local_steps: LocalSteps | None, keys: list[PrivateKeys]) -> Agreement:
    recipe = override(shipped_recipe(TASK, smoke=False), {"seed": seed, "loop.epochs": epochs})
    identities = [each.identity() for each in keys]
    return propose(recipe, identities, [*ROWS.values()], [1] * len(ROWS), None, "avx2", 3600.0, local_steps)


def run_site(exchange: Path, keys: PrivateKeys, agreement: Agreement, data: Path, directory: Path) -> None:
    """Train as one site and write what it has sent, beside its run."""
    import torch

    torch.set_num_threads(1)
    directory.mkdir(parents=True, exist_ok=True)

    def saved_step() -> int:
        here = list_checkpoints(directory / "checkpoints")
        return int(here[-1].name.removeprefix("step-")) if len(here) > 1 else 0

    sums = SiteSums(Exchange(exchange, agreement, keys, saved_step), keys, agreement, print)
    federation = join(agreement, {keys.site: data}, sums)
    began, waited = time.perf_counter(), sums.seconds_waited
    result = train(federation, directory, lambda rows: 0)
    seconds = {"per_step": time.perf_counter() - began, "waited": sums.seconds_waited - waited}
    traffic = {"rounds": sums.rounds, "bytes": sums.exchange.bytes_sent, "weights": result["weights_sha256"]}
    traffic |= {name: value / result["steps"] for name, value in seconds.items()}
    write_json(directory / "traffic.json", traffic)


def train_federated(agreement: Agreement, keys: list[PrivateKeys], data: Mapping[str, Path], out: Path) -> None:
    """Train with one process for each site."""
    exchange = out / "exchange"
    write_agreement(agreement, exchange)
    for each in keys:
        sign(agreement, each, exchange)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raylab.federation.run"])
    sites = [
        context.Process(target=run_site, args=(exchange, each, agreement, data[each.site], out / each.site))
        for each in keys
    ]
    for site in sites:
        site.start()
    for site in sites:
        site.join()
    if any(site.exitcode for site in sites):
        sys.exit(f"a site failed, see above; remove {out} and run again")


def train_pooled(agreement: Agreement, data: Mapping[str, Path], out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    return str(train(join(agreement, data, PooledSums(agreement, {})), out, lambda rows: 0)["weights_sha256"])


def train_alone(agreement: Agreement, name: str, data: Path, out: Path) -> None:
    """The recipe of the agreement on the rows of one site: as many rows of it in a step as in the federation."""
    recipe = override(agreement.parse_recipe(), {"loop.global_batch_size": ROWS[name], "loop.shards": 1})
    task = find_task(TASK)
    train_split = task.load(data, "train", recipe.data, None)
    val = task.load(data, "val", recipe.data, train_split.spec)
    out.mkdir(parents=True, exist_ok=True)
    execute(recipe, train_split, val, out, lambda rows: 0)


def predict_test(directory: Path, data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, probabilities and patients of the test rows of one site."""
    task, recipe, spec, model = read_model(directory)
    samples = task.load(data, "test", recipe.data, spec)
    return samples.y, predict(task, model, samples, ProcessGroup(), recipe, "cpu"), samples.group


def train_all(data: Mapping[str, Path], scratch: Path, seeds: int, epochs: int) -> dict[str, Any]:
    """Train what is not trained yet. Returns {method: {site: [(y, p, patients) of each seed]}}, and the traffic."""
    predictions: dict[str, dict[str, list[Any]]] = {name: {site: [] for site in UNITS} for name in TITLES}
    traffic: dict[str, Any] = {}
    for seed in range(seeds):
        for method, local_steps in METHODS.items():
            out = scratch / f"seed-{seed}" / method.replace("/", "-")
            is_pooled = method == "exact" and seed > 0
            keys = [PrivateKeys.generate(name) for name in UNITS]
            agreement = agree(seed, epochs, local_steps, keys)
            if is_pooled and not (out / "result.json").is_file():
                train_pooled(agreement, data, out)
            elif not is_pooled and not out.exists():
                print(f"seed {seed}, {method}", flush=True)
                train_federated(agreement, keys, data, out)
            runs = {site: out if is_pooled else out / site for site in UNITS}
            if not is_pooled:
                traffic[method] = [json.loads((run / "traffic.json").read_text()) for run in runs.values()]
                if len({each["weights"] for each in traffic[method]}) > 1:
                    sys.exit(f"{out}: the sites ended with different weights")
            if method == "exact" and seed == 0:
                pooled = train_pooled(agreement, data, scratch / "seed-0" / "pooled")
                if pooled != traffic[method][0]["weights"]:
                    sys.exit("the exact and the pooled run have different weights")
            for site, run in runs.items():
                predictions[method][site].append(predict_test(run, data[site]))
        for site in UNITS:
            out = scratch / f"seed-{seed}" / "alone" / site
            if not (out / "result.json").is_file():
                train_alone(agree(seed, epochs, None, [PrivateKeys.generate(n) for n in UNITS]), site, data[site], out)
            predictions["alone"][site].append(predict_test(out, data[site]))
    return {"predictions": predictions, "traffic": traffic}


def mean_auroc(runs: list[Any]) -> Floats:
    """Return the mean AUROC over seeds, for the test rows as they are and for each resample of patients."""
    y, _, patients = runs[0]
    weights = np.concatenate([np.ones((1, len(y))), *resample_weights(patients, BOOTSTRAPS, 0)])
    return np.mean([_auroc_unsorted(y.astype(np.int64), p, weights) for _, p, _ in runs], axis=0)


def pool_sites(sites: Mapping[str, list[Any]]) -> list[Any]:
    """Return the test rows of all sites, by seed."""
    pooled = []
    for parts in zip(*sites.values(), strict=True):
        first = np.cumsum([0, *(int(patients.max()) + 1 for _, _, patients in parts)])
        patients = np.concatenate([own + start for (_, _, own), start in zip(parts, first, strict=False)])
        pooled.append((*(np.concatenate([part[k] for part in parts]) for k in (0, 1)), patients))
    return pooled


def describe(values: Floats) -> str:
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.3f} [{low:.3f}, {high:.3f}]"


def print_table(found: dict[str, Any]) -> None:
    curves = {
        method: {**{site: mean_auroc(runs) for site, runs in sites.items()}, "all": mean_auroc(pool_sites(sites))}
        for method, sites in found["predictions"].items()
    }
    reference = next(iter(curves.values()))
    counts = {site: (len(runs[0][0]), int(runs[0][0].sum())) for site, runs in found["predictions"]["exact"].items()}
    print(f"test rows and deaths: {counts}")
    more = ("all, minus exact", "rounds", "bytes a site sends", "s a step (waiting)")
    print(f"| AUROC on the test rows of | {' | '.join([*reference, *more])} |")
    print("|" + "---|" * (1 + len(reference) + len(more)))
    for method, by_site in curves.items():
        scores = " | ".join(describe(values) for values in by_site.values())
        difference = "" if method == "exact" else describe(by_site["all"] - reference["all"])
        rounds, size, seconds = ("0", "0", "")
        if sent := found["traffic"].get(method):
            rounds, size = f"{sent[0]['rounds']:,}", f"{sent[0]['bytes'] / 1e6:.1f} MB"
            seconds = f"{sent[0]['per_step']:.2f} ({sent[0]['waited']:.2f})"
        print(f"| {TITLES[method]} | {scores} | {difference} | {rounds} | {size} | {seconds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--physionet", type=Path, required=True, help="directory with set-a.tar.gz and Outcomes-a.txt")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for data and runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--landmark", type=float, default=12.0, help="hours after admission")
    args = parser.parse_args()
    args.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = prepare_sites(args.physionet, args.scratch, args.landmark)
    print_table(train_all(data, args.scratch, args.seeds, args.epochs))


if __name__ == "__main__":
    main()
