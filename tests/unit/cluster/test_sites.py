import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import sites
from cluster.sites import SHIPPED, NodeType, Site
from raylab.errors import UsageError
from raylab.scratch import RAY_BYTES, SOCKET_BYTES

SECTIONS = tomllib.loads(SHIPPED.read_text())


def filled(value: object) -> Any:
    """The section with every blank written in: numbers for numbers, a path for texts."""
    if isinstance(value, dict):
        return {key: filled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one) for one in value]
    if isinstance(value, str) and sites.BLANK in value:
        return "4000" if "of a worker" in value else "/p/x"
    return value


@pytest.mark.parametrize("name", SECTIONS)
def test_every_shipped_site_holds_once_its_blanks_are_filled_in(name):
    assert Site.model_validate({"name": name, **filled(SECTIONS[name])}).nodes


@pytest.mark.parametrize("name", ["juwels", "juwels-booster", "jureca-dc", "deep-dam"])
def test_only_account_storage_and_what_is_not_documented_is_blank(name):
    documented = {"deep-dam": {"setup"}}.get(name, set())
    assert set(sites.blanks(name)) == {"account", "shared"} | documented


@pytest.mark.parametrize("name", ["local", "testbed"])
def test_sites_of_ones_own_machine_have_no_blanks(name):
    assert sites.site(name).name == name


def test_the_users_values_stand_before_the_shipped_ones_and_the_rest_stays(own_sites):
    own_sites(
        "[testbed]\nidle_seconds = 7\n[testbed.nodes.gpu]\nmax = 2\n[testbed.nodes.big]\ncpus=8\nmemory_mb=9000\n"
    )
    site = sites.site("testbed")
    assert (site.idle_seconds, site.partition) == (7, "batch")
    assert site.nodes["gpu"] == NodeType(cpus=1, memory_mb=2000, gpus=1, pretended_gpus=True, max=2)
    assert list(site.nodes) == ["cpu", "gpu", "big"], "the first type is the shipped one"


def test_a_site_of_the_users_own(own_sites):
    own_sites("[mine]\npartition = 'p'\n[mine.nodes.cpu]\ncpus = 3\nmemory_mb = 4000\n")
    assert sites.site("mine").nodes["cpu"].cpus == 3


def test_blanks_are_refused_with_what_to_fill_in_and_where(own_sites):
    path = own_sites("[generic]\naccount = 'mine'\n")
    with pytest.raises(UsageError) as caught:
        sites.site("generic")
    text = str(caught.value)
    assert "shared: " in text and "nodes.gpu.cpus: " in text
    assert "account" not in text
    assert f"write them into [generic] of {path}" in text


def test_a_wrong_key_is_said_before_the_blank_that_it_was_to_fill(own_sites):
    own_sites("[juwels]\nacount = 'mine'\n")
    for read in (sites.site, sites.blanks):
        with pytest.raises(UsageError, match="'acount'") as caught:
            read("juwels")
        assert "account" in caught.value.do


def test_a_blank_in_a_list_is_a_blank(own_sites):
    own_sites('[local]\nsetup = ["umask 077", "source <fill in: your environment>/bin/activate"]\n')
    assert sites.blanks("local") == {"setup": "your environment"}


def test_a_site_whose_blanks_are_filled_in(own_sites):
    own_sites(
        "[juwels]\naccount = 'cstao'\nshared = '/p/scratch/cstao'\nhead.memory_mb = 9000\n"
        "setup = ['module load Python']\n"
    )
    site = sites.site("juwels")
    assert (site.account, site.nodes["gpu"].gpus, site.nodes["gpu"].max) == ("cstao", 4, 56)


def test_a_site_names_its_network_once(own_sites):
    own_sites('[ours]\ninterface = "ib0"\nhostname_suffix = "i"\n[ours.nodes.cpu]\ncpus = 1\nmemory_mb = 2000')
    with pytest.raises(UsageError, match="`interface` and `hostname_suffix` both name the network"):
        sites.site("ours")


def test_an_unknown_site_prints_the_right_ones(own_sites):
    own_sites("[jewels]\n[jewels.nodes.cpu]\ncpus=1\nmemory_mb=1000\n")
    with pytest.raises(UsageError, match="unknown site 'juwel'") as caught:
        sites.site("juwel")
    assert "jewels" in caught.value.do and "juwels" in caught.value.do


@pytest.mark.parametrize(
    ("text", "named", "right"),
    [
        ("[local]\npartitions = 'x'\n", "partitions", "partition"),
        ("[local.head]\nmemory = 3\n", "head.memory", "memory_mb"),
        ("[local.nodes.cpu]\ncpu = 3\n", "nodes.cpu.cpu", "cpus"),
        ("[local]\nname = 'other'\n", "name", "time"),
    ],
)
def test_a_wrong_key_prints_the_right_ones(own_sites, text, named, right):
    path = own_sites(text)
    with pytest.raises(UsageError) as caught:
        sites.site("local")
    assert f"'{named}'" in caught.value.what and str(path) in caught.value.what
    assert right in caught.value.do


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[local]\nidle_seconds = 'soon'\n", "idle_seconds"),
        ("[local.nodes.cpu]\ncpus = 0\n", "nodes.cpu.cpus"),
        ("[local]\nscratch = ''\n", "scratch"),
        ("[local]\npartition.x = 1\n", "partition"),
        ("[local]\nnodes = 3\n", "nodes"),
        ("local = 3\n", "local"),
        ("[local.nodes.'a:b']\ncpus = 1\nmemory_mb = 2000\n", "a:b"),
        ("[local.nodes.head]\ncpus = 1\nmemory_mb = 2000\n", "head"),
        ("[local.environment]\n'A B' = 'x'\n", "A B"),
        ('[local]\nsbatch = ["--x\\n#SBATCH --y"]\n', "sbatch"),
        ("[local.nodes.cpu]\nmemory_mb = '180G'\n", "(in MB: memory_mb = 184320)"),
        ("[local.nodes.cpu]\nmemory_mb = '1.5 TiB'\n", "(in MB: memory_mb = 1572864)"),
        ("[local.nodes.cpu]\nmemory_mb = 180\n", "(in MB; 180 GB are 184320)"),
        ("[local]\nlead_seconds = '2min'\n", "(in seconds: lead_seconds = 120)"),
        ("[local]\ntime = '2h'\n", '(time = "02:00:00")'),
        ("[local]\ntime = '1 fortnight'\n", "write for example 02:00:00"),
    ],
)
def test_a_value_that_does_not_hold_is_named(own_sites, text, said):
    path = own_sites(text)
    with pytest.raises(UsageError) as caught:
        sites.site("local")
    assert said in caught.value.what and str(path) in caught.value.what


