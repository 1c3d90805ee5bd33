"""Measure time per bootstrap sample and peak memory of all scores of a binary outcome, by number of rows.

    python benchmarks/bootstrap.py [--rows 10000 100000 1000000] [--cells 20000000] [--rounds 5]

Calibration fits over rows and over nodes (raylab/evaluation/metrics.py) alternate on the same data and samples, each in
its own process. Each process draws --cells / rows samples; the time of a single sample is subtracted, which leaves the
time per sample without set-up. CPU time is also shown, because it varies less on a shared machine. The last column is
the largest difference between the two methods in any score or interval end.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time


def one(rows: int, bootstraps: int, on_nodes: bool) -> None:
    """Print JSON: "wall" and "cpu" in ms per sample, "peak" in GiB, and "scores" with values and interval ends."""
    import numpy as np

    from raylab.evaluation import metrics

    if not on_nodes:
        metrics.MANY = rows + 1
    rng = np.random.default_rng(0)
    x = rng.normal(-2.5, 1.2, rows)
    y = (rng.random(rows) < 1 / (1 + np.exp(-x))).astype(int)
    p = 1 / (1 + np.exp(-(x + rng.normal(0, 0.5, rows))))
    patients = np.arange(rows) // 3  # three rows each
    ends = []
    metrics.binary_scores(y, p, patients, 1)  # imports and caches
    for count in (1, bootstraps + 1):
        began = time.perf_counter(), time.process_time()
        scores = metrics.binary_scores(y, p, patients, count)
        ends.append((time.perf_counter() - began[0], time.process_time() - began[1]))
    wall, cpu = (1000 * (ends[1][k] - ends[0][k]) / bootstraps for k in (0, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    values = {name: [score[key] for key in ("value", "low", "high")] for name, score in scores.items()}
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, "scores": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--cells", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=("rows", "nodes"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.rows[0], max(1, args.cells // args.rows[0]), args.one == "nodes")
        return
    print("| rows | fits over | ms per sample | CPU ms | peak GiB | 1,000 samples | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for rows in args.rows:
        runs: dict[str, list[dict]] = {"rows": [], "nodes": []}
        for _ in range(args.rounds):
            for way, results in runs.items():
                words = [sys.executable, __file__, "--one", way, "--rows", str(rows)]
                words += ["--cells", str(args.cells)]
                results.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        before, after = (runs[way][0]["scores"] for way in ("rows", "nodes"))
        worst = max(abs(a - b) for name in before for a, b in zip(before[name], after[name], strict=True))
        for way, results in runs.items():
            wall, cpu, peak = (statistics.median(run[key] for run in results) for key in ("wall", "cpu", "peak"))
            print(
                f"| {rows:,} | {way} | {wall:.1f} | {cpu:.1f} | {peak:.2f} | {wall:.0f} s | {worst:.1g} |", flush=True
            )


if __name__ == "__main__":
    main()
