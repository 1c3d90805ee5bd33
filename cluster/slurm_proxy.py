"""Slurm's commands for a container that has none: a small server on a Unix socket outside, which is asked from inside.

    python3 slurm_proxy.py DIRECTORY   serves DIRECTORY/door until it is killed; DIRECTORY must be its owner's alone

    inside: Slurm.run -> ask -> socket -> serve -> sbatch, squeue, scancel, scontrol

The job script starts it with the compute node's own Python: hence the standard library alone, as of Python 3.6. It runs
four commands, never through a shell, and for its own user only.
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
LONGEST = 1 << 20  # bytes of a request
REFUSED, ABSENT, SILENT = 126, 127, 124  # exit codes of ours, as a shell and `timeout` have them


def ask(path: str, words: list, seconds: float) -> tuple:
    """(exit code, standard output, standard error) of a Slurm command, run outside through the door at `path`.

    Raises TimeoutError when it does not end in time, and OSError when nobody answers at the door.
    """
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(seconds + 5)
        door.connect(path)
        door.sendall((json.dumps({"words": words, "seconds": seconds}) + "\n").encode())
        with door.makefile("r", encoding="utf-8") as answers:
            line = answers.readline()
    if not line:
        raise ConnectionError("the door was shut before it answered")
    answer = json.loads(line)
    if answer["code"] == SILENT:
        raise TimeoutError(f"no answer within {seconds} s")
    return answer["code"], answer["stdout"], answer["stderr"]


def serve(directory: str) -> None:
    """Answer at DIRECTORY/door until killed. SystemExit where others could reach it."""
    place = Path(directory)
    status = place.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        sys.exit(f"door: {directory} must be yours alone (mode 0700)")
    os.umask(0o077)
    with Server(str(place / "door"), Handler) as server:
        server.serve_forever()


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 32


class Handler(socketserver.StreamRequestHandler):
    """One request: a line of JSON in, a line of JSON out."""

    def handle(self) -> None:
        line = self.rfile.readline(LONGEST + 1)  # also of those who are refused: they are still writing
        ours = _uid(self.request) == os.getuid()
        answer = _answer(line) if ours else _no(f"for user {os.getuid()} only")
        self.wfile.write((json.dumps(answer) + "\n").encode())


def _uid(connection: socket.socket) -> int:
    """Who is on the other side, from the kernel."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def _answer(line: bytes) -> dict:
    try:
        asked = json.loads(line.decode())
        words, seconds = asked["words"], float(asked["seconds"])
    except (ValueError, KeyError, TypeError):
        return _no(f"a request is a line of JSON with words and seconds, of {LONGEST} bytes at the most")
    if not isinstance(words, list) or not all(isinstance(word, str) and "\0" not in word for word in words):
        return _no("words are strings")
    if not words or words[0] not in COMMANDS:
        return _no(f"runs {', '.join(COMMANDS)} only")
    return run(words, seconds)


def run(words: list, seconds: float) -> dict:
    """{"code", "stdout", "stderr"} of a command, which has `seconds`."""
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
        return {"code": ABSENT, "stdout": "", "stderr": f"door: {error}"}
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return {"code": done.returncode, "stdout": out, "stderr": err}


def _no(why: str) -> dict:
    return {"code": REFUSED, "stdout": "", "stderr": f"door: {why}"}


if __name__ == "__main__":
    serve(sys.argv[1])
