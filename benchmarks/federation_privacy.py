"""Measure what a privacy budget costs: AUROC of models that three sites train with noise, on PhysioNet 2012.

    python benchmarks/federation_privacy.py --physionet DIR --scratch DIR [--epsilons 1000 100 30 8 3 1] [--seeds 1]
        [--set model.name=means optim.lr=0.02]

Sites, stays and task are those of benchmarks/federation.py, the network is that of the small recipe, or the one of
hourly_means.py. Each epsilon has
the least noise with which the planned steps keep it, with delta 1e-5 and one colluding site. One process has the rows
of all sites and draws the noise of each: the weights have the distribution of those that three processes reach. What is
done is kept in the scratch directory: the same command continues; other settings need another directory.

It prints a table: epsilon, noise multiplier, AUROC on the test rows of all sites as the mean over the seeds with 95% CI
over 1,000 resamples of patients, and the paired difference to the run without noise.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from federation import TASK, UNITS, describe, mean_auroc, pool_sites, predict_test, prepare_sites

from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.federation.agreement import Agreement, propose
from raylab.federation.budget import largest_participation
from raylab.federation.keys import PrivateKeys
from raylab.federation.privacy import Privacy
from raylab.federation.run import join, train
from raylab.federation.sums import PooledSums
from raylab.tasks import find_task
from raylab.tasks.plugin_code import Code
from raylab.tasks.plugins import load_code
from raylab.tasks.recipes import shipped_recipe

ROWS = {"coronary": 72, "surgical": 248, "medical": 192}  # of a step: many, because noise does not grow with them
DELTA, COLLUDING = 1e-5, 1


def make_recipe(seed: int, settings: list[str]) -> Recipe:
    values = {"seed": seed, "loop.epochs": 10, "optim.lr": 3e-3, **parse_assignments(settings)}
    return override(shipped_recipe(TASK, smoke=True), values)


def agree(recipe: Recipe, privacy: Privacy | None) -> Agreement:
    identities = [PrivateKeys.generate(name).identity() for name in UNITS]
    shards = [1] * len(ROWS) if privacy is None else [*ROWS.values()]
    return propose(recipe, identities, [*ROWS.values()], shards, None, "avx2", 3600.0, None, privacy)


def find_participation(recipe: Recipe, data: Mapping[str, Path]) -> int:
    """Return the largest participation of a patient of any site in the whole run."""
    task = find_task(TASK)
    splits = {
        name: [task.load(directory, split, recipe.data, None) for split in ("train", "val")]
        for name, directory in data.items()
    }
    per_epoch = steps_per_epoch(sum(len(train) for train, _ in splits.values()), sum(ROWS.values()))
    epochs, agreement = recipe.loop.epochs, agree(recipe, None)
    steps = epochs * per_epoch
    found = [largest_participation(agreement, recipe.seed, name, *of, steps, epochs) for name, of in splits.items()]
    print(f"{steps} steps; a patient takes part in sums worth {max(found)}", flush=True)
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--physionet", type=Path, required=True, help="directory with set-a.tar.gz and Outcomes-a.txt")
    parser.add_argument("--scratch", type=Path, required=True, help="directory for data and runs")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1000.0, 100.0, 30.0, 8.0, 3.0, 1.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="PATH=VALUE", help="fields of the recipe")
    parser.add_argument("--landmark", type=float, default=12.0, help="hours after admission")
    args = parser.parse_args()
    load_code(Code.read(Path(__file__).with_name("hourly_means.py")))
    args.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    data = prepare_sites(args.physionet, args.scratch, args.landmark)
    participation = max(find_participation(make_recipe(seed, args.set), data) for seed in range(args.seeds))
    curves, multipliers = {}, {}
    for epsilon in (None, *args.epsilons):
        privacy, sites = None, {name: [] for name in UNITS}
        if epsilon is not None:
            privacy = Privacy(epsilon=epsilon, delta=DELTA, noise_multiplier=1.0, colluding_sites=COLLUDING)
            multipliers[epsilon] = privacy.find_multiplier(len(UNITS), participation)
            privacy = privacy.model_copy(update={"noise_multiplier": multipliers[epsilon]})
        for seed in range(args.seeds):
            out = args.scratch / f"privacy-{'none' if epsilon is None else f'{epsilon:g}'}-{seed}"
            if not (out / "result.json").is_file():
                out.mkdir(exist_ok=True)
                agreement = agree(make_recipe(seed, args.set), privacy)
                result = train(join(agreement, data, PooledSums(agreement, {})), out, lambda rows: 0)
                print(epsilon, seed, result["best"], result["federation"], flush=True)
            for name in UNITS:
                sites[name].append(predict_test(out, data[name]))
        curves[epsilon] = mean_auroc(pool_sites(sites))
    print("| epsilon | noise multiplier | AUROC, all test rows | minus no noise |\n|---|---|---|---|")
    for epsilon, curve in curves.items():
        first = "none" if epsilon is None else f"{epsilon:g}"
        noise = "0" if epsilon is None else f"{multipliers[epsilon]:g}"
        difference = "" if epsilon is None else describe(curve - curves[None])
        print(f"| {first} | {noise} | {describe(curve)} | {difference} |")


if __name__ == "__main__":
    main()
