"""What real Slurm makes of the words in our scripts."""

import re
import subprocess

import pytest

from cluster import jobscript
from tests.wait import wait_for

pytestmark = pytest.mark.slurm
NAMES = [
    "two  words",
    'quo"te',
    "it's",
    "back\\slash",
    "hash#tag",
    "dollar$HOME`id`",
    "semi;colon&",
    "umlaut-ü",
    'a\\"b',
]


def test_odd_names_arrive_as_they_are(testbed):
    """Held jobs, shown by scontrol, which ends a comment with a blank of its own."""
    for name in NAMES:
        script = testbed.shared / "odd.sbatch"
        script.write_text(
            "#!/bin/bash\n#SBATCH --hold\n"
            f"#SBATCH --job-name={jobscript.quoted(name)}\n#SBATCH --comment={jobscript.quoted(name)}\ntrue\n"
        )
        job = _sbatch(testbed, script)
        shown = testbed.run(f"scontrol show job {job}; scancel {job}")
        assert f"JobName={name}\n" in shown
        assert re.search(r"^ *Comment=(.*)$", shown, re.MULTILINE)[1].removesuffix(" ") == name


def test_logs_lie_where_we_look_for_them_below_any_directory(testbed):
    logs = testbed.shared / "100%j two  words#"
    logs.mkdir()
    script = testbed.shared / "log.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --job-name=raylab --mem=100\n"
        f"#SBATCH --output={jobscript.quoted(str(logs).replace('%', '%%') + '/%x-%j.out')}\n"
        f"#SBATCH --chdir={jobscript.quoted(str(logs))}\npwd\n"
    )
    log = logs / f"raylab-{_sbatch(testbed, script)}.out"
    wait_for(lambda: log.is_file() and log.read_text().strip(), 30, f"{log}")
    assert log.read_text().strip() == str(logs)


def _sbatch(testbed, script) -> str:
    command = [testbed.root / "bin" / "sbatch", "--parsable", str(script)]
    done = subprocess.run(command, env=testbed.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
