"""Sums over sites: exact, hidden, and checked; each site is a thread here, and shares a directory with the others."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raylab.errors import DataError, RunError, UsageError
from raylab.federation import fixed_point
from raylab.federation.agreement import (
    Agreement,
    find_unsigned,
    propose,
    read_agreement,
    sign,
    write_agreement,
)
from raylab.federation.exchange import Exchange
from raylab.federation.keys import PrivateKeys, read_keys, write_keys
from raylab.federation.masks import Masks
from raylab.federation.message import Refused, read_message, write_message
from raylab.federation.rounds import Round
from raylab.federation.sums import SiteStopped, SiteSums, find_decision
from raylab.tasks.recipes import shipped_recipe
from raylab.training.process_group import PeerLost
from tests.wait import wait_for

SITES = ("north", "south", "west")
STEP = Round("step", 3)


@pytest.fixture
def keys() -> dict[str, PrivateKeys]:
    return {name: PrivateKeys.generate(name) for name in SITES}


@pytest.fixture
def agreement(keys) -> Agreement:
    return agree(keys)


def agree(keys: dict[str, PrivateKeys], patience: float = 30.0) -> Agreement:
    recipe = shipped_recipe("ards", smoke=True)
    return propose(recipe, [each.identity() for each in keys.values()], [16, 8, 8], [2, 1, 1], 8.0, "avx2", patience)


def in_parallel(work: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The results of functions that run at the same time, or the errors that they have raised."""
    results: dict[str, Any] = {}

    def keep(name: str, function: Callable[[], Any]) -> None:
        try:
            results[name] = function()
        except (PeerLost, RunError) as error:
            results[name] = error

    threads = [threading.Thread(target=keep, args=each) for each in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results.keys() == work.keys(), "a site hangs"
    return results


def site(directory: Path, agreement: Agreement, keys: PrivateKeys, said: list[str] | None = None) -> SiteSums:
    return SiteSums(Exchange(directory, agreement, keys), keys, agreement, (said if said is not None else []).append)


def test_a_sum_is_exact_whatever_its_order():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=1000) * 10.0 ** rng.integers(-12, 0, 1000) for _ in range(9)]
    encoded = [fixed_point.encode(part, 100.0, "x") for part in parts]
    forwards, backwards = encoded[0], encoded[-1]
    for part in encoded[1:]:
        forwards = fixed_point.add(forwards, part)
    for part in encoded[-2::-1]:
        backwards = fixed_point.add(backwards, part)
    assert np.array_equal(forwards, backwards)
    assert np.allclose(fixed_point.decode(forwards, 100.0), np.sum(parts, 0), atol=1e-15)


@pytest.mark.parametrize("value", [np.nan, np.inf, 8.1])
def test_a_value_that_cannot_be_summed_is_refused(value):
    with pytest.raises(RunError, match=r"NaN or infinite|exceeds the agreed bound 8"):
        fixed_point.encode(np.array([value]), 8.0, "x")


def test_masks_cancel_and_are_fresh_in_every_round(keys, agreement):
    values = {name: np.arange(1000) * (place - 7) for place, name in enumerate(SITES)}
    hidden = {
        name: Masks(keys[name], agreement.sites, agreement.sha256).hide(values[name], STEP, SITES) for name in SITES
    }
    total = fixed_point.add(fixed_point.add(hidden["north"], hidden["south"]), hidden["west"])
    assert np.array_equal(total, sum(values.values()))
    masks = Masks(keys["north"], agreement.sites, agreement.sha256)
    rounds = (STEP, SITES), (Round("step", 4), SITES), (Round("validation", 3), SITES), (STEP, ("north", "south"))
    streams = [masks.hide(np.zeros(64, np.int64), round, sites) for round, sites in rounds]
    other = Masks(keys["north"], agreement.sites, "0" * 64).hide(np.zeros(64, np.int64), STEP, SITES)
    assert len(np.unique(np.concatenate([*streams, other]))) == 5 * 64


