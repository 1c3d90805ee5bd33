"""`raylab completion`: its script in a real bash."""

import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from raylab.tasks import TASKS

ASK = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_raylab
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "raylab"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert cli.main(["completion", "bash", "--quiet", "--json", "result.json"]) == 0
    path.write_text(json.loads((path.parent / "result.json").read_text())["script"])
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("home")
    for name in ("first", "fine tuned", "second"):
        (made / "runs" / name).mkdir(parents=True)
        (made / "runs" / name / "run.json").touch()
    (made / "runs" / ".opening").mkdir()
    (made / "runs" / "foreign").mkdir()  # it is no run
    return made


def complete(script: Path, home: Path, words: str) -> list[str]:
    """What bash offers for the last of `words`, which are cut at `=` as bash cuts them."""
    asked = ASK.format(script=script, words=words)
    environment = {**os.environ, "RAYLAB_HOME": str(home)}
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=30, env=environment)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("raylab tr", {"train", "transfer"}),
        ("raylab train --wor", {"--workers"}),
        ("raylab cluster s", {"status", "submit", "stop"}),
        ("raylab train ''", set(TASKS)),
        ("raylab evaluate ards --run f", {"first", "fine\\ tuned"}),
        ("raylab transfer ards --from s", {"second"}),
        ("raylab resume ''", {"first", "fine\\ tuned", "second"}),
        ("raylab rm first --dry-run s", {"second"}),
        ("raylab rm first --o", {"--only", "--older-than"}),
        ("raylab cluster resume fir", {"first"}),
        ("raylab train ards --set optim.weight_d", {"optim.weight_decay="}),
        ("raylab train ards --set optim.lr = 1e-3 model.hid", {"model.hidden="}),
        ("raylab train ards --set model.name = boosting model.lea", {"model.leaves=", "model.learning_rate="}),
        ("raylab train covidnet --set data.ma", {"data.mask="}),
        ("raylab train ards --set data.ma", {""}),
        ("raylab tune ards --space model.drop", {"model.dropout="}),
        ("raylab train ards --set model.name =", {"gru", "lstm", "grud", "boosting", "logistic", "last_pf", "last_sf"}),
        ("raylab train ards --set model.name = bo", {"boosting"}),
        ("raylab train covidnet --set model.name = resnet5", {"resnet50"}),
        ("raylab recipe ards --model l", {"lstm", "logistic", "last_pf", "last_sf"}),
        ("raylab train ards --set scaling.gpu = t", {"true"}),
        ("raylab train ards --set loop.gradient_reduction =", {"auto", "exact", "float"}),
        ("raylab train ards --set optim.lr = 1e-3 --se", {"--set", "--seed"}),
    ],
)
def test_bash_completes(script: Path, home: Path, words: str, found: set[str]) -> None:
    assert set(complete(script, home, words)) == found


def test_a_home_without_runs_offers_none(script: Path, tmp_path: Path) -> None:
    assert complete(script, tmp_path, "raylab resume ''") == [""]


def test_a_directory_and_a_file_are_told_apart(script: Path) -> None:
    assert "_shtab_raylab_train___data_COMPGEN=_shtab_compgen_dirs" in script.read_text()
    assert "_shtab_raylab_train___json_COMPGEN=_shtab_compgen_files" in script.read_text()


class Shell:
    """An interactive bash in a terminal, in which `raylab` prints its arguments."""

    def __init__(self, script: Path, home: Path) -> None:
        environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "RAYLAB_HOME": str(home), "PS1": "", "PS2": ""}
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.type(f"bind 'set bell-style none'; source {script}; raylab() {{ printf '<%s>' \"$@\"; echo '|'; }}\n")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def run(self, keys: str) -> list[str]:
        """The arguments that `raylab` gets for `keys`, in which a tab completes."""
        self.type(keys + "\n")
        said, deadline = "", time.monotonic() + 60
        while not (match := re.search(r"((?:<[^<>]*>)+)\|", said)):
            assert select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))[0], said
            said += os.read(self.terminal, 4096).decode()
        return re.findall(r"<([^<>]*)>", match[1])

    def close(self) -> None:
        self.type("exit\n")
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.fixture(scope="module")
def shell(script: Path, home: Path) -> Iterator[Shell]:
    made = Shell(script, home)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("raylab eval\tards --run fir\t--sp\tt\t", ["evaluate", "ards", "--run", "first", "--split", "test"]),
        ("raylab resume fine\t", ["resume", "fine tuned"]),
        ("raylab train ards --set optim.weight_d\t1 model.name=boo\tmodel.tr\t5 --see\t3",
         ["train", "ards", "--set", "optim.weight_decay=1", "model.name=boosting", "model.trees=5", "--seed", "3"]),
    ],
)  # fmt: skip
def test_keys_typed_into_bash_become_whole_words(shell: Shell, keys: str, words: list[str]) -> None:
    assert shell.run(keys) == words
