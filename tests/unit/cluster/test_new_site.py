"""A site section from what Slurm says: pure text, and a file that keeps what is in it."""

import tomllib
from pathlib import Path

import pytest

from cluster import new_site, sites
from cluster.inventory import Node
from cluster.new_site import PartitionFacts
from cluster.sites import Site
from cluster.slurm import Slurm
from raylab.errors import UsageError

BATCH = {"PartitionName": "batch", "State": "UP", "MaxTime": "1-00:00:00", "OverSubscribe": "NO"}
NODES = [Node(f"n{number}", 48, 512_000, {"a100": 4}) for number in range(3)]
SCONTROL = """case "$*" in
  *config) echo "AccountingStorageType = accounting_storage/none" ;;
  *partition) printf '%s\\n' 'PartitionName=batch Default=YES MaxTime=UNLIMITED OverSubscribe=NO State=UP' \\
    'PartitionName=night Default=NO MaxTime=30 OverSubscribe=NO State=DOWN' \\
    'PartitionName=debug Default=NO MaxTime=30 OverSubscribe=NO State=UP' ;;
esac"""


def make_facts(**other: object) -> PartitionFacts:
    facts = {
        "fields": BATCH, "others": ["debug"], "nodes": NODES, "has_whole_nodes": False, "needs_account": True,
        "accounts": ["lungs"],
    }  # fmt: skip
    return PartitionFacts(**{**facts, **other})


def read(facts: PartitionFacts, name: str = "ours") -> dict:
    return tomllib.loads(new_site.render_section(name, facts, "", "2026-11-26"))[name]


def test_a_section_is_a_site_once_its_blank_is_filled_in(own_sites):
    path = own_sites("")
    new_site.add_section(path, "ours", new_site.render_section("ours", make_facts(), "", "2026-11-26"))
    assert list(sites.blanks("ours")) == ["shared"]
    path.write_text(path.read_text().replace(new_site.SHARED, "/data/shared"))
    site = sites.site("ours")
    assert (site.partition, site.account, site.time, site.shared) == ("batch", "lungs", "02:00:00", "/data/shared")
    assert site.nodes["gpu"].model_dump(exclude_defaults=True) == {
        "cpus": 12, "memory_mb": 128_000, "gpus": 1, "gpu_type": "a100", "max": 12,
    }  # fmt: skip


def test_whole_nodes_are_described_whole():
    site = read(make_facts(has_whole_nodes=True))
    assert site["whole_nodes"] and "whole_nodes" not in read(make_facts())
    assert site["nodes"]["gpu"] == {"cpus": 48, "memory_mb": 512_000, "gpus": 4, "gpu_type": "a100", "max": 3}


def test_the_time_limit_of_the_partition_holds():
    assert read(make_facts(fields={**BATCH, "MaxTime": "00:30:00"}))["time"] == "00:30:00"
    assert read(make_facts(fields={**BATCH, "MaxTime": "UNLIMITED"}))["time"] == "02:00:00"


@pytest.mark.parametrize(
    ("accounts", "account"),
    [
        (["a", "b"], "<fill in: one of a, b>"),
        ([], "<fill in: your compute project>"),
        (None, "<fill in: your compute project>"),
    ],
)
def test_an_account_that_is_not_certain_is_a_blank(accounts, account):
    assert read(make_facts(accounts=accounts))["account"] == account
    assert "account" not in read(make_facts(needs_account=False, accounts=None))


def test_modules_that_are_loaded_are_proposed():
    text = new_site.render_section("ours", make_facts(), "Stages/2025:Python/3.12.3", "2026-11-26")
    assert '# setup = ["module load Stages/2025 Python/3.12.3"]' in text


def test_each_kind_of_node_is_a_type_the_most_frequent_first():
    nodes = [
        *NODES,
        Node("m1", 48, 512_000, {"v100": 2, "1g.5gb": 7}),
        Node("c1", 64, 256_000),
        Node("c2", 128, 512_000),
        Node("c3", 128, 1_024_000),
        Node("u1", 8, 64_000, {"": 4}),
    ]
    types = new_site.node_types(nodes, has_whole_nodes=False)
    assert list(types) == ["gpu-a100", "cpu-128", "gpu-v100", "gpu-1g-5gb", "cpu-64", "gpu-8"]
    assert types["cpu-128"] == {"cpus": 16, "memory_mb": 64_000, "max": 16}
    assert types["gpu-8"] == {"cpus": 2, "memory_mb": 16_000, "gpus": 1, "max": 4}
    assert Site.model_validate({"name": "x", "nodes": types})


def test_what_slurm_is_asked(commands):
    slurm = Slurm(commands(scontrol=SCONTROL, sinfo="echo 'n1|4|8000|gpu:fake:2'"))
    facts = new_site.ask(slurm, None)
    assert (facts.name, facts.others, facts.needs_account) == ("batch", ["debug"], False)
    assert facts.nodes == [Node("n1", 4, 8000, {"fake": 2})]
    assert new_site.ask(slurm, "debug").name == "debug"
    assert "--partition=debug" in (slurm.directory / "sinfo.calls").read_text()


@pytest.mark.parametrize(
    ("partition", "said", "do"), [("night", "night is DOWN", "batch, debug"), ("debugs", "'debugs'", "debug")]
)
def test_a_partition_that_is_down_or_unknown_is_named_with_others(commands, partition, said, do):
    with pytest.raises(UsageError) as caught:
        new_site.ask(Slurm(commands(scontrol=SCONTROL, sinfo="true")), partition)
    assert said in caught.value.what and do in caught.value.do


def test_the_file_keeps_what_is_in_it(tmp_path: Path):
    real, path = tmp_path / "dotfiles.toml", tmp_path / "config" / "sites.toml"
    real.write_text("[mine]  # a comment\npartition = 'x'")
    real.chmod(0o640)
    path.parent.mkdir()
    path.symlink_to(real)
    section = new_site.render_section("ours", make_facts(), "", "2026-11-26")
    new_site.add_section(path, "ours", section)
    assert real.read_text() == f"[mine]  # a comment\npartition = 'x'\n\n{section}"
    assert path.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    with pytest.raises(UsageError, match=r"already has a section \[ours\]"):
        new_site.add_section(path, "ours", section)
    assert real.read_text().count("[ours]") == 1


def test_a_new_file_is_private(tmp_path: Path):
    path = tmp_path / "new" / "sites.toml"
    new_site.add_section(path, "ours", "[ours]\n")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize(("text", "name"), [("[a\n", "ours"), ("", "a.b"), ("", "a b"), ("", "")])
def test_a_damaged_file_and_a_wrong_name_are_refused(tmp_path: Path, text, name):
    path = tmp_path / "sites.toml"
    path.write_text(text)
    with pytest.raises(UsageError):
        new_site.add_section(path, name, "[ours]\n")
    assert path.read_text() == text
