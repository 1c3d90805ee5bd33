import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import jobscript
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from raylab.errors import UsageError
from tests.wait import wait_for

ROOT = Path(__file__).parents[3]

TAG = JobTag("1a2b", 0, "worker", "gpu", "r1")
NODE = NodeType(cpus=8, memory_mb=16000, gpus=2, gpu_type="v100", features="big&fast", sbatch=("--exclusive",))
SITE = Site(
    name="full",
    partition="gpus",
    account="cstao",
    qos="low",
    lead_seconds=90,
    setup=("module load Python", "source /p/env/bin/activate"),
    environment={"HTTPS_PROXY": "http://proxy:3128"},
    sbatch=("--mail-type=NONE",),
    nodes={"gpu": NODE},
)
ANY = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


def text(site: Site = SITE, node: NodeType = NODE, **other) -> str:
    facts = {
        "site": site, "node": node, "tag": TAG, "job_name": "raylab-ray-gpu", "time": "02:00:00",
        "log": Path("/p/ray/logs"), "environment": {"RAYLAB_HOME": "/p/ray"}, "command": ["python", "-m", "x"],
    }  # fmt: skip
    return jobscript.script(**{**facts, **other})


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_every_option_of_a_job():
    assert options(text(nodes=3)) == [
        "--job-name=raylab-ray-gpu",
        "--comment=raylab:1a2b:0:worker:gpu:r1",
        "--partition=gpus",
        "--account=cstao",
        "--qos=low",
        "--time=02:00:00",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--mem=16000M",
        "--gres=gpu:v100:2",
        '--constraint="big&fast"',
        "--signal=USR1@90",
        "--output=/p/ray/logs/%x-%j.out",
        "--open-mode=append",
        "--chdir=/p/ray/logs",
        "--requeue",
        "--mail-type=NONE",
        "--exclusive",
    ]


def test_what_a_site_does_not_say_is_left_to_slurm():
    plain = Site(name="plain", nodes={"cpu": NodeType(cpus=1, memory_mb=1000)})
    names = {option.split("=")[0] for option in options(text(plain, plain.nodes["cpu"]))}
    assert not names & {"--partition", "--account", "--qos", "--gres", "--constraint"}


def test_a_node_types_own_partition_stands_before_the_sites():
    assert "--partition=dev" in options(text(node=NODE.model_copy(update={"partition": "dev"})))


def test_options_come_before_the_first_command_or_slurm_would_not_read_them():
    lines = text().splitlines()
    assert lines[0] == "#!/bin/bash"
    last = max(at for at, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])


def test_a_job_that_shall_not_be_started_again_says_so():
    assert "--no-requeue" in options(text(requeue=False))


# --- words of #SBATCH lines ---


def words(line: str) -> list[str]:
    """How sbatch cuts a line into words: blanks part, quotes and backslashes protect, # ends (src/common/slurm_opt.c;
    tests/slurm/test_render.py asks the real one)."""
    found, word, quote, at = [], None, "", 0
    while at < len(line):
        letter = line[at]
        if letter == "\\" and quote != "'":
            at += 1
            word = (word or "") + line[at]
        elif quote:
            if letter == quote:
                quote = ""
            else:
                word = (word or "") + letter
        elif letter in "\"'":
            quote, word = letter, word or ""
        elif letter in " \t":
            if word is not None:
                found.append(word)
            word = None
        elif letter == "#":
            break
        else:
            word = (word or "") + letter
        at += 1
    assert not quote, "an open quote"
    return found + ([word] if word is not None else [])


@given(st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), min_size=1))
def test_any_name_is_one_word_of_an_sbatch_line(name):
    assert words(f"--job-name={jobscript.quoted(name)} --next") == [f"--job-name={name}", "--next"]


@pytest.mark.parametrize(
    "name", ["two words", 'a "quoted" one', "it's", "back\\slash", "100%", "a#b", "$HOME", "`id`", ""]
)
def test_names_that_need_care(name):
    assert words(jobscript.quoted(name)) == [name]


def test_a_plain_word_is_left_as_it_is():
    assert jobscript.quoted("/p/scratch/ray-1_x.y/%j") == "/p/scratch/ray-1_x.y/%j"


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_line_break_would_end_the_option(end):
    with pytest.raises(UsageError, match="line break"):
        text(job_name=f"a{end}#SBATCH --account=other")


