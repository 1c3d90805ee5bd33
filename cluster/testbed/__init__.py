"""The test cluster: real Slurm on this machine, a login node `ctl` and nodes n1 to n3.

    config.py      what Slurm and the machines are told, as text from one frozen dataclass
    machine.sh     the machines themselves: namespaces, cgroups, network, daemons
    control.py     up, down, crash, boot and the like, from outside
    __main__.py    `python -m cluster.testbed VERB`

Everything that it makes lies in one directory, and ends with `down`. Needs root and Slurm's Debian packages.
"""

import os
from pathlib import Path

INSIDE = Path("/run/raylab-testbed")  # there on the machines of a testbed only: holds the testbed's directory


def root() -> Path:
    """The testbed's directory: of the testbed we run in, else $RAYLAB_TESTBED, else one a user."""
    if INSIDE.is_file():
        return Path(INSIDE.read_text().strip())
    named = os.environ.get("RAYLAB_TESTBED")
    return Path(os.path.realpath(named)) if named else Path(f"/tmp/raylab-testbed-{os.getuid()}")


def controller(of: Path) -> int | None:
    """Pid, as this host counts, of the first process of the login node of the testbed in `of`; None when it is down."""
    try:
        pid = int((of / "run/ctl.pid").read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    # the number may since belong to somebody else
    return pid if words[1:4] == [f"{of}/lib/machine.sh", "controller", str(of)] else None


def bin_directory() -> Path | None:
    """Where sbatch, squeue, ... of the running testbed are; None when none is up. Its files for all nodes lie beside,
    in `shared`."""
    where = root()
    return where / "bin" if INSIDE.is_file() or controller(where) is not None else None
