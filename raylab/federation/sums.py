"""Sums over all sites: masked, exchanged as messages, and exact.

A site that is silent for longer than the agreed patience is excluded: the others vote, and when all of them have voted
for the same, the round is repeated without it, under other masks. A vote binds: who has voted completes the round with
the silent site only after another one has, which it shows by a message of a later round. So no site goes on with it
while another goes on without it.

A site whose process ends before the run says so, with a reason, and the others end at once: all go on when they are
started again. What a site said before this process began counts as a reason for its silence only.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from raylab.errors import RunError
from raylab.federation import discrete_gaussian, fixed_point
from raylab.federation.agreement import Agreement
from raylab.federation.exchange import Content, Exchange, Inbox, encode_json
from raylab.federation.fixed_point import Integers
from raylab.federation.journal import Journal
from raylab.federation.keys import PrivateKeys
from raylab.federation.masks import Masks
from raylab.federation.privacy import SIGMA
from raylab.federation.rounds import Round
from raylab.training.process_group import PeerLost

POLL_SECONDS = 0.01
STOP_SECONDS = 0.5  # between two looks whether a site that is waited for has stopped
TELL_SECONDS = 30.0  # between two messages about whom this site waits for
BEGINNING = ("join", "rows", "statistics", "counts", "start")  # rounds in which a site that is missing is waited for

INTERRUPTED = "it was interrupted"
STOPPED_WITH = "it stopped because another site had"

Tell = Callable[[str], None]


class SiteStopped(RunError):
    """Another site has said that its process ends before the run."""


class Sums(Protocol):
    """Sums over the sites of an agreement, of which this process has one, or all in a pooled run."""

    def add_up(self, round: Round, values: Integers, noisy: int = 0) -> Integers:
        """Return the sums over all sites of `values`, the first `noisy` of them with the noise of every site. Raises
        PeerLost where a site was excluded: the values of this round must then be computed again, for the sites that are
        left."""

    def compare(self, round: Round, facts: Mapping[str, Any], do: str) -> None:
        """Raise RunError, with `do` as the next step, if a site has other facts than this one."""

    def sites(self, round: Round) -> tuple[str, ...]:
        """Return the names of the sites that take part in a round."""


class PooledSums:
    """All sites' rows are in this process: what it has added up is the sum, with noise of its own where sites add some.
    `excluded`: from which round on a site is left out, to repeat what a federation did."""

    def __init__(self, agreement: Agreement, excluded: Mapping[str, Round]) -> None:
        self.agreement, self.excluded = agreement, excluded

    def add_up(self, round: Round, values: Integers, noisy: int = 0) -> Integers:
        for _ in self.agreement.sites if noisy else ():
            values = add_noise(values, noisy)
        return values

    def compare(self, round: Round, facts: Mapping[str, Any], do: str) -> None:
        return

    def sites(self, round: Round) -> tuple[str, ...]:
        return _left(self.agreement, self.excluded, round)


class SiteSums:
    """This process is one site, and exchanges messages with the others. A run with a privacy budget needs a `journal`
    of its messages with noise."""

    def __init__(
        self, exchange: Exchange, keys: PrivateKeys, agreement: Agreement, tell: Tell, journal: Journal | None = None
    ) -> None:
        self.journal = journal
        self.exchange, self.agreement, self.site, self.tell = exchange, agreement, keys.site, tell
        self.masks = Masks(keys, agreement.sites, agreement.sha256)
        self.excluded = find_exclusions(exchange)
        self.told: dict[str, str] = {}  # files that were refused, and why
        self.rounds, self.seconds_waited = 0, 0.0
        self.round, self.round_sites = Round("join", 0), agreement.names  # the last one that this site was in

    def add_up(self, round: Round, values: Integers, noisy: int = 0) -> Integers:
        """See Sums. Raises RunError if this site was excluded, or cannot go on."""
        sites = self._sites_of(round)
        if noisy:
            assert self.journal is not None, "noise needs a journal"
            hidden = self.journal.keep(round, lambda: self.masks.hide(add_noise(values, noisy), round, sites))
            self.journal.forget(min(self.exchange.saved[name] for name in sites))
        else:
            hidden = self.masks.hide(values, round, sites)
        total = hidden
        payload = hidden.astype("<i8").tobytes()
        for other, received in self._exchange(round, sites, "integers", payload).items():
            if len(received) != len(payload):
                raise RunError(
                    f"site '{other}' has sent {len(received):,} bytes in round {round}, this site {len(payload):,}",
                    "the sites train different networks, or run different versions of raylab",
                    "compare the versions of raylab, and make a new agreement",
                )
            total = fixed_point.add(total, np.frombuffer(received, dtype="<i8").astype(np.int64))
        return total

    def compare(self, round: Round, facts: Mapping[str, Any], do: str) -> None:
        """See Sums."""
        received = self._exchange(round, self._sites_of(round), "facts", encode_json(facts))
        for other, payload in received.items():
            theirs = json.loads(payload)
            differing = sorted(key for key in facts.keys() | theirs.keys() if facts.get(key) != theirs.get(key))
            if differing:
                raise RunError(
                    f"site '{other}' differs from site '{self.site}', and the two cannot train together",
                    "; ".join(f"{key}: {theirs.get(key)} there, {facts.get(key)} here" for key in differing),
                    do,
                )

    def sites(self, round: Round) -> tuple[str, ...]:
        return _left(self.agreement, self.excluded, round)

    def _sites_of(self, round: Round) -> tuple[str, ...]:
        """The sites whose values are added up; PeerLost if an exclusion that was decided before, as this site learns
        after a restart, changes them."""
        if self.site in self.excluded:
            raise self._excluded_error(self.excluded[self.site])
        sites = self.sites(round)
        self._follow_votes(round, sites, self.exchange.read_votes(round, sites))
        return sites

    def _exchange(self, round: Round, sites: Sequence[str], content: Content, payload: bytes) -> dict[str, bytes]:
        """Send `payload`, and return that of every other site, in the order of the agreement."""
        self.round, self.round_sites = round, tuple(sites)
        self.exchange.publish(round, sites, content, payload)
        others = [name for name in sites if name != self.site]
        received: dict[str, bytes] = {}
        began = told_at = looked_at = time.monotonic()
        while True:
            for name in others:
                if name not in received:
                    found = self.exchange.receive(round, sites, name, content)
                    if found is not None:
                        received[name] = found
            missing = [name for name in others if name not in received]
            if self._may_complete(round, sites, missing, time.monotonic() - began):
                self.rounds += 1
                self.seconds_waited += time.monotonic() - began
                return {name: received[name] for name in others}
            now = time.monotonic()
            if now - looked_at > STOP_SECONDS and now - began < self.agreement.patience_seconds:
                looked_at = now
                self._check_stops(missing)
            if now - told_at > TELL_SECONDS:
                told_at = now
                for name in missing:
                    self.tell(f"no answer from site {name} for {now - began:.0f} s{self._explain_silence(name, round)}")
                self.tell_refused()
            time.sleep(POLL_SECONDS)

    @contextmanager
    def announce_end(self) -> Iterator[None]:
        """Tell the other sites if the block ends with an error or is interrupted. What they get names the kind of error
        alone, because its text may have values of data."""
        try:
            yield
        except BaseException as error:
            why = f"it failed ({type(error).__name__})"
            if isinstance(error, KeyboardInterrupt | SiteStopped):
                why = INTERRUPTED if isinstance(error, KeyboardInterrupt) else STOPPED_WITH
            try:
                self.exchange.announce_stop(self.round, self.round_sites, why)
            except OSError as failure:
                self.tell(f"the other sites do not know that this one stops: {failure.strerror}")
            raise

    def _check_stops(self, missing: Sequence[str]) -> None:
        """Raise SiteStopped if a site that is waited for has stopped since this process began."""
        for name in missing:
            if why := self.exchange.find_stop(name):
                raise SiteStopped(
                    f"site '{name}' has stopped: {why}",
                    f"round {self.round} cannot be completed without it",
                    "when it is ready, run the same command again, here and there; a site that then does not come for "
                    f"{self.agreement.patience_seconds:g} s is left out",
                )

    def _explain_silence(self, name: str, round: Round) -> str:
        stop = None if name in self.exchange.last else self.exchange.stops[name]
        why = f"; when this process began, it had stopped: {json.loads(stop.payload)}" if stop else ""
        return f", in round {round}{why}"

    def tell_refused(self) -> None:
        """Say which files of the directory are not used, and why; each once."""
        for name, why in self.exchange.find_strays(self.excluded).items():
            if self.told.get(name) != why:
                self.told[name] = why
                self.tell(f"refused {name}: {why}")

    def _may_complete(self, round: Round, sites: Sequence[str], missing: list[str], waited: float) -> bool:
        """Whether all messages are there and no vote stands against it; votes if a site is missing for too long."""
        if round.kind in BEGINNING:
            return not missing
        votes = self.exchange.read_votes(round, sites)
        own = votes.get(self.site, frozenset())
        if not missing and not own:
            return True
        if self.agreement.privacy is not None and waited > self.agreement.patience_seconds:
            raise RunError(
                f"round {round}: no message from {', '.join(missing)} for {waited:.0f} s",
                "a run with a privacy budget needs the noise of all its sites, so it does not go on without one",
                "run the same command again when they are back",
            )
        self._follow_votes(round, sites, votes)
        silent = frozenset(missing) if waited > self.agreement.patience_seconds else frozenset()
        wanted = own | silent
        for name, vote in votes.items():  # whoever is silent has no say in who else is
            if wanted and name not in wanted:
                wanted |= vote - {self.site}
        if wanted - own:
            if not is_majority(self.agreement, [name for name in sites if name not in wanted]):
                raise RunError(
                    f"round {round}: no message from {', '.join(sorted(wanted))} for {waited:.0f} s",
                    "the sites that are left are no majority, so the others may go on instead",
                    "run the same command again when they are back",
                )
            self.exchange.publish(round, sites, "exclusion", encode_json(sorted(wanted)))
            return False
        if missing:
            return False
        return any(self.exchange.has_gone_on(round, sites, name) for name in sites if name != self.site)

    def _follow_votes(self, round: Round, sites: Sequence[str], votes: Mapping[str, frozenset[str]]) -> None:
        """Raise PeerLost if all who are left want to go on without the same sites, RunError if that is not possible."""
        gone = find_decision(self.agreement, sites, votes)
        if gone is None:
            return
        if self.site in gone:
            raise self._excluded_error(round)
        for name in gone:
            self.excluded[name] = round
        self.tell(f"round {round}: going on without {', '.join(sorted(gone))}")
        raise PeerLost(f"without {', '.join(sorted(gone))}")

    def _excluded_error(self, round: Round) -> RunError:
        return RunError(
            f"the other sites go on without site '{self.site}', since round {round}",
            f"it was silent for longer than the agreed {self.agreement.patience_seconds:g} s",
            "its run ends here; the next agreement can have it again",
        )


def add_noise(values: Integers, noisy: int) -> Integers:
    """Return `values` with discrete Gaussian noise of parameter SIGMA on the first `noisy` of them."""
    noise = np.zeros_like(values)
    noise[:noisy] = discrete_gaussian.sample(SIGMA, noisy)
    return fixed_point.add(values, noise)


def find_decision(
    agreement: Agreement, sites: Sequence[str], votes: Mapping[str, frozenset[str]]
) -> frozenset[str] | None:
    """Return the sites that all others of `sites` have voted to go on without, if they all have voted for the same ones
    and are a majority."""
    for gone in votes.values():
        left = [name for name in sites if name not in gone]
        if gone and is_majority(agreement, left) and all(votes.get(name) == gone for name in left):
            return gone
    return None


def is_majority(agreement: Agreement, sites: Sequence[str]) -> bool:
    """Whether these are more than half of all sites, so that no others can be as well."""
    return 2 * len(sites) > len(agreement.sites)


def find_exclusions(inbox: Inbox) -> dict[str, Round]:
    """Return from which round on sites were excluded, as the votes in the exchange directory say."""
    excluded: dict[str, Round] = {}
    voted = {round for _, round, _, _, ending in inbox.list_files() if ending == "exclude"}
    for round in sorted(voted, key=lambda each: each.order):
        sites = _left(inbox.agreement, excluded, round)
        while (gone := find_decision(inbox.agreement, sites, inbox.read_votes(round, sites))) is not None:
            excluded |= dict.fromkeys(gone, round)
            sites = _left(inbox.agreement, excluded, round)
    return excluded


def _left(agreement: Agreement, excluded: Mapping[str, Round], round: Round) -> tuple[str, ...]:
    return tuple(name for name in agreement.names if name not in excluded or round.order < excluded[name].order)
