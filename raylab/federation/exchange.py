"""The exchange directory: messages of all sites, each a file that its sender writes and removes.

    agreement.json, signatures/     agreement.py
    messages/ROUND.K.SITE.msg       a site's part of a round, after K sites were excluded
    messages/ROUND.K.SITE.exclude   its vote to go on without other sites
    messages/SITE.stop              why its process has ended before the run

Any means may carry it: a shared file system, a mounted drive, copies by sftp or rsync in both directions. A file that
is copied in pieces counts as incomplete until all of it is there. Nothing in it is trusted before it is checked.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from raylab.errors import RunError
from raylab.federation.agreement import Agreement, share
from raylab.federation.keys import NAME, PrivateKeys
from raylab.federation.message import Header, Message, Refused, read_message, write_message
from raylab.federation.rounds import KINDS, Round
from raylab.files import UNFINISHED, atomic_write

log = logging.getLogger(__name__)

Content = Literal["integers", "facts", "exclusion", "stop"]
ENDING = {"integers": "msg", "facts": "msg", "exclusion": "exclude"}
FILE_NAME = re.compile(rf"(\d{{8}})-({'|'.join(KINDS)})\.(\d+)\.({NAME})\.(msg|exclude)")
STOP = re.compile(rf"({NAME})\.stop")
REASON = re.compile(rb'"[ !#-\[\]-~]{1,200}"')  # in JSON; it is shown to the people at the other sites
SETTLE_SECONDS = 2.0  # a refused file that has not changed for so long is not just being copied


class Inbox:
    """What is in the directory: messages are checked before they are used, and nothing is written."""

    def __init__(self, directory: Path, agreement: Agreement) -> None:
        self.messages, self.agreement = directory / "messages", agreement
        self.last: dict[str, tuple[tuple[tuple[int, int], int], int]] = {}  # the latest message of each site
        self.saved = dict.fromkeys(agreement.names, 0)  # step that each site may resume from
        self.seen: dict[str, tuple[int, int, int]] = {}  # files that were refused, as they were
        self.refused: dict[str, str] = {}  # why, by file name
        self.bytes_received = 0
        self.stops = {name: self._read_stop(name) for name in agreement.names}  # of earlier processes

    def receive(self, round: Round, sites: Sequence[str], sender: str, content: Content) -> bytes | None:
        """Return the payload of a site's part of a round among `sites`, or None if it is not there; a file that is not
        a valid one is noted in `refused`, with the reason."""
        path = self.messages / self._name(round, sites, sender, content)
        try:
            now = path.stat()
            state = (now.st_ino, now.st_size, now.st_mtime_ns)
            if self.seen.get(path.name) == state:
                return None
            message = read_message(path.read_bytes(), self.agreement)
            self._check(message.header, round, sites, sender, content)
        except FileNotFoundError:
            return None
        except Refused as reason:
            self.seen[path.name] = state
            self.refused[path.name] = str(reason)
            return None
        self.refused.pop(path.name, None)
        if content != "exclusion":
            self.last[sender] = self._place(message.header), message.header.sequence
            self.saved[sender] = message.header.saved_step
            self.bytes_received += len(message.payload)
        return message.payload

    def has_gone_on(self, round: Round, sites: Sequence[str], sender: str) -> bool:
        """Whether `sender` has completed `round` among `sites`: there is a message of it of a later round, among the
        same sites."""
        excluded = len(self.agreement.sites) - len(sites)
        for _, other, found, name, ending in self.list_files():
            if name == sender and ending == "msg" and found == excluded and other.order > round.order:
                return self.receive(other, sites, sender, _content_of(other)) is not None
        return False

    def find_stop(self, sender: str) -> str | None:
        """Return why a site has stopped, if it did so since this process began and has sent nothing since."""
        stop = self._read_stop(sender)
        if stop is None or stop == self.stops[sender]:
            return None
        _, sequence = self.last.get(sender, (None, -1))
        return str(json.loads(stop.payload)) if stop.header.sequence > sequence else None

    def _read_stop(self, sender: str) -> Message | None:
        path = self.messages / f"{sender}.stop"
        try:
            message = read_message(path.read_bytes(), self.agreement)
            if (message.header.sender, message.header.content) != (sender, "stop"):
                raise Refused(f"it contains {message.header.content} of site '{message.header.sender}'")
            if not REASON.fullmatch(message.payload):
                raise Refused("its reason is not a line of text")
        except FileNotFoundError:
            return None
        except Refused as reason:
            self.refused[path.name] = str(reason)
            return None
        self.refused.pop(path.name, None)
        return message

    def find_strays(self, excluded: dict[str, Round]) -> dict[str, str]:
        """Return why files of the directory are no messages that anybody waits for, by name."""
        found = dict(self.refused)
        for path in sorted(self.messages.iterdir()):
            match = FILE_NAME.fullmatch(path.name)
            if (stop := STOP.fullmatch(path.name)) and stop[1] in self.agreement.names:
                continue
            if UNFINISHED.fullmatch(path.name) or time.time() - path.stat().st_mtime < SETTLE_SECONDS:
                continue
            if match is None or match[4] not in self.agreement.names:
                try:
                    message = read_message(path.read_bytes(), self.agreement)
                    found[path.name] = f"it is a copy of a message of site '{message.header.sender}' under a new name"
                except Refused as reason:
                    found[path.name] = str(reason)
            elif match[4] in excluded and Round(match[2], int(match[1])).order >= excluded[match[4]].order:  # type: ignore[arg-type]
                found[path.name] = f"it is late: the others go on without site '{match[4]}'"
        return found

    def read_votes(self, round: Round, sites: Sequence[str]) -> dict[str, frozenset[str]]:
        """Return which sites each of `sites` wants to go on without in `round`, without those that have not voted."""
        votes = {}
        for name in sites:
            payload = self.receive(round, sites, name, "exclusion")
            if payload is not None:
                votes[name] = frozenset(json.loads(payload)) & frozenset(sites)
        return votes

    def _check(self, header: Header, round: Round, sites: Sequence[str], sender: str, content: Content) -> None:
        if (header.round, header.sender) != (round, sender):
            raise Refused(
                f"it is a copy of the message that site '{header.sender}' has sent in round {header.round}: it is late"
            )
        if header.content != content:
            raise Refused(f"it contains {header.content}, not {content}")
        if header.sites != tuple(sites):
            raise Refused(f"it was sent for a sum over {', '.join(header.sites)}, not over {', '.join(sites)}")
        place, sequence = self.last.get(sender, (self._place(header), header.sequence))
        if content != "exclusion" and (self._place(header) > place) != (header.sequence > sequence):
            raise Refused(f"its number, {header.sequence}, was used by another message of site '{sender}'")

    def _place(self, header: Header) -> tuple[tuple[int, int], int]:
        return header.round.order, len(self.agreement.sites) - len(header.sites)

    def _name(self, round: Round, sites: Sequence[str], sender: str, content: Content) -> str:
        return f"{round}.{len(self.agreement.sites) - len(sites)}.{sender}.{ENDING[content]}"

    def list_files(self) -> Iterator[tuple[Path, Round, int, str, str]]:
        """Yield (path, round, number of excluded sites, sender, ending) of the files that are named like messages."""
        for path in sorted(self.messages.iterdir()) if self.messages.exists() else ():
            if match := FILE_NAME.fullmatch(path.name):
                yield path, Round(match[2], int(match[1])), int(match[3]), match[4], match[5]  # type: ignore[arg-type]


class Exchange(Inbox):
    """The directory as the site of `keys` uses it. `saved_step` returns the step of the oldest checkpoint that this
    site may resume from."""

    def __init__(
        self, directory: Path, agreement: Agreement, keys: PrivateKeys, saved_step: Callable[[], int] = lambda: 0
    ) -> None:
        super().__init__(directory, agreement)
        self.keys, self.saved_step, self.bytes_sent = keys, saved_step, 0
        if not self.messages.exists():
            self.messages.mkdir(exist_ok=True)
            self.messages.chmod(directory.stat().st_mode & 0o7777)  # readable and writable by the same people
        self.sent = {path.name: self._read_own(path) for path in self._own_files()}
        numbers = [message.header.sequence for message in self.sent.values()]
        if stop := self.stops[keys.site]:
            numbers.append(stop.header.sequence)
            (self.messages / f"{keys.site}.stop").unlink()
        self.sequence = 1 + max(numbers, default=-1)

    def publish(self, round: Round, sites: Sequence[str], content: Content, payload: bytes) -> None:
        """Send this site's part of a round among `sites`.

        If it was sent before, as by a site that resumes, nothing is written; RunError if it was another one then,
        because two different payloads under one mask would show their difference.
        """
        name = self._name(round, sites, self.keys.site, content)
        digest = hashlib.sha256(payload).hexdigest()
        if name in self.sent and content != "exclusion":
            if self.sent[name].header.sha256 != digest:
                raise RunError(
                    f"site '{self.keys.site}' has already sent other values in round {round}",
                    "they were computed from other data, other software or another kind of CPU; a second message under "
                    "the same masks would show the difference of the two",
                    "restore what the run began with, or make a new agreement",
                )
            return
        header = self._write(name, round, sites, content, payload)
        self.sent[name] = Message(header=header, payload=b"")
        self.saved[self.keys.site] = header.saved_step
        self._remove_old(sites)

    def announce_stop(self, round: Round, sites: Sequence[str], why: str) -> None:
        """Tell the others that this process ends before the run does, in `round`, and `why`."""
        self._write(f"{self.keys.site}.stop", round, sites, "stop", encode_json(why))

    def _write(self, name: str, round: Round, sites: Sequence[str], content: Content, payload: bytes) -> Header:
        """Write a signed message under its `name`, and return its header."""
        header = Header(
            agreement=self.agreement.sha256,
            sender=self.keys.site,
            kind=round.kind,
            number=round.number,
            sites=tuple(sites),
            sequence=self.sequence,
            saved_step=self.saved_step(),
            content=content,
            size=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
        )
        file = write_message(header, payload, self.keys)
        with atomic_write(self.messages / name) as beside:
            beside.write_bytes(file)
            share(beside)
        self.sequence += 1
        self.bytes_sent += len(file)
        return header

    def _own_files(self) -> list[Path]:
        return [path for path, _, _, name, _ in self.list_files() if name == self.keys.site]

    def _read_own(self, path: Path) -> Message:
        try:
            message = read_message(path.read_bytes(), self.agreement)
        except Refused as reason:
            raise RunError(
                f"{path}, a message of this site, cannot be used",
                str(reason),
                "remove it: this site writes it again",
            ) from None
        return Message(header=message.header, payload=b"")

    def _remove_old(self, sites: Sequence[str]) -> None:
        """Remove this site's messages that no site needs again, wherever it resumes."""
        needed = min(self.saved[name] for name in sites)
        for name, message in list(self.sent.items()):
            header = message.header
            if header.number < needed and header.kind in ("step", "validation", "average") and name.endswith(".msg"):
                (self.messages / name).unlink(missing_ok=True)
                del self.sent[name]


def _content_of(round: Round) -> Content:
    return "facts" if round.kind in ("join", "start") else "integers"


def encode_json(value: Any) -> bytes:
    """Return the payload of facts: equal facts have equal bytes."""
    return json.dumps(value, sort_keys=True).encode()
