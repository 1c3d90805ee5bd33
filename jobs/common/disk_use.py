"""What a run occupies on disk, by what it is for."""

import filecmp
from pathlib import Path
from typing import NamedTuple

# Patterns below a run's directory. Whatever is in none of them is the rest: records, model, scores and plots.
PARTS = {
    "checkpoints": ("checkpoints", "trials/*/checkpoints"),
    "logs": ("ray", "ray.log", "ray-logs", "trials/*/ray.log", "trials/*/ray-logs"),
    "trials": ("trials/*/model",),  # of a search, but the winner's
}
REST = "rest"


class Use(NamedTuple):
    files: int
    bytes: int

    def __add__(self, other: object) -> "Use":
        assert isinstance(other, Use)
        return Use(self.files + other.files, self.bytes + other.bytes)


NOTHING = Use(0, 0)


def list_paths(directory: Path, part: str) -> list[Path]:
    """The files and directories of a part of a run; not those behind a link, which may be anybody's."""
    found = [path for pattern in PARTS[part] for path in sorted(directory.glob(pattern))]
    found = [
        path for path in found if path.parent.resolve() == directory.resolve() / path.parent.relative_to(directory)
    ]
    return [path for path in found if not is_of_winner(path, directory)] if part == "trials" else found


def is_of_winner(model: Path, search: Path) -> bool:
    """Whether the model of a trial is that of its search."""
    ours, theirs = (folder / "model.safetensors" for folder in (model, search / "model"))
    return ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)


def measure(path: Path) -> Use:
    """Files and bytes of a file or of a directory with all that is in it. Links are not followed."""
    inside = () if path.is_symlink() else path.rglob("*")
    sizes = [one.lstat().st_size for one in (path, *inside) if not one.is_dir() or one.is_symlink()]
    return Use(len(sizes), sum(sizes))


def measure_parts(directory: Path) -> dict[str, Use]:
    """Files and bytes of each part of a run, and of the rest."""
    parts = {part: sum(map(measure, list_paths(directory, part)), NOTHING) for part in PARTS}
    known = sum(parts.values(), NOTHING)
    total = measure(directory)
    return {**parts, REST: Use(total.files - known.files, total.bytes - known.bytes)}


def show_bytes(count: int) -> str:
    """`1.2 GB`, in powers of 1,000."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
