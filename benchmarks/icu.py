"""Preparation of intensive-care tables: time and peak memory, and how both grow with the table.

    python benchmarks/icu.py --physionet DIR --mimic3 DIR --scratch DIR [--folds 1 10 100] [--pandas-up-to 10]

PhysioNet 2012 is prepared whole. MIMIC-III's tables are replicated, each copy with patients and stays of its own, as
CSV (written in pieces, removed afterwards), and prepared in a process of its own; up to 10 fold the plain pandas script
beside it does the same steps on the same files. Peak memory is the process's largest resident set.
"""

import argparse
import gzip
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

PATIENT, STAY, ADMISSION = 1_000_000, 1_000_000, 1_000_000  # added to the identifiers of each copy
IDS = {"subject_id": PATIENT, "icustay_id": STAY, "hadm_id": ADMISSION}
TABLES = ("ICUSTAYS", "PATIENTS", "ADMISSIONS", "CHARTEVENTS", "LABEVENTS", "PROCEDUREEVENTS_MV")
PREPARE = """
import sys
from pathlib import Path
from raylab.data.icu.prepare import prepare_ards
meta = prepare_ards(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
print(meta.stays, "stays,", (meta.onsets or {})["stays"], "onsets")
"""


def replicate(source: Path, out: Path, times: int) -> None:
    """The tables of `source` `times` over, each copy with identifiers of its own."""
    import polars as pl

    out.mkdir(parents=True)
    for name in TABLES:
        rows = pl.read_csv(gzip.decompress((source / f"{name}.csv.gz").read_bytes()), infer_schema=False)
        ids = {column: IDS[column.lower()] for column in rows.columns if column.lower() in IDS}
        with (out / f"{name}.csv").open("wb") as file:
            for copy in range(times):
                moved = [(pl.col(c).cast(pl.Int64) + copy * step).cast(pl.String) for c, step in ids.items()]
                rows.with_columns(moved).write_csv(file, include_header=copy == 0)


def measured(words: list[str]) -> tuple[float, float, float, str]:
    """(seconds, seconds of CPU, peak GiB, what it printed) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(words[:3])} failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, said.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--physionet", type=Path)
    parser.add_argument("--mimic3", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--pandas-up-to", type=int, default=10)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    out = args.scratch / "prepared"
    python = [sys.executable, "-c", PREPARE]
    if args.physionet is not None:
        seconds, cpu, peak, said = measured([*python, "physionet2012", str(args.physionet), str(out)])
        print(f"physionet 2012 set a: {seconds:.1f} s ({cpu:.1f} s of CPU), {peak:.2f} GiB, {said}", flush=True)
    for fold in args.folds if args.mimic3 is not None else ():
        raw = args.scratch / f"mimic3-{fold}"
        try:
            replicate(args.mimic3, raw, fold)
            size = (raw / "CHARTEVENTS.csv").stat().st_size / 2**30
            seconds, cpu, peak, said = measured([*python, "mimic3", str(raw), str(out)])
            took = f"{seconds:.1f} s ({cpu:.1f} s of CPU)"
            print(f"mimic-iii x {fold} ({size:.2f} GiB): raylab {took}, {peak:.2f} GiB, {said}", flush=True)
            if fold <= args.pandas_up_to:
                script = str(Path(__file__).with_name("icu_pandas.py"))
                slow, busy, much, said = measured(
                    [sys.executable, script, str(raw), str(args.scratch / "pandas.parquet")]
                )
                print(
                    f"mimic-iii x {fold}: pandas {slow:.1f} s ({busy:.1f} s of CPU), {much:.2f} GiB, {said}; raylab / "
                    f"pandas: time {seconds / slow:.2f}, CPU {cpu / busy:.2f}, memory {peak / much:.2f}",
                    flush=True,
                )
        finally:
            shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    (args.scratch / "pandas.parquet").unlink(missing_ok=True)
    print(f"this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
