"""A message: one site's part of one round, signed, in a file that is complete or absent.

    raylab federation message 1
    {"agreement": ..., "sender": ..., "kind": ..., "number": ..., "sites": [...], "sequence": ..., ...}
    signature of the line above, Ed25519 in hexadecimal digits
    payload: integers, little-endian, or JSON

The header has the size and the SHA-256 of the payload. A payload of integers is masked (masks.py); a payload of JSON
has facts about software and agreement, never about rows.
"""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from raylab.documents import describe_problems
from raylab.federation.agreement import Agreement
from raylab.federation.keys import PrivateKeys
from raylab.federation.rounds import Kind, Round

MAGIC = b"raylab federation message 1\n"
SIGNED = b"raylab message\n"


class Refused(Exception):
    """Raised, with the reason, for a message that is not used."""


class Header(BaseModel):
    """What a message says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    agreement: str
    """SHA-256"""
    sender: str
    kind: Kind
    number: int
    sites: tuple[str, ...]
    """those whose messages this one is added to"""
    sequence: int
    """of the sender's messages, from 0"""
    saved_step: int
    """the step of the sender's last complete checkpoint: it needs no message of an earlier round again"""
    content: Literal["integers", "facts", "exclusion", "stop"]
    size: int
    sha256: str

    @property
    def round(self) -> Round:
        """The round that the message belongs to."""
        return Round(self.kind, self.number)


class Message(BaseModel):
    """A message that was checked."""

    model_config = ConfigDict(frozen=True)

    header: Header
    payload: bytes


def write_message(header: Header, payload: bytes, keys: PrivateKeys) -> bytes:
    """Return the file of a message."""
    line = json.dumps(header.model_dump(mode="json"), sort_keys=True).encode()
    return MAGIC + line + b"\n" + keys.sign(SIGNED + line).hex().encode() + b"\n" + payload


def read_message(content: bytes, agreement: Agreement) -> Message:
    """Return the message in a file's content; Refused, with the reason, unless a site of the agreement has sent it and
    every byte is as it was sent."""
    if not content.startswith(MAGIC):
        raise Refused("it is not a message of raylab, or its beginning is damaged")
    line, newline, rest = content[len(MAGIC) :].partition(b"\n")
    signature, second, payload = rest.partition(b"\n")
    if not newline or not second:
        raise Refused("it is incomplete: its header ends in the middle")
    try:
        header = Header.model_validate_json(line)
    except ValidationError as error:
        raise Refused(f"its header is damaged: {describe_problems(error)}") from error
    if header.agreement != agreement.sha256:
        raise Refused(f"it belongs to another agreement, {header.agreement[:16]}")
    if header.sender not in agreement.names:
        raise Refused(f"its sender '{header.sender}' is not a site of the agreement")
    try:
        is_signed = agreement.find(header.sender).is_signed(bytes.fromhex(signature.decode()), SIGNED + line)
    except ValueError:
        is_signed = False
    if not is_signed:
        raise Refused(f"its signature is not that of site '{header.sender}': it is forged or damaged")
    if len(payload) != header.size:
        raise Refused(f"it is incomplete: {len(payload):,} of {header.size:,} bytes of its content are there")
    if hashlib.sha256(payload).hexdigest() != header.sha256:
        raise Refused("its content is damaged: the SHA-256 does not match")
    return Message(header=header, payload=payload)