def test_a_percent_sign_of_a_path_is_not_a_pattern_of_slurms():
    script = text(log=Path("/p/50%j"))
    assert "--output=/p/50%%j/%x-%j.out" in options(script) and "--chdir=/p/50%j" in options(script)


# --- what bash makes of it ---


def run(script: str, tmp_path: Path, **environment: str) -> dict:
    """The script in real bash, with an srun that notes what it was given."""
    note = tmp_path / "note.json"
    srun = tmp_path / "srun"
    srun.write_text(
        "#!/usr/bin/env python3\nimport json, os, signal, sys\n"
        "mask = os.umask(0)\n"
        "ignored = [s.name for s in (signal.SIGTERM, signal.SIGUSR1) if signal.getsignal(s) == signal.SIG_IGN]\n"
        f"json.dump([sys.argv[1:], dict(os.environ), mask, ignored], open({str(note)!r}, 'w'))\n"
    )
    srun.chmod(0o755)
    path = tmp_path / "job.sh"
    path.write_text(script)
    clean = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8", **environment}
    subprocess.run(["bash", str(path)], env=clean, check=True, capture_output=True, timeout=60)
    return dict(zip(("words", "environment", "umask", "ignored"), json.loads(note.read_text()), strict=True))


PLAIN = SITE.model_copy(update={"setup": ()})


def test_the_step_gets_its_command_its_environment_and_nothing_foreign(tmp_path):
    (tmp_path / "setup.sh").write_text("export FROM_SETUP=1 RAYLAB_HOME=overridden\n")
    site = PLAIN.model_copy(update={"setup": (f"source {tmp_path}/setup.sh",)})
    command = ["/p/with space/python", "-m", "cluster.node.agent", "/p/it's", 'quo"te', "$HOME", "back\\slash", ""]
    foreign = dict.fromkeys(jobscript.FOREIGN, "someone's")
    seen = run(text(site, command=command, nodes=2), tmp_path, **foreign)
    at = seen["words"].index("/p/with space/python")
    assert seen["words"][at:] == command
    assert "--nodes=2" in seen["words"][:at] and "--ntasks-per-node=1" in seen["words"][:at]
    assert not set(jobscript.FOREIGN) & set(seen["environment"])
    assert seen["environment"]["FROM_SETUP"] == "1"
    assert seen["environment"]["HTTPS_PROXY"] == "http://proxy:3128"
    assert seen["environment"]["RAYLAB_HOME"] == "/p/ray", "what we say stands after the site's setup"
    assert seen["umask"] == 0o077


@pytest.mark.parametrize(("per_node", "cpus"), [("8", "8"), ("8(x3)", "8"), ("80(x2),128", "80"), ("16,4(x2)", "4")])
def test_the_step_gets_the_cpus_of_its_job(tmp_path, per_node, cpus):
    others = {"SRUN_CPUS_PER_TASK": "1", "SLURM_TRES_PER_TASK": "cpu:1"}
    seen = run(text(PLAIN), tmp_path, SLURM_JOB_CPUS_PER_NODE=per_node, **others)
    assert f"--cpus-per-task={cpus}" in seen["words"]
    assert seen["environment"]["SRUN_CPUS_PER_TASK"] == cpus, "of a step that the user starts in this job"
    assert "SLURM_TRES_PER_TASK" not in seen["environment"]


@settings(max_examples=3)
@given(st.dictionaries(st.from_regex(r"\AX_[A-Z]{1,6}\Z"), ANY, min_size=10, max_size=30))
def test_any_value_arrives_as_it_is_through_real_bash(tmp_path_factory, values):
    seen = run(text(PLAIN, environment=values), tmp_path_factory.mktemp("bash"))
    assert {name: seen["environment"][name] for name in values} == values


@settings(max_examples=3)
@given(st.lists(ANY, min_size=10, max_size=30))
def test_any_words_of_the_command_arrive_as_they_are(tmp_path_factory, command):
    seen = run(text(PLAIN, command=["START", *command]), tmp_path_factory.mktemp("bash"))
    assert seen["words"][seen["words"].index("START") + 1 :] == command


