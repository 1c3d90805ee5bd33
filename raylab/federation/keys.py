"""The keys of a site: Ed25519 to sign its messages, X25519 to agree on masks with each other site."""

import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from pydantic import BaseModel, ConfigDict, Field

from raylab.documents import Document, read_document, read_json
from raylab.errors import DataError, UsageError
from raylab.files import keep_out_of_git_and_uploads, write_json

NAME = r"[a-z0-9][a-z0-9_-]{0,30}"
KEY = r"[0-9a-f]{64}"


class Identity(BaseModel):
    """The public half of a site's keys, which all sites know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: str = Field(pattern=f"^{NAME}$")
    signing_key: str = Field(pattern=f"^{KEY}$")
    """Ed25519, 32 bytes as hexadecimal digits"""
    mask_key: str = Field(pattern=f"^{KEY}$")
    """X25519, 32 bytes as hexadecimal digits"""

    def is_signed(self, signature: bytes, content: bytes) -> bool:
        """Whether this site has signed `content`."""
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.signing_key)).verify(signature, content)
        except InvalidSignature:
            return False
        return True


class PrivateKeys(Document):
    """The secret half: a file that never leaves the site."""

    site: str = Field(pattern=f"^{NAME}$")
    signing_key: str = Field(pattern=f"^{KEY}$", repr=False)
    mask_key: str = Field(pattern=f"^{KEY}$", repr=False)

    @classmethod
    def generate(cls, site: str) -> "PrivateKeys":
        """Return new keys for `site`."""
        signing, mask = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
        keys = {"signing_key": signing.private_bytes_raw().hex(), "mask_key": mask.private_bytes_raw().hex()}
        return cls(site=site, **keys)

    def identity(self) -> Identity:
        """Return the public half."""
        signing = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.signing_key)).public_key()
        mask = X25519PrivateKey.from_private_bytes(bytes.fromhex(self.mask_key)).public_key()
        keys = {"signing_key": signing.public_bytes_raw().hex(), "mask_key": mask.public_bytes_raw().hex()}
        return Identity(site=self.site, **keys)

    def sign(self, content: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.signing_key)).sign(content)

    def agree_with(self, other: Identity) -> bytes:
        """Return the secret, 32 bytes, that this site and the other one alone can compute (X25519, RFC 7748)."""
        own = X25519PrivateKey.from_private_bytes(bytes.fromhex(self.mask_key))
        return own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other.mask_key)))


def write_keys(site: str, directory: Path) -> tuple[Path, Path]:
    """Write SITE.key (0600) and SITE.public.json into `directory`, and return both paths; UsageError if they exist."""
    if not re.fullmatch(NAME, site):
        raise UsageError(f"'{site}' is not the name of a site", do="use lower-case letters, digits, '-' and '_'")
    secret, public = directory / f"{site}.key", directory / f"{site}.public.json"
    for path in (secret, public):
        if path.exists():
            raise UsageError(
                f"{path} exists already", "other sites may have agreed on that key", "use it, or choose another --out"
            )
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    keep_out_of_git_and_uploads(directory)
    keys = PrivateKeys.generate(site)
    write_json(secret, keys.to_json())
    write_json(public, keys.identity().model_dump())
    return secret, public


def read_keys(path: Path) -> PrivateKeys:
    """Read a site's private keys; DataError if others could have read the file."""
    if path.is_file() and path.stat().st_mode & 0o077:
        raise DataError(
            f"{path} can be read by others (mode {path.stat().st_mode & 0o777:04o})",
            "whoever has this key can send messages as this site",
            f"chmod 600 {path}, and make new keys if others may have read it",
        )
    return read_document(path, PrivateKeys, "raylab federate keys --site NAME --out DIR")


def read_identity(path: Path) -> Identity:
    """Read the public half of a site's keys."""
    return Identity.model_validate(read_json(path, Identity, "raylab federate keys --site NAME --out DIR writes it"))


def bind_data(key: Path, agreement: str, data_hash: str) -> None:
    """Note beside the key file which data an agreement was begun with; DataError if it was begun with other data, whose
    messages under the same masks would show the difference."""
    path = key.with_suffix(".used.json")
    used: dict[str, str] = read_json(path, dict[str, str], "restore the file") if path.exists() else {}
    if used.get(agreement, data_hash) != data_hash:
        raise DataError(
            "this agreement was begun with other data than this",
            "two messages under the same masks would show the difference of what they hide",
            "restore the data, or make a new agreement",
        )
    if agreement not in used:
        write_json(path, {**used, agreement: data_hash})