def test_one_message_alone_is_uniform_noise(keys, agreement):
    """Zeros, the most regular values, as one site sends them: its bytes, bits and neighbours look random."""
    masks = Masks(keys["south"], agreement.sites, agreement.sha256)
    sent = np.frombuffer(masks.hide(np.zeros(2**17, np.int64), STEP, SITES).tobytes(), np.uint8)
    expected = len(sent) / 256
    chi_squared = float(((np.bincount(sent, minlength=256) - expected) ** 2 / expected).sum())
    assert 255 - 5 * np.sqrt(2 * 255) < chi_squared < 255 + 5 * np.sqrt(2 * 255)
    bits = np.unpackbits(sent.reshape(-1, 8), axis=1).mean(0)
    assert abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(2**17)
    assert abs(np.corrcoef(sent[:-8].astype(float), sent[8:].astype(float))[0, 1]) < 5 / np.sqrt(len(sent))


def test_three_sites_add_up(tmp_path, keys, agreement):
    sites = {name: site(tmp_path, agreement, keys[name]) for name in SITES}
    values = {name: np.arange(50) - 13 * place for place, name in enumerate(SITES)}
    totals = in_parallel({name: lambda name=name: sites[name].add_up(STEP, values[name]) for name in SITES})
    assert all(np.array_equal(total, sum(values.values())) for total in totals.values())
    again = site(tmp_path, agreement, keys["west"])  # it was killed, and computes the same again
    assert np.array_equal(again.add_up(STEP, values["west"]), sum(values.values()))
    with pytest.raises(RunError, match="already sent other values"):
        site(tmp_path, agreement, keys["west"]).add_up(STEP, values["west"] + 1)


def test_different_facts_are_an_error_at_every_site_that_differs(tmp_path, keys, agreement):
    sites = {name: site(tmp_path, agreement, keys[name]) for name in SITES}
    facts = {name: {"kind of CPU": "x" if name == "west" else "y", "torch": "1"} for name in SITES}
    round = Round("join", 0)
    ends = in_parallel({name: lambda name=name: sites[name].compare(round, facts[name], "do") for name in SITES})
    assert all(isinstance(end, RunError) for end in ends.values())
    assert "site 'west' differs" in str(ends["north"]) and "kind of CPU: x there, y here" in str(ends["north"])


def test_a_round_is_repeated_without_a_silent_site(tmp_path, keys):
    """Under other masks, so that what was sent before does not show anybody's values."""
    agreement, said = agree(keys, patience=0.3), []
    sites = {name: site(tmp_path, agreement, keys[name], said) for name in ("north", "south")}
    values = {name: np.full(10, place + 1) for place, name in enumerate(sites)}
    first = in_parallel({name: lambda name=name: sites[name].add_up(STEP, values[name]) for name in sites})
    assert all(isinstance(end, PeerLost) for end in first.values()), first
    again = in_parallel({name: lambda name=name: sites[name].add_up(STEP, values[name]) for name in sites})
    assert all(np.array_equal(total, np.full(10, 3)) for total in again.values())
    assert all(one.sites(STEP) == ("north", "south") and one.sites(Round("step", 2)) == SITES for one in sites.values())
    payloads = [read_message(path.read_bytes(), agreement).payload for path in tmp_path.glob("messages/*north.msg")]
    assert len(payloads) == 2 and payloads[0] != payloads[1]
    with pytest.raises(RunError, match="go on without site 'west'"):
        site(tmp_path, agreement, keys["west"]).add_up(STEP, np.full(10, 9))
    assert not list(tmp_path.glob("messages/*west.msg")), "it must not send what the difference would show"
    resumed = site(tmp_path, agreement, keys["north"])  # from a checkpoint after or before that round
    assert resumed.sites(Round("step", 9)) == ("north", "south")
    assert np.array_equal(resumed.add_up(STEP, values["north"]), np.full(10, 3))
    assert any("going on without west" in line for line in said)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (KeyboardInterrupt(), "it was interrupted"),
        (DataError("stay CANARY-17 has no hours"), "it failed (DataError)"),
    ],
)
def test_the_others_stop_at_once_with_a_site_that_stops(tmp_path, keys, agreement, error, why):
    """They say which one and why, without a value of its data; whoever begins later waits for it as for every site."""
    sites = {name: site(tmp_path, agreement, keys[name]) for name in SITES}

    def stop() -> None:
        with pytest.raises(type(error)), sites["south"].announce_end():
            raise error

    def wait(name: str) -> Any:
        with sites[name].announce_end():
            return sites[name].add_up(STEP, np.ones(3, np.int64))

    began = time.monotonic()
    ends = in_parallel({"south": stop, "north": lambda: wait("north"), "west": lambda: wait("west")})
    assert time.monotonic() - began < agreement.patience_seconds / 2
    assert isinstance(ends["north"], SiteStopped) and ends["north"].exit_code == 1
    said = [str(end) for end in (ends["north"], ends["west"])]
    assert any(f"site 'south' has stopped: {why}" in text for text in said) and "run the same command" in said[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"CANARY" in path.read_bytes()]

    again = {name: site(tmp_path, agreement, keys[name]) for name in SITES}
    assert not list(tmp_path.glob("messages/*.stop"))
    totals = in_parallel({name: lambda name=name: again[name].add_up(STEP, np.ones(3, np.int64)) for name in SITES})
    assert all(np.array_equal(total, [3, 3, 3]) for total in totals.values())


