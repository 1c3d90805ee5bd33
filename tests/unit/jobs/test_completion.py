"""`raylab completion`: its script in a real bash."""

import subprocess

import pytest

from jobs import cli

ASK = """
source /dev/stdin <<'SCRIPT'
{script}
SCRIPT
COMP_WORDS=({words} '')
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_WORDS[COMP_CWORD]={begun}
_shtab_raylab
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("words", "begun", "found"),
    [
        ("raylab", "tr", {"train", "transfer"}),
        ("raylab train", "--wor", {"--workers"}),
        ("raylab cluster", "s", {"status", "submit", "stop"}),
    ],
)
def test_bash_completes_verbs_and_options(capsys, words, begun, found):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = ASK.format(script=script, words=words, begun=begun)
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) == found, done.stderr


def test_a_directory_and_a_file_are_told_apart(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "_shtab_raylab_train___data_COMPGEN=_shtab_compgen_dirs" in script
    assert "_shtab_raylab_train___json_COMPGEN=_shtab_compgen_files" in script
