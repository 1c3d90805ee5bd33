"""Measure whether features of virtual patients help the ARDS task: each model with and without them, on the same test
patients.

    .venv/bin/python -m benchmarks.virtual_patient DIR     # of `raylab prepare ards ... --virtual-patient`

For each model and cohort, the script prints the AUROC without and with them, and the difference with its 95% CI over
the same bootstrap samples of patients. Runs stay in RAYLAB_HOME and are reused.
"""

import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

import raylab
from jobs.common import home
from raylab.evaluation.metrics import paired_difference

MODELS = {"boosting": {"model.name": "boosting"}, "gru": {"loop.early_stopping_patience": 6}}
COHORTS = ("all", "ventilated_pf")


def probabilities(data: Path, model: str, virtual: bool) -> pl.DataFrame:
    """The columns id, label and p of the test rows from the run of this model, which is trained unless it exists."""
    name = f"virtual-{model}-{'with' if virtual else 'without'}"
    if not (home.home() / "runs" / name / "run.json").is_file():
        settings = {**MODELS[model], "data.virtual_patient": virtual}
        raylab.train("ards", data, name=name, settings=settings, quiet=True)
    out = home.home() / "benchmarks" / f"{name}.parquet"
    if not out.is_file():
        raylab.predict(name, data, out, split="test", quiet=True)
    return pl.read_parquet(out).select("id", "label", p=pl.selectors.starts_with("p_"))


def main() -> None:
    data = Path(sys.argv[1]).absolute()
    rows = pl.read_parquet(data / "samples.parquet").filter(pl.col("split") == "test")
    for model in MODELS:
        began = time.perf_counter()
        both = [probabilities(data, model, virtual) for virtual in (False, True)]
        assert both[0]["id"].equals(both[1]["id"])
        table = both[0].rename({"p": "without"}).with_columns(both[1]["p"].alias("with"))
        table = table.join(rows, left_on="id", right_on="stay_id", maintain_order="left")
        for cohort in COHORTS:
            part = table if cohort == "all" else table.filter(pl.col(cohort))
            y, group = part["label"].to_numpy(), part["subject_id"].rank("dense").to_numpy()
            shown = []
            for name in ("without", "with"):
                nothing = np.full(len(y), 0.5)
                found = paired_difference(y, part[name].to_numpy(), nothing, group)
                shown.append(f"{name} - 0.5 {found.text(sign='+')}")
            gain = paired_difference(y, part["with"].to_numpy(), part["without"].to_numpy(), group)
            print(f"{model:9} {cohort:14} n {len(y)}, {y.sum()} onsets: AUROC {', '.join(shown)}, "
                  f"difference {gain.text(sign='+')}", flush=True)  # fmt: skip
        print(f"({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
