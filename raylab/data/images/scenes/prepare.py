"""`prepare` of scenes: the pixels of a source -> `scenes.npy` + `index.parquet` + meta.json.

scenes.npy     uint8 or uint16 [N, bands, size, size], in the values of the files, read row by row
index.parquet  row, id, place, source, labels, split, zone, x, y; row i of it is scene i

Scenes of one `place` never cross splits: those of one tile of the ground, or of one block of rows, and exact copies.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data import prepared, splits
from raylab.data.images.duplicates import merged
from raylab.data.images.scenes.meta import BandStatistics, SceneMeta
from raylab.data.images.scenes.scene import Scene, SceneSource
from raylab.data.images.scenes.split import FRACTIONS, carve_val, near_others, tile_of
from raylab.errors import DataError

CHUNK = 64  # scenes in memory at a time
MOST_NODATA = 0.5  # fraction of a scene's pixels without data above which it is left out
CLOUDY = 0.95  # fraction of a scene's pixels under clouds above which it is left out
# Cloud detector of Braaten, Cohen and Yang (2015, Int J Remote Sens 36:1650), with the short-wave infrared that tells
# snow from clouds: reflectances of Sentinel-2, which are values / 10,000
CLOUD_BANDS = ("B03", "B04", "B11")
REFLECTANCE = 10_000.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Looked:
    """What reading the pixels has shown: problems {scene: what and why}, and of each scene the fractions of its pixels
    without data and under clouds, the bands that have none, and the SHA-256 of its values."""

    bad: dict[int, str]
    nodata: NDArray[np.float64]
    empty: NDArray[np.bool_]
    cloud: NDArray[np.float64]
    sha256: list[str]


def prepare_scenes(
    task: str,
    out: Path,
    source: SceneSource,
    *,
    seed: int,
    tile_km: float = 10.0,
    random_split: bool = False,
    skip_bad: bool = False,
    replace: bool = False,
    raw: Sequence[Path] = (),
    progress: Progress | None = None,
) -> SceneMeta:
    """Prepare the directory `out` and return its meta.

    Splits are those of the source, or by tiles of `tile_km` km where places are known, or at random, with a warning.
    Raises DataError for scenes that cannot be read, unless `skip_bad`, and for a split without scenes.
    """

    def write(work: Path) -> SceneMeta:
        return _write(task, work, source, seed, 1000 * tile_km, random_split, skip_bad, progress)

    return prepared.publish(out, write, task, replace, list(raw))


def _write(
    task: str,
    work: Path,
    source: SceneSource,
    seed: int,
    tile_m: float,
    random_split: bool,
    skip_bad: bool,
    progress: Progress | None,
) -> SceneMeta:
    scenes = source.scenes
    steps = [*source.attrition, ("scenes of the source", len(scenes))]
    pixels = np.lib.format.open_memmap(
        work / "all.npy",
        mode="w+",
        dtype=np.uint8 if source.bits == 8 else np.uint16,
        shape=(len(scenes), len(source.bands), source.size, source.size),
    )
    looked = read_all(source, pixels, progress)
    if looked.bad and (not skip_bad or len(looked.bad) == len(scenes)):
        raise DataError(
            f"{len(looked.bad)} of {len(scenes)} scenes cannot be used:\n{listed(looked.bad.values())}",
            do="repair them or take them out; --skip-bad skips them and lists them in meta.json",
        )
    keep = np.array([at not in looked.bad for at in range(len(scenes))])

    def leave_out(step: str, stay: NDArray[np.bool_]) -> None:
        nonlocal keep
        if (keep & ~stay).any():
            keep = keep & stay
            steps.append((step, int(keep.sum())))

    if looked.bad:
        steps.append(("without unreadable scenes", int(keep.sum())))
    if gone := [band for band, lacks in zip(source.bands, looked.empty[keep].all(axis=0), strict=True) if lacks]:
        raise DataError(
            f"band {', '.join(gone)} of {source.name} has no data in any scene",
            f"all of its values are {source.nodata}",
            "give files that have it, or files without it",
        )
    leave_out(f"without scenes of more than {MOST_NODATA:.0%} pixels without data", looked.nodata <= MOST_NODATA)
    leave_out(f"without scenes of more than {CLOUDY:.0%} clouds", looked.cloud <= CLOUDY)
    rows = np.flatnonzero(keep).tolist()
    if not rows:
        raise DataError(
            f"no scene of {source.name} is left",
            "; ".join(f"{step}: {n:,}" for step, n in steps),
            "give scenes that show the ground",
        )
    by_place = not random_split and all(scenes[at].place is not None for at in rows)
    place = [place_of(source, at, tile_m if by_place else None) for at in rows]
    twins = Counter(looked.sha256[at] for at in rows)
    copies = sum(n - 1 for n in twins.values())
    # "~" sorts after other names, so that groups are named after a place
    place = merged([[name, f"~{looked.sha256[at]}"] for name, at in zip(place, rows, strict=True)])
    warnings = [*source.warnings]
    if copies:
        warnings.append(f"{copies:,} scenes are exact copies of another one; copies stay together")
    split, how = make_split(source, [scenes[at] for at in rows], place, seed, by_place, tile_m)
    if how.startswith("at random"):
        why = "as asked for" if random_split else "because the source does not say where its scenes are"
        warnings.append(
            f"the splits are random, {why}: neighbours may be in train and test, so scores are higher than they would "
            "be elsewhere"
        )
    where = [one for one in (scenes[at].place for at in rows) if one is not None]
    if by_place and source.resolution_m is not None:
        width = source.size * source.resolution_m
        far = [number for number, near in enumerate(near_others(where, split, 2 * width)) if not near]
        if len(far) < len(rows):
            rows, place, split = [rows[k] for k in far], [place[k] for k in far], [split[k] for k in far]
            steps.append((f"without scenes within {2 * width:g} m of another split", len(rows)))
    for name in FRACTIONS:
        if name not in split:
            raise DataError(
                f"no scene is left for the {name} split",
                f"{len(rows)} scenes in {len(set(place))} groups that stay together",
                "prepare more scenes, or smaller tiles with --tile-km",
            )
    order = sorted(range(len(rows)), key=lambda k: (list(FRACTIONS).index(split[k]), rows[k]))
    rows, place, split = [rows[k] for k in order], [place[k] for k in order], [split[k] for k in order]
    statistics = copy_rows(pixels, work / "scenes.npy", rows, split.count("train"), source)
    del pixels
    (work / "all.npy").unlink()
    if flat := [band for band, std in zip(source.bands, statistics.std, strict=True) if std == 0]:
        raise DataError(
            f"band {', '.join(flat)} has one value in all of train", "a band without contrast cannot be standardised"
        )
    write_index(work / "index.parquet", source, rows, place, split)
    counts = {
        name: {
            label: sum(k in scenes[at].labels for at, part in zip(rows, split, strict=True) if part == name)
            for k, label in enumerate(source.classes)
        }
        for name in FRACTIONS
    }
    if absent := [label for label, n in counts["train"].items() if n == 0]:
        warnings.append(f"no {', '.join(absent)} in train")
    if touched := int((looked.nodata[rows] > 0).sum()):
        warnings.append(f"{touched:,} scenes have pixels without data, which count as the mean of their band")
    unit = "tile" if by_place else source.unit
    return SceneMeta(
        patient_ids=prepared.PatientIds(table="index.parquet", column="place", unit=unit),
        numbering=[] if source.synthetic else [f"tiles of {tile_m / 1000:g} km" if by_place else source.name],
        task=task,
        source=source.name,
        synthetic=source.synthetic,
        raylab=version("raylab"),
        seed=seed,
        split_hash=prepared.split_hash(list(zip(place, split, strict=True))),
        counts=counts,
        attrition=[{"step": step, "scenes": n} for step, n in steps],
        warnings=warnings,
        classes=list(source.classes),
        several_labels=source.several_labels,
        size=source.size,
        bands=list(source.bands),
        bits=8 if source.bits == 8 else 16,
        nodata=source.nodata,
        resolution_m=source.resolution_m,
        split_by=how,
        statistics=statistics,
        skipped=[{"file": scenes[at].id, "reason": why} for at, why in sorted(looked.bad.items())],
    )


def read_all(source: SceneSource, pixels: NDArray[np.unsignedinteger], progress: Progress | None) -> Looked:
    """Read every scene into its row of `pixels`, chunk by chunk."""
    total = len(source.scenes)
    bad: dict[int, str] = {}
    nodata, cloud, sha256 = np.zeros(total), np.zeros(total), [""] * total
    empty = np.zeros((total, len(source.bands)), dtype=bool)

    def one(at: int) -> None:
        try:
            scene = source.read(at)
            if scene.shape != pixels.shape[1:] or scene.dtype != pixels.dtype:
                found, needed = (f"{kind} {list(shape)}" for kind, shape in
                                 ((scene.dtype, scene.shape), (pixels.dtype, pixels.shape[1:])))  # fmt: skip
                raise DataError(f"{source.scenes[at].id} is {found}, not {needed}", "all scenes need one shape")
        except DataError as error:
            bad[at] = ": ".join(text for text in (error.what, error.why, error.do) if text)
            return
        pixels[at] = scene
        nodata[at] = nodata_fraction(scene, source.nodata)
        empty[at] = source.nodata is not None and (scene == source.nodata).all(axis=(1, 2))
        cloud[at] = cloud_fraction(scene, source.bands)
        sha256[at] = hashlib.sha256(scene.tobytes()).hexdigest()

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, total, CHUNK):
            for _ in pool.map(one, range(start, min(start + CHUNK, total))):
                pass
            if progress is not None:
                progress(min(start + CHUNK, total), total)
    return Looked(bad, nodata, empty, cloud, sha256)


def nodata_fraction(scene: NDArray[np.unsignedinteger], nodata: int | None) -> float:
    """The fraction of pixels [bands, S, S] without data in some band."""
    return 0.0 if nodata is None else float((scene == nodata).any(axis=0).mean())


def cloud_fraction(scene: NDArray[np.unsignedinteger], bands: Sequence[str]) -> float:
    """The fraction of pixels [bands, S, S] under bright clouds; 0 where the bands that show them are not there."""
    if not set(CLOUD_BANDS) <= set(bands):
        return 0.0
    green, red, infrared = (scene[bands.index(name)] / REFLECTANCE for name in CLOUD_BANDS)
    is_cloud = (infrared > 0.16) & ((green > 0.39) | ((green > 0.175) & (green > red)))
    return float(is_cloud.mean())


def find_defect(scene: NDArray[np.unsignedinteger], bands: Sequence[str], nodata: int | None) -> str | None:
    """Why `prepare` leaves a scene [bands, S, S] out; None if it does not."""
    if nodata_fraction(scene, nodata) > MOST_NODATA:
        return f"more than {MOST_NODATA:.0%} pixels without data"
    if cloud_fraction(scene, bands) > CLOUDY:
        return f"more than {CLOUDY:.0%} clouds"
    return None


def place_of(source: SceneSource, at: int, tile_m: float | None) -> str:
    """The name of what scene `at` stays together with; by tiles of `tile_m` metres if given."""
    scene = source.scenes[at]
    if tile_m is not None and scene.place is not None:
        return tile_of(scene.place, tile_m)
    return scene.block or scene.id


def make_split(
    source: SceneSource, scenes: Sequence[Scene], place: list[str], seed: int, by_place: bool, tile_m: float
) -> tuple[list[str], str]:
    """The split of every scene, and how it was made."""
    original = [scene.split for scene in scenes]
    if all(part is not None for part in original):
        return carve_val(place, [str(part) for part in original], seed), (
            f"the original split, with val carved from train by {source.unit}s"
        )
    # of multi-labels the tiles are drawn without strata: a tile has many classes
    strata = [0 if source.several_labels else scene.labels[0] for scene in scenes]
    how = f"by tiles of {tile_m / 1000:g} km" if by_place else f"at random, by {source.unit}s"
    return splits.assign(place, strata, FRACTIONS, seed), how


def copy_rows(
    pixels: NDArray[np.unsignedinteger], path: Path, rows: list[int], train: int, source: SceneSource
) -> BandStatistics:
    """Write `rows` to `path`, and return the statistics of the first `train` of them: exact, from sums of integers."""
    out = np.lib.format.open_memmap(path, mode="w+", dtype=pixels.dtype, shape=(len(rows), *pixels.shape[1:]))
    bands = pixels.shape[1]
    count, total, square = ([0] * bands for _ in range(3))
    for start in range(0, len(rows), CHUNK):
        block = pixels[rows[start : start + CHUNK]]
        out[start : start + CHUNK] = block
        for band in range(bands):
            values = block[: max(0, train - start), band].astype(np.int64).ravel()
            values = values if source.nodata is None else values[values != source.nodata]
            count[band] += len(values)
            total[band] += int(values.sum())
            square[band] += int((values * values).sum())
    out.flush()
    if empty := [source.bands[band] for band in range(bands) if count[band] == 0]:
        raise DataError(f"band {', '.join(empty)} has no data in train", do="prepare other scenes")
    return BandStatistics(
        mean=[t / n for t, n in zip(total, count, strict=True)],
        std=[((n * s - t * t) ** 0.5) / n for n, t, s in zip(count, total, square, strict=True)],
    )


def write_index(path: Path, source: SceneSource, rows: list[int], place: list[str], split: list[str]) -> None:
    """Write index.parquet, one row per scene."""
    scenes = [source.scenes[at] for at in rows]
    where = [scene.place for scene in scenes]
    pl.DataFrame(
        {
            "row": range(len(rows)),
            "id": [scene.id for scene in scenes],
            "place": place,
            "source": [source.name] * len(rows),
            "labels": [list(scene.labels) for scene in scenes],
            "split": split,
            "zone": [None if one is None else one.zone for one in where],
            "x": [None if one is None else one.x for one in where],
            "y": [None if one is None else one.y for one in where],
        },
        schema_overrides={"row": pl.Int64, "labels": pl.List(pl.Int64), "zone": pl.String, "x": pl.Float64,
                          "y": pl.Float64},
    ).write_parquet(path)  # fmt: skip


def listed(problems: Iterable[str], most: int = 10) -> str:
    """The first problems, one a line, and how many more there are."""
    lines = list(problems)
    more = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*(f"  {line}" for line in lines[:most]), *more])
