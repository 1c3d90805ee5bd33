"""Measure time and peak memory of preparing intensive-care data, and how both grow with the data.

    python benchmarks/icu.py --physionet DIR --mimic3 DIR --mimic4 DIR --scratch DIR [--folds 1 10 100]
        [--pandas-up-to 10] [--rounds 5] [--meds DIR --meds-tab BIN]

PhysioNet 2012 is prepared completely. MIMIC's raw tables are replicated as CSV, each copy with new patient and stay
ids (written in pieces, removed afterwards), and prepared in a separate process; of MIMIC-III, up to 10 copies, the
plain pandas script in icu_pandas.py does the same steps on the same files. A MEDS data set is also processed by
MEDS-Tab (BIN is the folder of its commands: describe, tabularize static and time series, with one window and two
aggregations). The programs alternate for --rounds; results are medians. Peak memory is the largest resident set size of
a process.
"""

import argparse
import gzip
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

IDS = ("subject_id", "icustay_id", "stay_id", "hadm_id", "specimen_id")
STEP = 100_000_000  # added to the identifiers of each copy
TABLES = {
    "mimic3": ("ICUSTAYS", "PATIENTS", "ADMISSIONS", "CHARTEVENTS", "LABEVENTS", "PROCEDUREEVENTS_MV"),
    "mimic4": (
        *("icu/icustays", "icu/chartevents", "icu/procedureevents", "icu/outputevents"),
        *("hosp/patients", "hosp/admissions", "hosp/labevents"),
    ),
}
PREPARE = """
import sys
from pathlib import Path
from raylab.data.icu.prepare import prepare_icu
meta = prepare_icu("ards", sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), replace=True)
print(meta.stays, "stays,", (meta.onsets or {})["stays"], "onsets")
"""


def replicate(release: str, source: Path, out: Path, times: int) -> int:
    """Write `times` copies of the tables of `source`, each with new identifiers; returns their size in bytes."""
    import polars as pl

    for name in TABLES[release]:
        rows = pl.read_csv(gzip.decompress((source / f"{name}.csv.gz").read_bytes()), infer_schema=False)
        ids = [column for column in rows.columns if column.lower() in IDS]
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with (out / f"{name}.csv").open("wb") as file:
            for copy in range(times):
                moved = [(pl.col(column).cast(pl.Int64) + copy * STEP).cast(pl.String) for column in ids]
                rows.with_columns(moved).write_csv(file, include_header=copy == 0)
    return sum((out / f"{name}.csv").stat().st_size for name in TABLES[release])


class Run(NamedTuple):
    """Wall time in s, CPU time in s, and peak memory in GiB of one process."""

    wall: float
    cpu: float
    peak: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.cpu:.1f} s of CPU), {self.peak:.2f} GiB"


def measure_process(words: list[str]) -> Run:
    """Run a process without output and measure it."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words[:3])} failed")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def alternate(rounds: int, **programs: list[list[str]]) -> None:
    """Print the medians of each program, which is a list of commands, and the ratios of the first to the others."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, commands in programs.items():
            parts = [measure_process(words) for words in commands]
            runs[name].append(Run(sum(p.wall for p in parts), sum(p.cpu for p in parts), max(p.peak for p in parts)))
    medians = {name: Run(*map(statistics.median, zip(*of, strict=True))) for name, of in runs.items()}
    first = medians[next(iter(programs))]
    for name, run in medians.items():
        ratio = [f"{a / b:.2f}" for a, b in zip(first, run, strict=True)]
        words = f"; raylab / {name}: time {ratio[0]}, CPU {ratio[1]}, memory {ratio[2]}" if run is not first else ""
        print(f"  {name} {run}{words}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--physionet", type=Path)
    for release in TABLES:
        parser.add_argument(f"--{release}", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--pandas-up-to", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--meds", type=Path)
    parser.add_argument("--meds-tab", type=Path)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    out = args.scratch / "prepared"
    python = [sys.executable, "-c", PREPARE]
    if args.physionet is not None:
        print("PhysioNet 2012 set a", flush=True)
        alternate(args.rounds, raylab=[[*python, "physionet2012", str(args.physionet), str(out)]])
    for release, fold in ((release, fold) for release in TABLES for fold in args.folds):
        source, raw = getattr(args, release), args.scratch / f"{release}-{fold}"
        if source is None:
            continue
        try:
            size = replicate(release, source, raw, fold)
            print(f"{release} x {fold}, {size / 2**30:.2f} GiB", flush=True)
            programs = {"raylab": [[*python, release, str(raw), str(out)]]}
            if release == "mimic3" and fold <= args.pandas_up_to:
                script, table = Path(__file__).with_name("icu_pandas.py"), args.scratch / "pandas.parquet"
                programs["pandas"] = [[sys.executable, str(script), str(raw), str(table)]]
            alternate(args.rounds, **programs)
        finally:
            shutil.rmtree(raw, ignore_errors=True)
    if args.meds is not None:
        print(f"MEDS, {args.meds}", flush=True)
        programs = {"raylab": [[*python, "meds", str(args.meds), str(out)]]}
        if args.meds_tab is not None:
            made = args.scratch / "meds-tab"
            files = [f"input_dir={args.meds / 'data'}", f"output_dir={made}"]
            shape = ["do_overwrite=False", "tabularization.window_sizes=[1d]",
                     "tabularization.aggs=[code/count,value/sum]"]  # fmt: skip
            steps = [("describe", []), ("tabularize-static", shape), ("tabularize-time-series", shape)]
            programs["meds-tab"] = [["rm", "-rf", str(made)]]
            programs["meds-tab"] += [[str(args.meds_tab / f"meds-tab-{step}"), *files, *more] for step, more in steps]
        alternate(args.rounds, **programs)
    shutil.rmtree(out, ignore_errors=True)
    (args.scratch / "pandas.parquet").unlink(missing_ok=True)
    print(f"this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
