"""Prepared intensive-care data, of one directory or several, with another split: folds, a later period, or a hospital
held out.

The rows are those that were prepared; split, statistics and counts are made anew, statistics from the new train only.
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

REST = {"train": 0.8125, "val": 0.1875}  # of what is not held out: 65 and 15 of 80 %


@dataclass(frozen=True)
class Split:
    """What is held out as test.

    kind "patient": `fold` of `folds` of the patients. "temporal": the latest period, or `holdout`. "site": the rows of
    source `holdout`. A patient with rows held out has none in train or val: those rows leave, and are counted.
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
    """`patient:0/5`, `temporal`, `temporal:2008-2012`, `site:mimic-iii` as on the command line."""
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
    """Publish at `out` the rows of `directories` with `split`; returns the meta.

    Several directories are pooled: they must have one label and framing. Identifiers are told apart by their numbering
    (identifiers.py): patient 7 of one hospital is another one than patient 7 of the next.
    """
    metas = [prepared.read_meta(Path(directory), task, IcuMeta) for directory in directories]
    task = metas[0].task
    prepared.check_vacant(Path(out), task, replace)
    check_alike(metas, directories)
    several = len(directories) > 1
    named = sorted({name for meta in metas for name in prepared.numberings(meta)})
    samples, tables = [], []
    for directory, meta in zip(directories, metas, strict=True):
        own = [qualified(name, prepared.numberings(meta)) for name in ("stay_id", "subject_id")]
        rows, table = (pl.read_parquet(directory / name) for name in ("samples.parquet", "hours.parquet"))
        samples.append(rows.with_columns(own) if len(named) > 1 else rows)
        tables.append(table.with_columns(own[0]) if len(named) > 1 else table)
    rows = pl.concat(samples, how="diagonal_relaxed").drop("row", "split")
    twice = rows.select("stay_id", "at_h").is_duplicated().sum()
    if twice:
        raise DataError(
            f"{twice} rows stand in two of the directories",
            f"a stay counts once, and their identifiers have one numbering: {', '.join(named)}",
            "give each set once; where they are of two hospitals, prepare them from folders of different names (yaib) "
            "or with mappings of different sources (meds)",
        )
    found = {name for table in tables for name in table.columns}
    table = joined(tables, [name for name in SERIES if name in found]) if several else tables[0]
    rows, split, left = assigned(rows, split, seed)
    rows = rows.with_row_index("row").select(pl.col("row").cast(pl.Int64), "stay_id", "subject_id", "split", pl.exclude(
        "row", "stay_id", "subject_id", "split"))  # fmt: skip
    train = rows.filter(pl.col("split") == "train")
    if train["label"].n_unique() < 2:
        raise DataError(f"the train split of {split.words()} holds one class only", do="hold out something else")
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
                *pooled([meta.attrition for meta in metas]),
                {
                    "step": f"not of a patient who is in {split.words()} too",
                    "patients": rows["subject_id"].n_unique(),
                    "stays": rows["stay_id"].n_unique(),
                },
            ],
            "split": {"kind": split.kind, "held_out": split.words(), "rows_left_out": left},
            "patients_in_two_hospitals": both.filter(pl.col("source") > 1).height,
            **{name: added(metas, name) for name in COUNTS if name in metas[0].model_fields_set},
            "stays": sum(meta.stays for meta in metas),
            "coverage": {name: sum(meta.coverage[name] for meta in metas) for name in metas[0].coverage},
            "split_hash": prepared.split_hash(list(rows.select("subject_id", "split").iter_rows())),
            "seed": seed,
        }
        return metas[0].model_copy(update=changed)

    return prepared.publish(Path(out), write, task, replace)


def qualified(name: str, numbering: list[str]) -> pl.Expr:
    """The column of identifiers with their numbering; those of a directory that was pooled have it already."""
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
                "rows of one data set answer one question",
                "prepare them alike",
            )
    labels = {f"{meta.label['name']} version {meta.label['version']}" for meta in metas}
    if len(labels) > 1:
        raise DataError(
            f"the labels differ: {', '.join(sorted(labels))}", do="prepare them with one --label and this raylab"
        )


def added(metas: list[IcuMeta], name: str) -> dict[str, Any]:
    """The counts by concept, or by concept and unit, of all directories together."""
    total: dict[str, Any] = {}
    for concept, n in (pair for meta in metas for pair in getattr(meta, name).items()):
        if isinstance(n, dict):
            units = total.setdefault(concept, {})
            units |= {unit: units.get(unit, 0) + count for unit, count in n.items()}
        else:
            total[concept] = total.get(concept, 0) + n
    return dict(sorted(total.items()))


def pooled(attritions: list[list[dict[str, int | str]]]) -> list[dict[str, int | str]]:
    return [
        {key: value if key == "step" else sum(row[key] for row in rows) for key, value in rows[0].items()}
        for rows in zip(*attritions, strict=False)
    ]


def assigned(rows: pl.DataFrame, split: Split, seed: int) -> tuple[pl.DataFrame, Split, int]:
    """`rows` with their `split`, the split with what it holds out named, and how many rows had to leave."""
    if split.kind == "patient":
        fold = splits.folds(rows["subject_id"].to_list(), rows["label"].to_list(), split.folds, seed)
        held = pl.Series(fold) == split.fold
    else:
        column = "period" if split.kind == "temporal" else "source"
        known = sorted(rows[column].drop_nulls().unique().to_list())
        if split.kind == "temporal" and rows[column].null_count():
            raise DataError(
                f"{rows[column].null_count()} of {rows.height} rows have no period",
                "their source shifts or leaves out dates",
                "use patient folds, or a source with periods (mimic3; meds with dates = 'real')",
            )
        holdout = split.holdout or known[-1]
        if holdout not in known or len(known) < 2:
            raise DataError(
                f"{column} '{holdout}' cannot be held out", f"the data has: {', '.join(known)}", "choose one of them"
            )
        split = Split(split.kind, holdout=holdout)
        held = rows[column] == holdout
    out = set(rows.filter(held)["subject_id"])
    stays = held | ~rows["subject_id"].is_in(list(out))
    left, rows, held = int((~stays).sum()), rows.filter(stays), held.filter(stays)
    rest = rows.filter(~held)
    names = splits.assign(rest["subject_id"].to_list(), rest["label"].to_list(), REST, seed)
    rest = rest.with_columns(split=pl.Series(names, dtype=pl.String))
    whole = pl.concat([rest, rows.filter(held).with_columns(split=pl.lit("test"))])
    return whole.sort("stay_id", "at_h"), split, left
