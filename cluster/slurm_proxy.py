"""Slurm's commands for a container that has none: a small server on a Unix socket runs them outside.

    python3 slurm_proxy.py DIRECTORY   serves DIRECTORY/socket until it is killed; DIRECTORY must have mode 0700

    inside: Slurm.run -> ask -> socket -> serve -> sbatch, squeue, scancel, scontrol

The job script starts it with the compute node's own Python, so it uses only the standard library of Python 3.6. It runs
four commands, never through a shell, and only for its own user.
"""

import json
import os
import socket
import socketserver
import struct
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")
LONGEST = 1 << 20  # maximum bytes of a request
REFUSED, ABSENT, SILENT = 126, 127, 124  # exit codes, as of a shell and of `timeout`


def ask(path: str, words: list, seconds: float) -> tuple:
    """(exit code, standard output, standard error) of a Slurm command, run outside by the proxy at `path`.

    Raises TimeoutError if it does not end in time, and OSError if the proxy does not answer.
    """
    with socket.socket(socket.AF_UNIX) as proxy:
        proxy.settimeout(seconds + 5)
        proxy.connect(path)
        proxy.sendall((json.dumps({"words": words, "seconds": seconds}) + "\n").encode())
        with proxy.makefile("r", encoding="utf-8") as answers:
            line = answers.readline()
    if not line:
        raise ConnectionError("the proxy closed the connection before it answered")
    answer = json.loads(line)
    if answer["code"] == SILENT:
        raise TimeoutError(f"no answer within {seconds} s")
    return answer["code"], answer["stdout"], answer["stderr"]


def serve(directory: str) -> None:
    """Answer at DIRECTORY/socket until killed. Raises SystemExit if other users could reach the directory."""
    place = Path(directory)
    status = place.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        sys.exit(f"slurm_proxy: {directory} must be private (mode 0700)")
    os.umask(0o077)
    with Server(str(place / "socket"), Handler) as server:
        server.serve_forever()


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 32


class Handler(socketserver.StreamRequestHandler):
    """One request: a line of JSON in, a line of JSON out."""

    def handle(self) -> None:
        line = self.rfile.readline(LONGEST + 1)  # read also from refused clients, which are still writing
        ours = _uid(self.request) == os.getuid()
        answer = _answer(line) if ours else _refuse(f"serves user {os.getuid()} only")
        self.wfile.write((json.dumps(answer) + "\n").encode())


def _uid(connection: socket.socket) -> int:
    """The user id of the client, from the kernel."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def _answer(line: bytes) -> dict:
    try:
        request = json.loads(line.decode())
        words, seconds = request["words"], float(request["seconds"])
    except (ValueError, KeyError, TypeError):
        return _refuse(f"a request is one line of JSON with words and seconds, of at most {LONGEST} bytes")
    if not isinstance(words, list) or not all(isinstance(word, str) and "\0" not in word for word in words):
        return _refuse("words must be strings")
    if not words or words[0] not in COMMANDS:
        return _refuse(f"runs {', '.join(COMMANDS)} only")
    return run(words, seconds)


def run(words: list, seconds: float) -> dict:
    """{"code", "stdout", "stderr"} of a command, which may take `seconds`."""
    try:
        done = subprocess.run(  # noqa: UP022 - as of Python 3.6
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"code": SILENT, "stdout": "", "stderr": ""}
    except OSError as error:
        return {"code": ABSENT, "stdout": "", "stderr": f"slurm_proxy: {error}"}
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return {"code": done.returncode, "stdout": out, "stderr": err}


def _refuse(why: str) -> dict:
    return {"code": REFUSED, "stdout": "", "stderr": f"slurm_proxy: {why}"}


if __name__ == "__main__":
    serve(sys.argv[1])
