"""The Slurm proxy with real processes on both sides; the commands behind it are small fakes."""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from cluster import slurm, slurm_proxy
from cluster.slurm import Slurm
from raylab.errors import SlurmError, UsageError
from tests.wait import wait_for

SOURCE = Path(slurm_proxy.__file__)


@pytest.fixture
def opened(commands, tmp_path):
    """Start the server as a job script does; the path of its socket."""
    started = []
    # not below pytest's own directory, which is closed to other users, as one test is not
    directory = Path(tempfile.mkdtemp(prefix="rl-proxy-", dir="/tmp"))

    def start(**scripts: str) -> str:
        where = commands(**scripts)
        process = subprocess.Popen(
            [sys.executable, "-I", str(SOURCE), str(directory)],
            env={"PATH": f"{where}:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
        )
        started.append(process)
        wait_for((directory / "socket").exists, 10, "the proxy")
        return str(directory / "socket")

    yield start
    for process in started:
        process.kill()
        process.wait()
    shutil.rmtree(directory)


def test_a_command_runs_outside_with_its_words_as_they_are(opened):
    path = opened(squeue='printf "[%s]" "$@"; echo oops >&2; exit 3')
    words = ["squeue", "two words", "it's", '"$HOME"', "`id`", "", "ü", "-o%i"]
    assert slurm_proxy.ask(path, words, 10) == (3, "".join(f"[{word}]" for word in words[1:]), "oops\n")


def test_only_slurms_four_commands_run(opened, tmp_path):
    path = opened(squeue="echo yes", srun="echo no")
    for words in (["srun", "x"], ["sh", "-c", f"touch {tmp_path}/ran"], ["/bin/squeue"], ["squeue;id"], [""], []):
        code, out, complaint = slurm_proxy.ask(path, words, 10)
        assert (code, out) == (slurm_proxy.REFUSED, "") and "only" in complaint
    assert not (tmp_path / "ran").exists()
    assert slurm_proxy.ask(path, ["squeue"], 10)[1] == "yes\n"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"squeue\n",
        b"{}\n",
        b'{"words": "squeue", "seconds": 1}\n',
        b'{"words": ["squeue", 3], "seconds": 1}\n',
        b'{"words": ["squeue", "a\\u0000b"], "seconds": 1}\n',
        b'{"words": ["squeue"], "seconds": "soon"}\n',
        b'["squeue"]\n',
        b"\xff\xfe\n",
        b'{"words": ["squeue", "' + b"x" * slurm_proxy.LONGEST + b'"], "seconds": 1}\n',
    ],
)
def test_invalid_requests_are_refused_and_the_proxy_keeps_serving(opened, line):
    path = opened(squeue="echo yes")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        try:
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
            answer = client.makefile().readline()
        except (BrokenPipeError, ConnectionResetError):  # it had read enough
            answer = ""
    assert not answer or json.loads(answer)["code"] == slurm_proxy.REFUSED
    assert slurm_proxy.ask(path, ["squeue"], 10)[1] == "yes\n"


def test_the_socket_is_the_owners_alone(opened):
    assert Path(opened(squeue="true")).stat().st_mode & 0o077 == 0


def test_a_directory_that_others_may_enter_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, str(SOURCE), str(tmp_path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "0700" in done.stderr and not (tmp_path / "socket").exists()


def test_another_user_is_refused(opened, tmp_path):
    """Though the socket's mode would let them in: the kernel says who asks."""
    if os.getuid() != 0:
        pytest.skip("only root can ask as somebody else")
    path = opened(squeue="echo yes")
    for place in (Path(path), Path(path).parent):
        place.chmod(0o777)
    asks = (
        "import json, os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        's.sendall(b\'{"words": ["squeue"], "seconds": 5}\\n\'); print(s.makefile().readline())\n'
    )
    done = subprocess.run([sys.executable, "-c", asks, path], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["code"] == slurm_proxy.REFUSED and "user 0 only" in answer["stderr"] and answer["stdout"] == ""


def test_a_command_that_hangs_is_ended_and_others_are_answered_meanwhile(opened):
    path = opened(squeue="exec sleep 60", scontrol="echo well")
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        waiting.sendall(b'{"words": ["squeue"], "seconds": 1.5}\n')
        assert slurm_proxy.ask(path, ["scontrol"], 10)[1] == "well\n"
        assert json.loads(waiting.makefile().readline())["code"] == slurm_proxy.SILENT
    with pytest.raises(TimeoutError):
        slurm_proxy.ask(path, ["squeue"], 0.2)


def test_slurm_uses_the_proxy_named_in_the_environment(opened, monkeypatch, tmp_path):
    path = opened(
        sbatch='[ "$1" = --parsable ] && cat "$2"; [ -s "$2" ] || { echo "sbatch: error: invalid qos" >&2; exit 1; }',
        squeue="true",
        scontrol="echo 'KillWait = 30 sec'",
    )
    monkeypatch.setenv(slurm.PROXY, path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert Slurm().jobs() == []
    assert Slurm().config() == {"KillWait": "30 sec"}
    (tmp_path / "job.sbatch").write_text("77;cluster")
    assert Slurm().submit(tmp_path / "job.sbatch") == "77"
    (tmp_path / "empty.sbatch").touch()
    with pytest.raises(UsageError, match="invalid qos"):
        Slurm().submit(tmp_path / "empty.sbatch")


def test_a_command_that_is_not_there_outside_is_said_so(monkeypatch):
    assert slurm_proxy.run(["no-such-command-anywhere"], 5)["code"] == slurm_proxy.ABSENT
    monkeypatch.setenv(slurm.PROXY, "/somewhere")
    monkeypatch.setattr(slurm_proxy, "ask", lambda *asked: (slurm_proxy.ABSENT, "", "slurm_proxy: no such file"))
    with pytest.raises(SlurmError, match="scancel was not found"):
        Slurm().cancel(["5"])


def test_a_silent_slurm_is_silent_through_the_proxy_too(opened, monkeypatch):
    monkeypatch.setenv(slurm.PROXY, opened(squeue="exec sleep 60"))
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(slurm, "sleep", lambda seconds: None)
    with pytest.raises(SlurmError, match="does not answer"):
        Slurm().jobs()


def test_a_proxy_that_does_not_answer_is_an_error_and_never_no_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv(slurm.PROXY, str(tmp_path / "socket"))
    with pytest.raises(SlurmError, match=r"the Slurm proxy at .* does not answer"):
        Slurm().jobs()


def test_it_outlives_the_signals_that_its_job_script_ignores(commands, tmp_path):
    directory = tmp_path / "d"
    directory.mkdir(mode=0o700)
    commands(squeue="echo yes")
    line = f"trap '' TERM USR1; exec {sys.executable} -I {SOURCE} {directory}"
    with subprocess.Popen(["bash", "-c", line], env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}) as process:
        try:
            wait_for((directory / "socket").exists, 10, "the proxy")
            for number in (signal.SIGTERM, signal.SIGUSR1):
                process.send_signal(number)
            time.sleep(0.2)
            assert slurm_proxy.ask(str(directory / "socket"), ["squeue"], 10)[1] == "yes\n"
        finally:
            process.kill()


def test_it_needs_the_standard_library_alone_and_an_old_python_reads_it():
    """A compute node's own Python runs it: tried on 3.6, the oldest whose grammar is asked here."""
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 6))
    named = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert named <= set(sys.stdlib_module_names)