def test_who_begins_after_a_stop_waits_and_says_so(tmp_path, keys, agreement, monkeypatch):
    with pytest.raises(KeyboardInterrupt), site(tmp_path, agreement, keys["south"]).announce_end():
        raise KeyboardInterrupt
    monkeypatch.setattr("raylab.federation.sums.TELL_SECONDS", 0.2)
    said: list[str] = []
    north = site(tmp_path, agreement, keys["north"], said)
    north.agreement = agreement.model_copy(update={"patience_seconds": 1.0})
    with pytest.raises(RunError, match="no majority"):
        north.add_up(STEP, np.ones(3, np.int64))
    assert any(line.startswith("no answer from site west for") for line in said)
    assert any("no answer from site south" in line and "stopped: it was interrupted" in line for line in said)


@pytest.mark.parametrize("kind", ["forged", "of another site", "replayed"])
def test_a_stop_that_is_not_the_site_s_is_not_obeyed(tmp_path, keys, agreement, kind):
    sites = {name: site(tmp_path, agreement, keys[name]) for name in SITES}
    path = tmp_path / "messages" / "south.stop"
    sender = "west" if kind == "of another site" else "south"
    sites[sender].exchange.announce_stop(STEP, SITES, "it was interrupted")
    content = (tmp_path / "messages" / f"{sender}.stop").read_bytes()
    (tmp_path / "messages" / f"{sender}.stop").unlink()
    if kind == "replayed":  # it has sent a message since
        sites["south"].exchange.publish(STEP, SITES, "integers", bytes(8))
        assert sites["north"].exchange.receive(STEP, SITES, "south", "integers")
    path.write_bytes(content.replace(b'"number": 3', b'"number": 4') if kind == "forged" else content)
    assert sites["north"].exchange.find_stop("south") is None


def test_a_site_alone_does_not_go_on(tmp_path, keys):
    one = site(tmp_path, agree(keys, patience=0.2), keys["north"])
    with pytest.raises(RunError, match="no majority"):
        one.add_up(STEP, np.zeros(3, np.int64))
    assert not list(tmp_path.glob("messages/*.exclude")), "it can go on when the others are back"


def test_who_has_voted_waits_for_those_who_have_not(tmp_path, keys):
    """North has voted to go on without west; south has west's message after all, and shows it by its next one."""
    agreement = agree(keys, patience=0.2)
    sites = {name: site(tmp_path, agreement, keys[name]) for name in SITES}
    for name in ("south", "west"):
        sites[name].agreement = agreement.model_copy(update={"patience_seconds": 300.0})
    values, later = np.ones(4, np.int64), Round("step", 4)

    def north() -> Any:
        return sites["north"].add_up(STEP, values), sites["north"].add_up(later, values)

    def others(name: str) -> Any:
        if name == "west":
            wait_for(lambda: bool(list(tmp_path.glob("messages/*.north.exclude"))), 60, "north's vote")
        return sites[name].add_up(STEP, values), sites[name].add_up(later, values)

    ends = in_parallel({"north": north, "south": lambda: others("south"), "west": lambda: others("west")})
    assert all(np.array_equal(total, 3 * values) for pair in ends.values() for total in pair), ends