@pytest.mark.parametrize(
    "text",
    [
        "[local.environment]\nHTTPS_PROXY = 'http://me:hunter2-Z9@proxy:3128'\n",
        "[local.environment]\nAWS_SECRET_ACCESS_KEY = 'hunter2-Z9'\n",
        "[local]\nsetup = ['export http_proxy=http://me:hunter2-Z9@proxy:3128']\n",
    ],
)
def test_credentials_in_a_site_are_refused_because_scripts_would_show_them(own_sites, text):
    own_sites(text)
    with pytest.raises(UsageError, match="holds credentials") as caught:
        sites.site("local")
    assert "hunter2" not in str(caught.value) and "setup = ['. FILE']" in caught.value.do


def test_a_file_that_is_no_toml_is_named(own_sites):
    path = own_sites("[local\n")
    with pytest.raises(UsageError, match=str(path)):
        sites.site("local")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("1-12", 36 * 3600),
        ("1-12:30", 36 * 3600 + 1800),
        ("1-00:00:05", 86405),
    ],
)
def test_time_limits_as_slurm_reads_them(text, expected):
    assert sites.seconds(text) == expected


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_the_longest_form_is_days_hours_minutes_seconds(d, h, m, s):
    assert sites.seconds(f"{d}-{h:02}:{m:02}:{s:02}") == ((d * 24 + h) * 60 + m) * 60 + s


@pytest.mark.parametrize("text", ["", "two hours", "1:2:3:4", "-5", "UNLIMITED", "1.5", "02:00:00; rm"])
def test_what_is_no_time_limit(text):
    with pytest.raises(UsageError, match="not a time limit"):
        sites.seconds(text)


def test_a_time_limit_shorter_than_the_drain_lead_is_refused(site, tmp_path):
    sites.check(site, tmp_path, "00:04:00")
    with pytest.raises(UsageError, match=r"(?s)00:03:59 is too short.*lead_seconds"):
        sites.check(site, tmp_path, "00:03:59")


def test_a_path_over_the_socket_limit_is_said_before_submitting(site, tmp_path):
    longest = "/" + "s" * (SOCKET_BYTES - RAY_BYTES - 1)
    sites.check(site.model_copy(update={"scratch": longest}), tmp_path, "02:00:00")
    with pytest.raises(UsageError, match=r"(?s)scratch .* too long.*107 bytes"):
        sites.check(site.model_copy(update={"scratch": longest + "s"}), tmp_path, "02:00:00")
    with pytest.raises(UsageError, match="too long"):  # bytes count, not letters
        sites.check(site.model_copy(update={"scratch": "/" + "ü" * 20}), tmp_path, "02:00:00")


def test_a_home_that_is_not_below_the_shared_directory_is_refused(site, tmp_path):
    with pytest.raises(UsageError, match=r"(?s)is not on the shared storage.*export RAYLAB_HOME"):
        sites.check(site, Path("/tmp"), "02:00:00")
    sites.check(site.model_copy(update={"shared": None}), Path("/tmp"), "02:00:00")


def test_a_link_into_the_shared_directory_counts_as_below_it(site, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    sites.check(site.model_copy(update={"shared": str(tmp_path / "real")}), tmp_path / "link", "02:00:00")


@pytest.mark.parametrize("odd", ["back\\slash", "two\nlines"])
def test_a_home_that_slurm_could_not_write_logs_to_is_refused(site, tmp_path, odd):
    with pytest.raises(UsageError, match="RAYLAB_HOME"):
        sites.check(site, tmp_path / odd, "02:00:00")


def test_the_page_of_sites_names_every_key_and_every_shipped_site():
    page = (Path(__file__).parents[3] / "docs" / "sites.md").read_text()
    site, node = page.split("## Keys of a site")[1].split("## Keys of a node type")
    rows = {
        part: {
            key
            for line in text.splitlines()
            if line.startswith("| `")
            for key in re.findall(r"`(\w+)`", line.split("|")[1])
        }
        for part, text in (("site", site), ("node", node.split("\n## ")[0]))
    }
    assert rows["site"] == Site.model_fields.keys() - {"name"}
    assert rows["node"] == set(NodeType.model_fields)
    shipped = page.split("## Shipped sites")[1].split("##")[0]
    for name in SECTIONS:
        (row,) = [line for line in shipped.splitlines() if line.startswith(f"| `{name}` |")]
        assert set(re.findall(r"`([a-z_.]+)`", row.split("|")[3])) == set(sites.blanks(name)), "its blanks"


def test_the_example_of_the_page_is_a_file_that_works(own_sites):
    page = (Path(__file__).parents[3] / "docs" / "sites.md").read_text()
    own_sites(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    assert sites.site("juwels").account == "my-project"
    assert list(sites.site("ours").nodes) == ["cpu", "gpu"]
