"""Pictures of single patients: for the owner of the run's directory alone, unless they are shared on purpose.

Synthetic patients are nobody: what shows them goes to MLflow like everything else.
"""

import argparse
from pathlib import Path

from jobs.common.progress import say

FEW = 10  # patients: a mean over fewer is treated as a picture of each of them


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share-individuals",
        action="store_true",
        help="send pictures of single patients to MLflow; else they stay in the run's directory",
    )


def folder(directory: Path) -> Path:
    """DIRECTORY/individuals of a run's directory, 0700: never shared with a group, never sent to MLflow."""
    path = directory / "individuals"
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    return path


def tell(paths: list[str]) -> None:
    """Say where pictures of single patients lie, and how to share them."""
    say("of single patients, for you alone and not in MLflow (--share-individuals sends them):")
    say("\n".join(f"  {path}" for path in paths))