@pytest.mark.parametrize(
    ("votes", "gone"),
    [
        ({}, None),
        ({"north": {"west"}}, None),
        ({"north": {"west"}, "south": {"west"}}, {"west"}),
        ({"north": {"west"}, "south": {"west", "north"}}, None),
        ({"north": {"west"}, "south": {"west"}, "west": {"north", "south"}}, {"west"}),
        ({"north": {"west", "south"}}, None),
    ],
)
def test_decisions(agreement, votes, gone):
    found = find_decision(agreement, SITES, {name: frozenset(vote) for name, vote in votes.items()})
    assert found == (None if gone is None else frozenset(gone))


BAD = {
    "no message": (lambda m, c: b"a few bytes", "not a message of raylab"),
    "the beginning only": (lambda m, c: m[:200], "incomplete"),
    "without its end": (lambda m, c: m[:-5], "incomplete: 75 of 80 bytes"),
    "a changed byte": (lambda m, c: m[:-1] + bytes([m[-1] ^ 1]), "damaged: the SHA-256 does not match"),
    "a changed header": (lambda m, c: m.replace(b'"number": 3', b'"number": 4'), "forged or damaged"),
    "signed by another site": (lambda m, c: c["forged"], "forged or damaged"),
    "of an unknown site": (lambda m, c: c["foreign"], "'east' is not a site"),
    "of another agreement": (lambda m, c: c["other"], "another agreement"),
    "of an earlier round": (lambda m, c: c["late"], "late"),
    "of another site": (lambda m, c: c["copy"], "copy of the message that site 'west'"),
    "for other sites": (lambda m, c: c["fewer"], "for a sum over south, west, not over"),
    "of other content": (lambda m, c: c["facts"], "it contains facts"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_message_is_refused_and_the_good_one_taken(tmp_path, keys, agreement, kind):
    south, west, north = (Exchange(tmp_path, agreement, keys[name]) for name in ("south", "west", "north"))
    path = tmp_path / "messages" / "00000003-step.0.south.msg"
    payload = np.arange(10).tobytes()

    def made(exchange: Exchange, round: Round, sites: tuple[str, ...], content: Any = "integers") -> bytes:
        exchange.publish(round, sites, content, payload)
        (name,) = [name for name in exchange.sent if not name.startswith("used")]
        message = (tmp_path / "messages" / name).read_bytes()
        (tmp_path / "messages" / name).unlink()
        exchange.sent.clear()
        return message

    late = made(south, Round("step", 2), SITES)
    fewer = made(south, STEP, ("south", "west"))
    facts = made(south, STEP, SITES, "facts")
    good = made(south, STEP, SITES)
    header = read_message(good, agreement).header
    strangers = agree(keys)  # the same sites and keys, but another agreement
    made_bad = {
        "late": late,
        "fewer": fewer,
        "facts": facts,
        "copy": made(west, STEP, SITES),
        "forged": write_message(header, payload, keys["west"]),
        "foreign": write_message(header.model_copy(update={"sender": "east"}), payload, PrivateKeys.generate("east")),
        "other": write_message(header.model_copy(update={"agreement": strangers.sha256}), payload, keys["south"]),
    }
    change, why = BAD[kind]
    path.write_bytes(change(good, made_bad))
    assert north.receive(STEP, SITES, "south", "integers") is None
    assert why in north.refused[path.name]
    path.unlink()
    path.write_bytes(good)
    assert north.receive(STEP, SITES, "south", "integers") == payload and not north.refused


def test_a_message_with_a_used_number_is_refused(tmp_path, keys, agreement):
    """Its sender has lost its memory, or somebody has its key."""
    south, north = (Exchange(tmp_path, agreement, keys[name]) for name in ("south", "north"))
    for round in (STEP, Round("step", 4)):
        south.sequence = 7
        south.publish(round, SITES, "integers", bytes(8))
    assert north.receive(STEP, SITES, "south", "integers") is not None
    assert north.receive(Round("step", 4), SITES, "south", "integers") is None
    assert "its number, 7, was used" in north.refused["00000004-step.0.south.msg"]


def test_stray_files_are_named_with_the_reason(tmp_path, keys, agreement):
    import os

    north = Exchange(tmp_path, agreement, keys["north"])
    north.publish(STEP, SITES, "integers", bytes(8))
    sent = tmp_path / "messages" / "00000003-step.0.north.msg"
    for name in ("notes.txt", "00000003-step.0.east.msg"):
        (tmp_path / "messages" / name).write_text("x")
    shutil.copy(sent, tmp_path / "messages" / "copy.msg")
    shutil.copy(sent, tmp_path / "messages" / "00000005-step.0.west.msg")
    for path in (tmp_path / "messages").iterdir():
        os.utime(path, (1, 1))
    found = north.find_strays({"west": Round("step", 5)})
    assert "not a message" in found["notes.txt"] and "not a message" in found["00000003-step.0.east.msg"]
    assert "copy of a message of site 'north'" in found["copy.msg"]
    assert "late" in found["00000005-step.0.west.msg"] and sent.name not in found


def test_old_messages_go_when_no_site_needs_them(tmp_path, keys, agreement):
    saved = dict.fromkeys(SITES, 0)
    sites = {
        name: SiteSums(
            Exchange(tmp_path, agreement, keys[name], lambda name=name: saved[name]), keys[name], agreement, print
        )
        for name in SITES
    }
    for step in range(4):
        saved["north"], saved["south"], saved["west"] = step, max(0, step - 1), max(0, step - 2)
        round = Round("step", step)
        in_parallel(
            {name: lambda name=name, round=round: sites[name].add_up(round, np.ones(3, np.int64)) for name in SITES}
        )
    left = {path.name for path in (tmp_path / "messages").iterdir()}
    assert "00000003-step.0.north.msg" in left and "00000001-step.0.west.msg" in left
    in_parallel({name: lambda name=name: sites[name].add_up(Round("step", 4), np.ones(3, np.int64)) for name in SITES})
    assert "00000000-step.0.north.msg" not in {path.name for path in (tmp_path / "messages").iterdir()}


def test_an_agreement_counts_when_every_site_has_signed_it(tmp_path, keys, agreement):
    write_agreement(agreement, tmp_path)
    assert read_agreement(tmp_path) == agreement and find_unsigned(agreement, tmp_path) == list(SITES)
    for name in SITES:
        sign(agreement, keys[name], tmp_path)
    assert find_unsigned(agreement, tmp_path) == []
    with pytest.raises(UsageError, match="exists already"):
        write_agreement(agreement, tmp_path)
    with pytest.raises(DataError, match="other keys for site 'west'"):
        sign(agreement, PrivateKeys.generate("west"), tmp_path)
    path = tmp_path / "signatures" / "west.json"
    good = path.read_text()
    shutil.copy(tmp_path / "signatures" / "south.json", path)
    with pytest.raises(DataError, match="forged or damaged"):
        find_unsigned(agreement, tmp_path)
    path.write_text(good)
    changed = json.loads((tmp_path / "agreement.json").read_text()) | {"gradient_bound": 1000.0}
    (tmp_path / "agreement.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="has signed another agreement"):
        find_unsigned(read_agreement(tmp_path), tmp_path)


def test_keys_are_private(tmp_path):
    secret, public = write_keys("north", tmp_path / "keys")
    assert secret.stat().st_mode & 0o077 == 0
    assert read_keys(secret).signing_key not in public.read_text() + repr(read_keys(secret))
    with pytest.raises(UsageError, match="exists already"):
        write_keys("north", tmp_path / "keys")
    secret.chmod(0o640)
    with pytest.raises(DataError, match="can be read by others"):
        read_keys(secret)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"model.name": "logistic"}, "fitted at once"),
        ({"data.class_fraction": 0.5}, "class_fraction"),
        ({"scaling.gpu": True}, "GPU"),
    ],
)
def test_a_recipe_that_is_no_sum_over_sites_is_refused(keys, settings, why):
    from raylab.config.overrides import override

    recipe = override(shipped_recipe("ards", smoke=True), settings)
    with pytest.raises(UsageError, match=why):
        propose(recipe, [each.identity() for each in keys.values()], [8, 8, 8], [1, 1, 1], 8.0, "avx2", 30.0)


def test_a_message_survives_reading(keys, agreement):
    with pytest.raises(Refused, match="not a message"):
        read_message(b"", agreement)
