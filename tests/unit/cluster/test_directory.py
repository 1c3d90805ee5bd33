import json
import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import directory as module
from cluster.directory import Directory, find, versions
from cluster.job_tag import JobTag
from raylab.errors import SlurmError, UsageError

WORD = st.text("abcXYZ019-_", max_size=12)


@given(WORD, st.integers(0, 10**6), st.sampled_from(["head", "worker"]), WORD, WORD)
def test_a_comment_comes_back_as_it_was(cluster, generation, kind, type, request):
    comment = JobTag(cluster, generation, kind, type, request)
    assert JobTag.parse(str(comment)) == comment
    assert len(str(comment)) < 100, "squeue would cut it"


@pytest.mark.parametrize(
    "text",
    ["", "(null)", "raylab", "raylab:a:b:head::", "other:a:1:head::", "raylab:a:1:head:x", "raylab:a:1:head:x:y:z"],
)
def test_other_peoples_comments_are_not_ours(text):
    assert JobTag.parse(text) is None


def test_the_token_and_what_lies_beside_it_are_the_owners_alone(directory):
    old = os.umask(0)  # the most permissive shell there is
    try:
        directory.create(directory.spec)
    finally:
        os.umask(old)
    assert len(directory.token.read_text()) >= 32
    assert directory.token.stat().st_mode & 0o777 == 0o600
    assert (directory.path / "cluster.json").stat().st_mode & 0o777 == 0o600
    for path in (directory.path, directory.logs, directory.scripts, directory.path / "problems"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_new_cluster_has_a_new_token_and_nothing_of_the_old_one_but_its_logs(directory):
    old = directory.token.read_text()
    directory.problem("1.0", "no scratch")
    (directory.path / "head.json").write_text("{}")
    (directory.path / "down").touch()
    (directory.logs / "x.out").write_text("kept")
    directory.create(directory.spec.model_copy(update={"id": "new"}))
    assert directory.token.read_text() != old
    assert directory.spec.id == "new"
    assert directory.read("head") is None and directory.problems() == []
    assert not (directory.path / "down").exists()
    assert (directory.logs / "x.out").read_text() == "kept"


def test_a_damaged_or_foreign_spec_is_named(directory):
    path = directory.path / "cluster.json"
    path.write_text(path.read_text().replace('"min"', '"least"'))
    with pytest.raises(SlurmError, match="does not describe a cluster of this version") as caught:
        _ = directory.spec
    assert "min: Field required" in caught.value.why and "least: Extra inputs" in caught.value.why
    path.write_text(path.read_text()[:40])
    with pytest.raises(SlurmError, match="is damaged"):
        _ = directory.spec


def test_a_directory_that_this_node_does_not_share_says_so(tmp_path):
    with pytest.raises(SlurmError, match="RAYLAB_HOME") as caught:
        _ = Directory(tmp_path / "gone").spec
    assert str(tmp_path / "gone") in caught.value.what


def test_problems_newest_first_and_old_ones_forgotten(directory, monkeypatch):
    now = time.time()
    for job, age in (("1.0", 900), ("2.0", 300), ("3.0", 100)):
        monkeypatch.setattr(module.time, "time", lambda age=age: now - age)
        directory.problem(job, f"job {job}")
    monkeypatch.setattr(module.time, "time", lambda: now)
    assert [problem["job"] for problem in directory.problems()] == ["3.0", "2.0"]
    assert [problem["job"] for problem in directory.problems(seconds=200)] == ["3.0"]
    assert directory.problems()[0]["text"] == "job 3.0"


def test_one_problem_a_job(directory):
    directory.problem("1.0", "first")
    directory.problem("1.0", "second")
    assert [problem["text"] for problem in directory.problems()] == ["second"]


def test_the_site_comes_back_as_it_was_asked_for(directory, site):
    assert directory.site == site


def test_find_needs_no_name_where_there_is_one_cluster(directory, tmp_path):
    assert find(tmp_path, None).path == directory.path
    assert find(tmp_path, "ray").path == directory.path


def test_find_names_those_there_are(directory, tmp_path):
    other = Directory(tmp_path / "clusters" / "other")
    other.create(directory.spec.model_copy(update={"name": "other"}))
    with pytest.raises(UsageError, match="--name one of: other, ray"):
        find(tmp_path, None)
    with pytest.raises(UsageError, match=r"(?s)unknown cluster 'rays'.*ray"):
        find(tmp_path, "rays")


def test_find_where_there_is_none(tmp_path):
    with pytest.raises(UsageError, match="raylab cluster up"):
        find(tmp_path, "ray")


def test_versions_are_those_of_this_python():
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["ray"] and found["torch"]
    assert json.loads(json.dumps(found)) == found
