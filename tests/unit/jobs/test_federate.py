"""raylab federate: keys, agreement and signatures as users make them; what is refused before anything is sent."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from raylab.files import write_json
from raylab.training.run_record import RunRecord

SITES = ("north", "south", "west")


BUDGET = ["--rows", "8", "8", "8", "--epsilon", "8", "--noise-multiplier", "1"]


def run(capsys: Any, *words: str | Path) -> tuple[int, str, str]:
    code = cli.main(["federate", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def exchange(tmp_path, capsys) -> Path:
    """A new exchange directory with an agreement that nobody has signed; the keys are beside it."""
    for name in SITES:
        assert run(capsys, "keys", "--site", name, "--out", tmp_path)[0] == 0
    files = [tmp_path / f"{name}.public.json" for name in SITES]
    words = ["ards", "--smoke", "--sites", *files, "--rows", 32, 16, 16, "--exchange", tmp_path / "exchange"]
    code, said, error = run(capsys, "agree", *words)
    assert code == 0 and "north: 32 rows of a step" in said, error
    return tmp_path / "exchange"


def test_sites_agree_and_sign(exchange, capsys, tmp_path):
    for name, rest in zip(SITES, ("still to sign: south, west", "still to sign: west", "by all sites"), strict=True):
        code, said, _ = run(capsys, "sign", "--exchange", exchange, "--key", tmp_path / f"{name}.key")
        assert code == 0 and rest in said
    assert json.loads((exchange / "agreement.json").read_text())["recipe"]["loop"]["global_batch_size"] == 64
    assert (tmp_path / "north.key").stat().st_mode & 0o077 == 0


def test_nothing_is_sent_before_all_have_signed(exchange, capsys, tmp_path, ards_data):
    run(capsys, "sign", "--exchange", exchange, "--key", tmp_path / "north.key")
    words = ["--exchange", exchange, "--key", tmp_path / "north.key", "--data", ards_data]
    code, _, error = run(capsys, "run", *words)
    assert code == 2 and "south, west have not signed" in error and "raylab federate sign" in error
    assert not (exchange / "messages").exists()


def test_an_agreement_is_for_one_set_of_data(exchange, capsys, tmp_path, ards_data, mortality_data):
    for name in SITES:
        run(capsys, "sign", "--exchange", exchange, "--key", tmp_path / f"{name}.key")
    words = ["--exchange", exchange, "--key", tmp_path / "north.key", "--data"]
    assert "prepared for 'mortality'" in run(capsys, "run", *words, mortality_data)[2]
    agreement = run(capsys, "sign", "--exchange", exchange, "--key", tmp_path / "north.key", "--json")[1]
    sha256 = json.loads(agreement[agreement.index("{") :])["agreement"]
    (tmp_path / "north.used.json").write_text(json.dumps({sha256: "0" * 64}))
    code, _, error = run(capsys, "run", *words, ards_data)
    assert code == 2 and "begun with other data" in error and not (exchange / "messages").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--data", "north=DIR", "south=DIR"], "no data of west"),
        (["--data", "north=DIR", "south=DIR", "east=DIR"], "unknown site 'east'"),
    ],
)
def test_a_pooled_run_needs_every_site(exchange, capsys, tmp_path, words, why):
    for name in SITES:
        run(capsys, "sign", "--exchange", exchange, "--key", tmp_path / f"{name}.key")
    code, _, error = run(capsys, "pool", "--exchange", exchange, "--out", tmp_path / "out", *words)
    assert code == 2 and why in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--rows", "8", "8"], "3 sites need 3 numbers"),
        (["--rows", "8", "8", "0"], "site west has more shards than rows"),
        (["--rows", "8", "8", "8", "--set", "model.name=logistic"], "fitted at once"),
        (["--rows", "8", "8", "8", "--cpu-capability", "avx2", "--gradient-bound", "0"], "gradient bound must be"),
        (["--rows", "8", "8", "8", "--local-steps", "0"], "1 local step or more"),
        (["--rows", "8", "8", "8", "--local-steps", "4", "--gradient-bound", "8"], "leave out --gradient-bound"),
        (["--rows", "8", "8", "8", "--noise-multiplier", "1"], "without a privacy budget"),
        (["--rows", "8", "8", "8", "--epsilon", "8"], "needs --noise-multiplier"),
        (["--rows", "8", "8", "8", "--epsilon", "8", "--noise-multiplier", "0"], "not a privacy budget"),
        ([*BUDGET, "--colluding-sites", "3"], "3 of 3 sites may collude"),
        ([*BUDGET, "--local-steps", "4"], "have no bound"),
    ],
)
def test_an_agreement_that_cannot_be_kept_is_refused(capsys, tmp_path, words, why):
    for name in SITES:
        run(capsys, "keys", "--site", name, "--out", tmp_path)
    files = [tmp_path / f"{name}.public.json" for name in SITES]
    code, _, error = run(capsys, "agree", "ards", "--smoke", "--exchange", tmp_path / "x", "--sites", *files, *words)
    assert code == 2 and why in error and not (tmp_path / "x").exists()


def test_sites_that_average_their_weights_agree_so_and_have_no_pooled_run(capsys, tmp_path):
    for name in SITES:
        run(capsys, "keys", "--site", name, "--out", tmp_path)
    files = [tmp_path / f"{name}.public.json" for name in SITES]
    words = ["ards", "--smoke", "--sites", *files, "--rows", 8, 8, 8, "--exchange", tmp_path / "x", "--local-steps"]
    assert run(capsys, *("agree", *words, "often"))[0] == 2
    code, said, _ = run(capsys, "agree", *words, "epoch")
    assert code == 0 and "the weights are averaged at the end of each epoch" in said
    for name in SITES:
        run(capsys, "sign", "--exchange", tmp_path / "x", "--key", tmp_path / f"{name}.key")
    words = ["--exchange", tmp_path / "x", "--out", tmp_path / "out", "--data", *(f"{name}=DIR" for name in SITES)]
    code, _, error = run(capsys, "pool", *words)
    assert (
        code == 2 and "the sites of this agreement average their weights" in error and not (tmp_path / "out").exists()
    )


def test_sites_agree_on_a_privacy_budget_and_have_no_pooled_run(capsys, tmp_path):
    for name in SITES:
        run(capsys, "keys", "--site", name, "--out", tmp_path)
    files = [tmp_path / f"{name}.public.json" for name in SITES]
    code, said, _ = run(capsys, "agree", "ards", "--smoke", "--sites", *files, "--exchange", tmp_path / "x", *BUDGET)
    assert code == 0 and "epsilon 8, delta 1e-05; noise multiplier 1, even if 1 of 3 sites collude" in said
    assert (
        "8 rows of a step in 8 shard(s)" in said
        and "a sum with noise over all sites, of gradients of rows up to norm 1.0" in said
    )
    for name in SITES:
        run(capsys, "sign", "--exchange", tmp_path / "x", "--key", tmp_path / f"{name}.key")
    words = ["--exchange", tmp_path / "x", "--out", tmp_path / "out", "--data", *(f"{name}=DIR" for name in SITES)]
    code, _, error = run(capsys, "pool", *words)
    assert code == 2 and "the noise is secret" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["rerun", "verify"])
def test_a_run_across_sites_is_neither_repeated_nor_verified(capsys, tmp_path, monkeypatch, verb):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    directory = tmp_path / "runs" / "ours"
    directory.mkdir(parents=True)
    about = {"name": "ours", "uri": "file:x", "experiment": "e", "kind": "federate", "task": "ards", "data": "d"}
    tags = {"raylab.kind": "federate", "raylab.task": "ards"}
    write_json(directory / "run.json", RunRecord(**about, synthetic=True, tags=tags).to_json())
    write_json(directory / "result.json", {})
    assert cli.main([verb, "ours"]) == 2
    error = capsys.readouterr().err
    assert "its noise was secret" in error or "the noise was secret" in error
    assert "raylab federate pool" in error


@pytest.mark.parametrize("task", ["sections", "sections-pretraining"])
def test_sections_are_refused(capsys, tmp_path, task):
    for name in SITES:
        run(capsys, "keys", "--site", name, "--out", tmp_path)
    files = [tmp_path / f"{name}.public.json" for name in SITES]
    words = ["--smoke", "--sites", *files, "--exchange", tmp_path / "x", "--rows", 8, 8, 8]
    code, _, error = run(capsys, "agree", task, *words)
    assert code == 2 and f"task '{task}' are not formed from sums" in error and not (tmp_path / "x").exists()


def test_a_bad_name_and_a_foreign_file_are_refused(capsys, tmp_path):
    code, _, error = run(capsys, "keys", "--site", "North Ward", "--out", tmp_path)
    assert code == 2 and "not the name of a site" in error and not list(tmp_path.iterdir())
    (tmp_path / "notes.json").write_text("{}")
    words = ["--sites", tmp_path / "notes.json", "--rows", "8", "--exchange", tmp_path / "x"]
    code, _, error = run(capsys, "agree", "ards", *words)
    assert code == 2 and "notes.json" in error
