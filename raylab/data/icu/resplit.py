"""Splits one or several pooled directories of intensive-care data again: by folds, by period, or by hospital.

The prepared rows are reused; split, statistics and counts are recomputed, statistics from the new train split only.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from raylab.data import prepared, splits
from raylab.data.icu.concepts import SERIES
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.patient_batch import COUNTS
from raylab.data.icu.prepare import described, train_statistics
from raylab.data.icu.timegrid import joined
from raylab.data.identifiers import Person
from raylab.errors import DataError, UsageError

REST = {"train": 0.8125, "val": 0.1875}  # of the rows that are not held out: 65% and 15% of 80%


@dataclass(frozen=True)
class Split:
    """Which rows are held out as the test split.

    kind "patient": `fold` of `folds` of the patients. "temporal": the latest period, or `holdout`. "site": the rows of
    source `holdout`. Rows of held-out patients that would be in train or val are removed and counted.
    """

    kind: str
    fold: int = 0
    folds: int = 5
    holdout: str | None = None

    def words(self) -> str:
        if self.kind == "patient":
            return f"fold {self.fold + 1} of {self.folds} of the patients"
        return f"{'period' if self.kind == 'temporal' else 'site'} {self.holdout}"


def parse(text: str) -> Split:
    """Parse a split of the command line: `patient:0/5`, `temporal`, `temporal:2008-2012`, `site:mimic-iii`."""
    kind, _, rest = text.partition(":")
    fold, slash, count = rest.partition("/")
    if kind == "patient" and slash and fold.isdigit() and count.isdigit() and int(fold) < int(count):
        return Split("patient", int(fold), int(count))
    if kind == "temporal" or (kind == "site" and rest):
        return Split(kind, holdout=rest or None)
    raise UsageError(
        f"'{text}' is not a split", do="write patient:K/N (K from 0), temporal, temporal:PERIOD or site:SOURCE"
    )


def resplit(
    directories: list[Path], out: Path, split: Split, seed: int = 0, replace: bool = False, task: str | None = None
) -> IcuMeta:
    """Publish the rows of `directories` with `split` at `out`, and return the meta.

    Several directories are pooled; they must have the same label and framing. Identifiers are qualified by their scope
    (identifiers.py), because patient 7 of one hospital is not patient 7 of another.
    """
    metas = [prepared.read_meta(Path(directory), task, IcuMeta) for directory in directories]
    task = metas[0].task
    prepared.check_vacant(Path(out), task, replace)
    check_alike(metas, directories)
    several = len(directories) > 1
    named = sorted({name for meta in metas for name in prepared.numberings(meta)})
    samples, tables = [], []
    for directory, meta in zip(directories, metas, strict=True):
        own = [qualify_ids(name, prepared.numberings(meta)) for name in ("stay_id", "subject_id")]
        rows, table = (pl.read_parquet(directory / name) for name in ("samples.parquet", "hours.parquet"))
        samples.append(rows.with_columns(own) if len(named) > 1 else rows)
        tables.append(table.with_columns(own[0]) if len(named) > 1 else table)
    rows = pl.concat(samples, how="diagonal_relaxed").drop("row", "split")
    repeated = rows.select("stay_id", "at_h").is_duplicated().sum()
    if repeated:
        raise DataError(
            f"{repeated} rows are in two of the directories",
            f"each stay may occur once, and these identifiers have the same scope: {', '.join(named)}",
            "give each set once; if they are of two hospitals, prepare them from folders with different names (yaib) "
            "or with mappings of different sources (meds)",
        )
    columns = {name for table in tables for name in table.columns}
    table = joined(tables, [name for name in SERIES if name in columns]) if several else tables[0]
    rows, split, left = assign_split(rows, split, seed)
    rows = rows.with_row_index("row").select(pl.col("row").cast(pl.Int64), "stay_id", "subject_id", "split", pl.exclude(
        "row", "stay_id", "subject_id", "split"))  # fmt: skip
    train = rows.filter(pl.col("split") == "train")
    if train["label"].n_unique() < 2:
        raise DataError(f"the train split of {split.words()} has only one class", do="hold out something else")
    stats = train_statistics(train, table)

    def write(work: Path) -> IcuMeta:
        rows.write_parquet(work / "samples.parquet")
        if several:
            table.write_parquet(work / "hours.parquet")
        else:
            shutil.copyfile(Path(directories[0]) / "hours.parquet", work / "hours.parquet")
        both = rows.group_by("subject_id").agg(pl.col("source").n_unique())
        changed = {
            "source": "+".join(sorted({meta.source for meta in metas})),
            "numbering": named,
            "synthetic": any(meta.synthetic for meta in metas),
            "notes": sorted({note for meta in metas for note in meta.notes}),
            "warnings": sorted({text for meta in metas for text in meta.warnings}),
            **described(rows, stats),
            "attrition": [
                *pool_attrition([meta.attrition for meta in metas]),
                {
                    "step": f"not of a patient who is in {split.words()} too",
                    "patients": rows["subject_id"].n_unique(),
                    "stays": rows["stay_id"].n_unique(),
                },
            ],
            "split": {"kind": split.kind, "held_out": split.words(), "rows_left_out": left},
            "patients_in_two_hospitals": both.filter(pl.col("source") > 1).height,
            **{name: sum_counts(metas, name) for name in COUNTS if name in metas[0].model_fields_set},
            "stays": sum(meta.stays for meta in metas),
            "coverage": {name: sum(meta.coverage[name] for meta in metas) for name in metas[0].coverage},
            "split_hash": prepared.split_hash(list(rows.select("subject_id", "split").iter_rows())),
            "seed": seed,
        }
        return metas[0].model_copy(update=changed)

    return prepared.publish(Path(out), write, task, replace)


def qualify_ids(name: str, numbering: list[str]) -> pl.Expr:
    """Return the column of identifiers with their scope; those of a pooled directory already have it."""
    if len(numbering) > 1:
        return pl.col(name)
    start = str(Person.of(numbering[0], ""))
    return (pl.lit(start) + pl.col(name)).alias(name)


def check_alike(metas: list[IcuMeta], directories: list[Path]) -> None:
    for name in ("task", "framing", "landmark_h", "horizon_h", "gap_h"):
        values = [getattr(meta, name) for meta in metas]
        if len(set(values)) > 1:
            raise DataError(
                f"{' and '.join(map(str, directories))} differ in {name}: {', '.join(map(str, values))}",
                "all rows of a data set must have the same framing",
                "prepare them with the same options",
            )
    labels = {f"{meta.label['name']} version {meta.label['version']}" for meta in metas}
    if len(labels) > 1:
        raise DataError(
            f"the labels differ: {', '.join(sorted(labels))}",
            do="prepare them with the same --label and this version of raylab",
        )


def sum_counts(metas: list[IcuMeta], name: str) -> dict[str, Any]:
    """Sum the counts by concept, or by concept and unit, over all directories."""
    total: dict[str, Any] = {}
    for concept, n in (pair for meta in metas for pair in getattr(meta, name).items()):
        if isinstance(n, dict):
            units = total.setdefault(concept, {})
            units |= {unit: units.get(unit, 0) + count for unit, count in n.items()}
        else:
            total[concept] = total.get(concept, 0) + n
    return dict(sorted(total.items()))


def pool_attrition(attritions: list[list[dict[str, int | str]]]) -> list[dict[str, int | str]]:
    return [
        {key: value if key == "step" else sum(row[key] for row in rows) for key, value in rows[0].items()}
        for rows in zip(*attritions, strict=False)
    ]


def assign_split(rows: pl.DataFrame, split: Split, seed: int) -> tuple[pl.DataFrame, Split, int]:
    """Return `rows` with a column `split`, the split with its holdout filled in, and the number of removed rows."""
    if split.kind == "patient":
        fold = splits.folds(rows["subject_id"].to_list(), rows["label"].to_list(), split.folds, seed)
        held = pl.Series(fold) == split.fold
    else:
        column = "period" if split.kind == "temporal" else "source"
        values = sorted(rows[column].drop_nulls().unique().to_list())
        if split.kind == "temporal" and rows[column].null_count():
            raise DataError(
                f"{rows[column].null_count()} of {rows.height} rows have no period",
                "their source shifts or omits dates",
                "use patient folds, or a source with periods (mimic3, mimic4; meds with dates = 'real')",
            )
        holdout = split.holdout or values[-1]
        if holdout not in values or len(values) < 2:
            raise DataError(
                f"{column} '{holdout}' cannot be held out", f"the data has: {', '.join(values)}", "choose one of them"
            )
        split = Split(split.kind, holdout=holdout)
        held = rows[column] == holdout
    out = set(rows.filter(held)["subject_id"])
    stays = held | ~rows["subject_id"].is_in(list(out))
    left, rows, held = int((~stays).sum()), rows.filter(stays), held.filter(stays)
    rest = rows.filter(~held)
    names = splits.assign(rest["subject_id"].to_list(), rest["label"].to_list(), REST, seed)
    rest = rest.with_columns(split=pl.Series(names, dtype=pl.String))
    split_rows = pl.concat([rest, rows.filter(held).with_columns(split=pl.lit("test"))])
    return split_rows.sort("stay_id", "at_h"), split, left