def test_the_shell_outlives_the_signals_that_are_for_the_agent(tmp_path):
    """An ignored signal stays ignored in children; srun passes them to the step by itself."""
    assert run(text(PLAIN), tmp_path)["ignored"] == ["SIGTERM", "SIGUSR1"]


# --- in an image ---

# as apptainer: none of the caller's environment but APPTAINERENV_*, and the proxy's socket at its mounted path
APPTAINER = r"""#!/usr/bin/env python3
import csv, json, os, sys
words = sys.argv[1:]
mounts = [next(csv.reader([words[at + 1]])) for at, word in enumerate(words) if word == "--mount"]
binds = {m[2][len("destination="):]: m[1][len("source="):] for m in mounts}
kept = {n[len("APPTAINERENV_"):]: v for n, v in os.environ.items() if n.startswith("APPTAINERENV_")}
inside = {**kept, "PATH": os.environ["PATH"]}
if "RAYLAB_SLURM_PROXY" in inside:
    inside["RAYLAB_SLURM_PROXY"] = binds["/tmp/slurm-proxy"] + "/socket"
private = os.stat(binds["/tmp"])
note = {"words": words, "binds": binds, "inside": kept, "private": private.st_mode & 0o777, "pid": os.getpid()}
note["points"] = os.listdir(binds["/tmp"])
with open(NOTE, "w") as file:
    json.dump(note, file)
at = words.index(IMAGE)
os.execvpe(words[at + 1], words[at + 1:], inside)
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexport SLURM_JOB_ID=7 SLURM_PROCID=0 SECRET=x\nexec "$@"\n'


@pytest.fixture
def imaged(tmp_path):
    """A site with an image, and the words and surroundings of a script that runs in it."""
    scratch, shared = tmp_path / "scr", tmp_path / 'shared "dir", too'
    for path in (scratch, shared, tmp_path / "bin"):
        path.mkdir()
    image = str(shared / "raylab.sif")
    fake = APPTAINER.replace("NOTE", repr(str(tmp_path / "note.json"))).replace("IMAGE", repr(image))
    for name, text in {"apptainer": fake, "srun": SRUN, "squeue": "#!/bin/sh\necho outside\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    update = {"image": image, "scratch": str(scratch), "shared": str(shared), "bind": ("/data/a",)}
    return PLAIN.model_copy(update=update)


def imaged_job(site, tmp_path, command, **other) -> "subprocess.CompletedProcess[str]":
    environment = {"RAYLAB_HOME": str(tmp_path / "home"), "PYTHONPATH": "/p/code", "X_ODD": 'a\'b\n"c" ,$d'}
    script = text(site, command=command, environment=environment, **other)
    clean = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    return subprocess.run(["bash", "-c", script], env=clean, capture_output=True, text=True, timeout=60)


def test_a_command_in_an_image_has_a_clean_environment_explicit_binds_and_a_private_short_tmp(imaged, tmp_path):
    done = imaged_job(imaged, tmp_path, ["sh", "-c", "exit 5", "two words"])
    assert done.returncode == 5, done.stderr
    note = json.loads((tmp_path / "note.json").read_text())
    words = note["words"]
    assert words[:4] == ["run", "--cleanenv", "--containall", "--pid"] and "--nv" in words
    assert words[words.index(imaged.image) + 1 :] == ["sh", "-c", "exit 5", "two words"]
    own = [imaged.shared, str(tmp_path / "home"), "/p/code", "/data/a"]
    assert {place: note["binds"][place] for place in own} == {place: place for place in own}
    private = note["binds"]["/tmp"]
    assert private == note["binds"][imaged.scratch] and private.startswith(f"{imaged.scratch}/rl")
    assert note["private"] == 0o700
    assert not Path(private).exists(), "it is gone with the step"
    inside = note["inside"]
    assert (inside["SLURM_JOB_ID"], inside["SLURM_PROCID"]) == ("7", "0")
    assert inside["X_ODD"] == 'a\'b\n"c" ,$d'
    assert inside["HTTPS_PROXY"] == "http://proxy:3128"
    assert "SECRET" not in inside and "PATH" not in inside


def test_a_path_below_the_private_tmp_is_mounted_into_it(imaged, tmp_path):
    """Without a directory there, the runtime has nothing to mount it on."""
    below = f"{imaged.scratch}/my data"
    imaged_job(imaged.model_copy(update={"bind": (below, "/tmp/more")}), tmp_path, [sys.executable, "-c", "pass"])
    note = json.loads((tmp_path / "note.json").read_text())
    assert {"my data", "more"} <= set(note["points"])
    assert note["binds"][below] == below and note["binds"]["/tmp/more"] == "/tmp/more"


def test_a_node_type_without_gpus_needs_no_driver(imaged, tmp_path):
    imaged_job(imaged, tmp_path, ["true"], node=NodeType(cpus=1, memory_mb=1000))
    assert "--nv" not in json.loads((tmp_path / "note.json").read_text())["words"]


def test_the_head_in_an_image_reaches_slurm_through_the_proxy_and_a_worker_has_none(imaged, tmp_path):
    asks = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from cluster import slurm_proxy; "
        "print(slurm_proxy.ask(os.environ['RAYLAB_SLURM_PROXY'], ['squeue'], 10))"
    )
    command = [sys.executable, "-c", asks]
    done = imaged_job(imaged, tmp_path, command, proxy=ROOT / "cluster" / "slurm_proxy.py")
    assert done.stdout == "(0, 'outside\\n', '')\n", done.stderr
    assert list(Path(imaged.scratch).iterdir()) == [], "the proxy has ended and its directory is gone"
    assert "KeyError: 'RAYLAB_SLURM_PROXY'" in imaged_job(imaged, tmp_path, command).stderr


def test_without_an_image_there_is_no_proxy_and_nothing_around_the_command():
    assert "slurm_proxy" not in text(proxy=ROOT / "cluster" / "slurm_proxy.py") and "apptainer" not in text()


def test_slurms_signals_reach_the_command_in_an_image_and_its_exit_code_comes_back(imaged, tmp_path):
    told = tmp_path / "told"
    code = (
        "import signal, sys, pathlib\n"
        f"told = pathlib.Path({str(told)!r})\n"
        "signal.signal(signal.SIGUSR1, lambda *_: told.write_text('USR1'))\n"
        "def leave(*_):\n    told.write_text('TERM'); sys.exit(9)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "told.write_text('ready')\n"
        "while True: signal.pause()\n"
    )
    step = jobscript._in_image(imaged, NODE, {}, [sys.executable, "-c", code])
    with subprocess.Popen(step, env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}) as process:
        for number, said in ((None, "ready"), (signal.SIGUSR1, "USR1"), (signal.SIGTERM, "TERM")):
            if number:
                process.send_signal(number)
            wait_for(lambda said=said: told.exists() and told.read_text() == said, 20, said)
        assert process.wait(20) == 9
    assert list(Path(imaged.scratch).iterdir()) == []


@pytest.mark.parametrize("code", [127, 128, 143, 255])
def test_a_high_exit_code_ends_the_step_too(imaged, tmp_path, code):
    """255 is Apptainer's own, 143 that of a command that TERM ended: `wait` gives the same for an interrupted wait."""
    assert imaged_job(imaged, tmp_path, ["sh", "-c", f"exit {code}"]).returncode == code
    assert list(Path(imaged.scratch).iterdir()) == []


def test_a_scratch_that_is_not_there_ends_the_step(imaged, tmp_path):
    gone = imaged.model_copy(update={"scratch": str(tmp_path / "gone")})
    done = imaged_job(gone, tmp_path, ["true"])
    assert done.returncode == 1 and "mktemp" in done.stderr


def test_a_step_of_its_own_has_the_sites_setup_and_keeps_its_input(imaged, tmp_path):
    """As the relay's, whose far end reads what the near end writes."""
    site = imaged.model_copy(update={"setup": (f"export PATH={tmp_path}/bin:$PATH",)})
    words = jobscript.shell(site, NODE, {"RAYLAB_HOME": "/p"}, ["cat"])
    done = subprocess.run(words, input="a line", capture_output=True, text=True, timeout=60)
    assert done.stdout == "a line", done.stderr
    assert json.loads((tmp_path / "note.json").read_text())["inside"]["RAYLAB_HOME"] == "/p"
