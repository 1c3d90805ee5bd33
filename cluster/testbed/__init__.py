"""The test cluster: real Slurm on this machine, a login node `ctl` and nodes n1 to n3.

    config.py      configuration files of Slurm and the machines, rendered from one frozen dataclass
    faults.py      faults of foreign sites that it can be started with
    accounting.py  Slurm's accounting, for `up --accounting`
    machine.sh     the machines themselves: namespaces, cgroups, network, daemons
    control.py     up, down, crash, boot and other commands, run on the host
    __main__.py    `python -m cluster.testbed VERB`

All its files are in one directory, which `down` removes. It needs root and Slurm's Debian packages.
"""

import os
from pathlib import Path

INSIDE = Path("/run/raylab-testbed")  # exists only on the machines of a testbed; contains the testbed's directory


def root() -> Path:
    """The testbed's directory: that of the testbed in which this runs, else $RAYLAB_TESTBED, else one per user."""
    if INSIDE.is_file():
        return Path(INSIDE.read_text().strip())
    named = os.environ.get("RAYLAB_TESTBED")
    return Path(os.path.realpath(named)) if named else Path(f"/tmp/raylab-testbed-{os.getuid()}")


def controller(of: Path) -> int | None:
    """The host's pid of the first process of the login node of the testbed in `of`; None if the testbed is down."""
    try:
        pid = int((of / "run/ctl.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    # the pid may have been reused by another process
    return pid if words[1:4] == [f"{of}/lib/machine.sh", "controller", str(of)] else None


def bin_directory() -> Path | None:
    """The directory of sbatch, squeue, ... of the running testbed; None if none is up. The sibling directory `shared`
    has the files that all nodes share."""
    where = root()
    return where / "bin" if INSIDE.is_file() or controller(where) is not None else None
