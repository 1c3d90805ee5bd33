"""Pictures of single patients: private to the owner of the run's directory unless shared explicitly.

Pictures of synthetic patients are not private and go to MLflow like everything else.
"""

import argparse
from pathlib import Path

from jobs.common.console import say

FEW = 10  # patients: a mean over fewer counts as a picture of single patients


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share-individuals",
        action="store_true",
        help="send pictures of single patients to MLflow; by default they stay in the run's directory",
    )


def folder(directory: Path) -> Path:
    """Create DIRECTORY/individuals with mode 0700; it is never shared with a group or sent to MLflow."""
    path = directory / "individuals"
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    return path


def tell(paths: list[str]) -> None:
    """Print where pictures of single patients are, and how to share them."""
    say("pictures of single patients, readable only by you and not sent to MLflow (--share-individuals sends them):")
    say("\n".join(f"  {path}" for path in paths))
