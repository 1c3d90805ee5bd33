"""raylab notebook: write a Jupyter kernel that has the modules, the environment and the home of a site."""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import client, sites
from cluster.sites import Site
from jobs import cli
from jobs.common import home
from jobs.common.console import say
from raylab.errors import DataError, UsageError
from raylab.files import write_json, write_text
from tracking.access import login

EXAMPLE = "raylab notebook --site local"
CODE = Path(__file__).resolve().parents[1]
GONE = Path(__file__).with_name("common") / "gone_kernel.py"
VARIABLES = ("RAYLAB_SITES", home.GROUP, "MLFLOW_EXPERIMENT_NAME", login.FILE)
PATHS = {"mlflow": "raylab-mlflow/runs", "dashboard": "raylab-dashboard/"}  # that the launcher opens
TITLES = {"mlflow": "MLflow (raylab)", "dashboard": "Ray dashboard (raylab)"}
START_SECONDS = 90  # of the MLflow server, on a busy machine


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", default="local", help="a section of sites.toml (default: local)")
    parser.add_argument("--name", default="raylab", help="name of the kernel (default: raylab)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if missing := [name for name in ("ipykernel", "jupyter_core") if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"this Python environment lacks {' and '.join(missing)}",
            "a kernel runs in raylab's environment, not in Jupyter's",
            "make setup, or: pip install 'raylab[notebook]'",
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", args.name):
        raise UsageError(f"'{args.name}' is not a valid kernel name", do="use letters, digits, '.', '-' and '_'")
    from jupyter_core.paths import jupyter_data_dir

    directory = Path(jupyter_data_dir()) / "kernels" / args.name
    site = sites.site(args.site)
    if site.image is not None:
        raise UsageError(
            f"site '{site.name}' runs in an image, but a kernel runs outside of it",
            do="raylab notebook --site local, in an environment of the login node; clusters still use the image",
        )
    write_kernel(directory, site, dict(os.environ))
    if not args.quiet:
        say(f"kernel {args.name}: {directory}")
        if any(os.environ.get(name) for name in login.VARIABLES.values()):
            say("the MLflow login of this shell is not in the kernel: write it into the login file (docs/security.md)")
        say("in JupyterLab choose the kernel, and open docs/notebook.ipynb; here: make notebook")
    return {"name": args.name, "directory": str(directory), "site": site.name}


def write_kernel(directory: Path, site: Site, environment: Mapping[str, str]) -> None:
    """Write the kernel into `directory`, over an earlier one of raylab. Raises DataError over a foreign one."""
    if directory.exists() and any(directory.iterdir()) and not (directory / "kernel.sh").is_file():
        raise DataError(f"{directory} holds a kernel that raylab did not write", do="choose another --name")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    script = directory / "kernel.sh"
    write_text(script, render_script(site, directory, environment))
    script.chmod(0o700)
    write_text(directory / GONE.name, GONE.read_text(encoding="utf-8"))
    write_json(directory / "kernel.json", describe_kernel(script, site))


def describe_kernel(script: Path, site: Site) -> dict[str, Any]:
    """The content of kernel.json."""
    return {
        "argv": [str(script), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": f"raylab ({site.name})",
        "language": "python",
        "metadata": {"debugger": True},
    }


def render_script(site: Site, directory: Path, environment: Mapping[str, str]) -> str:
    """kernel.sh, which runs the environment's Python with its arguments. It holds no secret."""
    python = client.python_of(site, sys.executable)
    kept = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if uri := login.tracking_uri():
        kept["MLFLOW_TRACKING_URI"] = uri
    exports = {**site.environment, "RAYLAB_HOME": str(home.home()), "PYTHONPATH": str(CODE), **kept}
    return SCRIPT.format(
        setup="\n".join(site.setup),
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
        python=shlex.quote(python),
        gone=shlex.quote(str(directory / GONE.name)),
    )


SCRIPT = """\
#!/bin/bash
# Written by `raylab notebook`: runs Python with the modules, the environment and the home of a site
umask 077
path=$PATH  # before the site's modules: that of Jupyter itself
{setup}
{exports}
python={python}
if why=$("$python" -c 'import ipykernel_launcher, jobs.notebook' 2>&1); then exec "$python" "$@"; fi
why="raylab's environment is gone: $python: ${{why##*$'\\n'}}"
printf '%s\\n' "$why" >&2
[ "$2" = ipykernel_launcher ] || exit 1
# A kernel of Jupyter's own Python shows the reason in the notebook: that of the parent process, or on its PATH
parent=$(tr '\\0' '\\n' <"/proc/$PPID/cmdline" | head -n 1)
for jupyter in "$parent" "$(PATH=$path command -v python3)"; do
  if "$jupyter" -c 'import ipykernel' 2>/dev/null; then exec "$jupyter" {gone} "$4" "$why"; fi
done
exit 1
"""


def describe_mlflow() -> dict[str, Any]:
    """MLflow of the home, for jupyter-server-proxy (an entry point in pyproject.toml)."""
    return describe_page("mlflow")


def describe_dashboard() -> dict[str, Any]:
    """The dashboard of the home's cluster, for jupyter-server-proxy (an entry point in pyproject.toml)."""
    return describe_page("dashboard")


def describe_page(page: str) -> dict[str, Any]:
    """How jupyter-server-proxy reaches a page: through a process of this user behind a private Unix socket, which knows
    the present address and adds the token. So neither is in a configuration, a link or a notebook."""
    return {
        "command": [sys.executable, "-m", "jobs.common.jupyter_proxy", page, "{unix_socket}"],
        "unix_socket": True,
        "timeout": START_SECONDS,
        "launcher_entry": {"title": TITLES[page], "path_info": PATHS[page]},
    }


if __name__ == "__main__":
    sys.exit(cli.main(["notebook", *sys.argv[1:]]))
