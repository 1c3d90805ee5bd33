"""docs/notebook.ipynb, executed in a kernel of `raylab notebook` by a process of its own, which tests can kill.

python -m tests.notebooks SITE OUT    executes the notebook, with this site if it is not "", and writes it to OUT
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
CELL_SECONDS = 500


class Session:
    """A login session that executes the notebook: its processes have the variable SESSION of their environment."""

    def __init__(self, place: Path, environment: Mapping[str, str], site: str = "") -> None:
        self.place, self.mark = place, f"session-{os.urandom(4).hex()}"
        self.out = place / f"{self.mark}.ipynb"
        self.environment = {
            **environment,
            "JUPYTER_DATA_DIR": str(place / "jupyter"),
            "JUPYTER_RUNTIME_DIR": str(place / "jupyter-runtime"),
            "IPYTHONDIR": str(place / "ipython"),
            "RAYLAB_TEST_SESSION": self.mark,
        }
        write = [sys.executable, "-m", "jobs.notebook", "--quiet", *(["--site", site] if site else [])]
        subprocess.run(write, env=self.environment, cwd=ROOT, check=True, capture_output=True)
        with (place / f"{self.mark}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.notebooks", site, str(self.out)]
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def processes(self) -> list[psutil.Process]:
        """Every process of the session, whatever session and parent the kernel thinks it has."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAYLAB_TEST_SESSION") == self.mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_kernel(self) -> None:
        for process in self.processes():
            if "ipykernel_launcher" in process.cmdline():
                process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def kill_all(self) -> None:
        """What a login node does that ends all processes of a session."""
        while found := self.processes():
            for process in found:
                process.kill()
            self.process.poll()
            psutil.wait_procs(found, timeout=10)

    def finish(self, seconds: float) -> nbformat.NotebookNode:
        """The executed notebook."""
        code = self.process.wait(seconds)
        assert code == 0, (self.place / f"{self.mark}.log").read_text()[-5000:]
        return nbformat.read(self.out, as_version=4)


def texts(book: nbformat.NotebookNode) -> str:
    """Everything that the cells have printed or returned as text."""
    found: list[Any] = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(found)


def main() -> None:
    site, out = sys.argv[1:]
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    cell = next(cell for cell in book.cells if cell.source.startswith("import raylab"))
    assert "SITE = None" in cell.source
    if site:
        cell.source = cell.source.replace("SITE = None", f"SITE = {site!r}")
    NotebookClient(book, kernel_name="raylab", timeout=CELL_SECONDS).execute()
    nbformat.write(book, out)


if __name__ == "__main__":
    main()
