"""raylab concepts: print the concept dictionary and its coverage in a prepared directory."""

import argparse
import sys
from pathlib import Path
from typing import Any

import polars as pl

from jobs import cli
from jobs.common.console import say
from raylab.data.icu.concepts import CONCEPTS, ID_SOURCES, Concept
from raylab.data.icu.meta import IcuMeta
from raylab.data.prepared import read_meta

EXAMPLE = "raylab concepts --data prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="directory prepared from intensive-care data, to show its coverage"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    covered = None if args.data is None else coverage(args.data)
    rows = [describe_concept(concept, covered) for concept in CONCEPTS.values()]
    if not args.quiet:
        table(rows, covered is not None)
    return {"data": None if args.data is None else str(args.data.absolute()), "concepts": rows}


def describe_concept(concept: Concept, covered: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": concept.name,
        "unit": concept.unit,
        "low": concept.low,
        "high": concept.high,
        "precision": concept.precision,
        "kind": "static" if concept.static else "derived" if concept.derived else "series",
        "ids": {source: list(concept.ids[source]) for source in ID_SOURCES},
    }
    return row if covered is None else {**row, **covered[concept.name]}


def coverage(directory: Path) -> dict[str, dict[str, Any]]:
    """For every concept: the fraction of all stays with a plausible value at any time, and the fraction of rows at risk
    with one before the prediction time."""
    meta = read_meta(directory, None, IcuMeta)
    samples = pl.read_parquet(directory / "samples.parquet")
    hours = pl.scan_parquet(directory / "hours.parquet")
    masks = [name for name in hours.collect_schema().names() if name.endswith("__mask")]
    first = hours.group_by("stay_id").agg(pl.col("hour").filter(pl.col(name)).min().alias(name) for name in masks)
    seen = samples.lazy().select("stay_id", "at_h").join(first, "stay_id")
    shares = seen.select((pl.col(name) < pl.col("at_h")).fill_null(False).mean() for name in masks).collect()
    result = {}
    for name, concept in CONCEPTS.items():
        if concept.static:
            rows = 1 - samples[name].null_count() / samples.height if name in samples.columns else 0.0
        else:
            rows = shares[f"{name}__mask"].item() if f"{name}__mask" in masks else 0.0
        stays = rows if concept.derived else meta.coverage[name] / meta.stays
        result[name] = {"stays": stays, "rows": rows}
    return result


def table(rows: list[dict[str, Any]], covered: bool) -> None:
    head = f"{'concept':<21}{'unit':<22}{'plausible':<14}{'kind':<9}"
    say(head + ("stays   rows" if covered else "  ".join(ID_SOURCES)))
    for row in rows:
        line = f"{row['name']:<21}{row['unit'][:20]:<22}{row['low']:g} to {row['high']:g}".ljust(57)
        line += f"{row['kind']:<9}"
        if covered:
            say(f"{line}{row['stays']:>5.0%}  {row['rows']:>5.0%}")
        else:
            say(line + "  ".join(",".join(row["ids"][source]) or "-" for source in ID_SOURCES))
    if covered:
        say("stays: fraction of all stays with a plausible value at any time")
        say("rows: fraction of rows at risk with a plausible value before the prediction time")


if __name__ == "__main__":
    sys.exit(cli.main(["concepts", *sys.argv[1:]]))
