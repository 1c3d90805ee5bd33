"""Measure time per bootstrap sample and peak memory of all scores of a binary outcome, by number of rows.

    python benchmarks/bootstrap.py [--rows 10000 100000 1000000] [--cells 20000000] [--rounds 5]

Calibration fits over rows and over nodes (raylab/evaluation/metrics.py) alternate on the same data and samples, each in
its own process. Five cohorts (everybody, and a half, a third, a fifth and a tenth of the patients) are then scored
apart, and in one pass over the same samples, alternately as well. Each process draws --cells / rows samples; the time
of a single sample is subtracted, which leaves the time per sample without set-up. CPU time is also shown, because it
varies less on a shared machine. The last column is the largest difference between the two ways in any score of all
rows.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

WAYS = {"fits over": ("rows", "nodes"), "five cohorts": ("apart", "together")}


def one(rows: int, bootstraps: int, way: str) -> None:
    """Print JSON: "wall" and "cpu" in ms per sample, "peak" in GiB, and "scores" with values and interval ends."""
    import numpy as np

    from raylab.evaluation import metrics

    if way == "rows":
        metrics.MANY = rows + 1
    rng = np.random.default_rng(0)
    x = rng.normal(-2.5, 1.2, rows)
    y = (rng.random(rows) < 1 / (1 + np.exp(-x))).astype(int)
    p = 1 / (1 + np.exp(-(x + rng.normal(0, 0.5, rows))))
    patients = np.arange(rows) // 3  # three rows each
    members = {f"1/{n}": np.arange(rows) % (3 * n) < 3 for n in (1, 2, 3, 5, 10)} if way in WAYS["five cohorts"] else {}

    def score(count: int) -> dict:
        if way == "together":
            return metrics.binary_scores_by(y, p, patients, members, count)["1/1"]
        for inside in list(members.values())[1:]:
            metrics.binary_scores(y[inside], p[inside], patients[inside], count)
        return metrics.binary_scores(y, p, patients, count)

    ends = []
    metrics.binary_scores(y, p, patients, 1)  # imports and caches
    for count in (1, bootstraps + 1):
        began = time.perf_counter(), time.process_time()
        scores = score(count)
        ends.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = (1000 * (ends[1][k] - ends[0][k]) / bootstraps for k in (0, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    values = {name: [each.value, each.low, each.high] for name, each in scores.items()}
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "scores": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--cells", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=[way for pair in WAYS.values() for way in pair], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.rows[0], max(1, args.cells // args.rows[0]), args.one)
        return
    for title, ways in WAYS.items():
        print(f"| rows | {title} | ms per sample | CPU ms | peak GiB | 1,000 samples | largest difference |")
        print("|---|---|---|---|---|---|---|")
        for rows in args.rows:
            compare(rows, ways, args.rounds, args.cells)


def compare(rows: int, ways: tuple[str, str], rounds: int, cells: int) -> None:
    """Print the medians of two ways, which alternate; the scores of all rows are compared."""
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, results in runs.items():
            words = [sys.executable, __file__, "--one", way, "--rows", str(rows), "--cells", str(cells)]
            results.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    before, after = (runs[way][0]["scores"] for way in ways)
    worst = max(abs(a - b) for name in before for a, b in zip(before[name], after[name], strict=True))
    for way, results in runs.items():
        wall, cpu, peak = (statistics.median(run[key] for run in results) for key in ("wall", "cpu", "peak"))
        print(f"| {rows:,} | {way} | {wall:.1f} | {cpu:.1f} | {peak:.2f} | {wall:.0f} s | {worst:.1g} |", flush=True)


if __name__ == "__main__":
    main()
