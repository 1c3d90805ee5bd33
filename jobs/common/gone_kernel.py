"""A kernel for notebooks whose environment has gone: it answers every cell with the reason.

    python3 gone_kernel.py CONNECTION_FILE WHY

kernel.sh runs a copy of this file with the Python of Jupyter itself, so it needs nothing but ipykernel.
"""

import sys

from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

DO = "make setup in the clone, then `raylab notebook` again, and restart this kernel"


class GoneKernel(Kernel):
    """Fails every cell with the reason."""

    implementation, implementation_version, banner = "raylab", "0", ""
    language_info = {"name": "python", "mimetype": "text/x-python", "file_extension": ".py"}  # noqa: RUF012

    async def do_execute(self, code, silent, *more, **options):  # type: ignore[no-untyped-def]
        error = {"ename": "EnvironmentGone", "evalue": WHY, "traceback": [WHY, "  next: " + DO]}
        self.send_response(self.iopub_socket, "error", error)
        return {"status": "error", "execution_count": self.execution_count, **error}


if __name__ == "__main__":
    file, WHY = sys.argv[1:]
    IPKernelApp.launch_instance(argv=["-f", file], kernel_class=GoneKernel)
