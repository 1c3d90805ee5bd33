"""A model bundle: one signed file with which another site can use and score a model, and which holds no patient.

A zip archive, stored, of MEMBERS alone: `bundle.json` with the hashes of the others, signed by Ed25519 (`signature`,
over the bytes of bundle.json, by the key `signer`, both in hexadecimal). Weights are safetensors; nothing is executed.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from raylab.documents import Document, describe_problems
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT
from raylab.files import atomic_write
from raylab.storage import explain_storage_error

FORMAT = 1
BUNDLE, SIGNATURE, SIGNER, CARD = "bundle.json", "signature", "signer", "README.md"
WEIGHTS, NOTE = "model/model.safetensors", "model/model.json"
HASHED = (WEIGHTS, NOTE, CARD)
MEMBERS = (BUNDLE, SIGNATURE, SIGNER, *HASHED)
MOST_BYTES = 4 << 30  # of a member: more than any network here
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: the same run gives the same bytes


class Bundle(Document):
    """bundle.json."""

    format: int
    name: str
    """of the run"""
    task: str
    synthetic: bool
    raylab: str
    """version that wrote it"""
    concepts: tuple[str, ...]
    """inputs of the model that a site must have, by name"""
    units: dict[str, str]
    """unit of each concept, as `raylab concepts` has it"""
    counts: dict[str, dict[str, int | None]] = Field({})
    """rows and patients by split; none: below LIMIT"""
    hashes: dict[str, str]
    """provenance of the run: recipe, data, splits, code, lock, image, weights, ledger"""
    scores: dict[str, dict[str, float | None]] = Field({})
    """on the val split: value, low, high"""
    privacy: str | None = None
    """what training has spent of a privacy budget, if it had one"""
    files: dict[str, str]
    """SHA-256 of HASHED"""


def suppress(counts: Mapping[str, int]) -> dict[str, int | None]:
    """The counts of a split that may leave a site: None for those below LIMIT, but for zero, and for those that differ
    from the rows, `n`, by less than LIMIT, but for equal ones."""

    def is_few(count: int) -> bool:
        return 0 < count < LIMIT

    return {name: None if is_few(n) or is_few(counts.get("n", 0) - n) else n for name, n in counts.items()}


def read_key(path: Path) -> Any:
    """Return the Ed25519 private key in `path`, created there with mode 0600 if there is none.

    Raises UsageError if cryptography is not installed, and DataError for a file that holds no such key.
    """
    keys = _ed25519()
    if not path.exists():
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as beside:
                beside.write_text(keys.Ed25519PrivateKey.generate().private_bytes_raw().hex() + "\n")
        except OSError as error:
            what = f"no signing key could be written to {path}"
            raise explain_storage_error(error, str(path)) or DataError(
                what, error.strerror or str(error), "give --key another path"
            ) from error
    if not path.is_file():
        raise DataError(f"{path} is not a plain file", do="give --key the file of a key, or a new name")
    if path.stat().st_mode & 0o077:
        raise DataError(f"{path} can be read by others", "whoever has it can sign in your name", f"chmod 600 {path}")
    try:
        return keys.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no signing key", str(error), "give another --key, or remove the file") from error


def public_key(key: Any) -> str:
    """Return the public key of a private one, in hexadecimal: by it the receiver knows the sender."""
    return str(key.public_key().public_bytes_raw().hex())


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError(
            "model bundles need the package cryptography", str(error), "pip install 'raylab[cryptography]'"
        ) from error
    return ed25519


def write_bundle(path: Path, bundle: Bundle, contents: Mapping[str, bytes], key: Any) -> str:
    """Write and sign a bundle of `contents`, the bytes of HASHED, whose hashes are added; returns the SHA-256 of its
    bundle.json, by which reports name it."""
    files = {name: hashlib.sha256(contents[name]).hexdigest() for name in HASHED}
    note = (bundle.model_copy(update={"files": files}).model_dump_json(indent=1) + "\n").encode()
    signed = {BUNDLE: note, SIGNATURE: key.sign(note).hex().encode(), SIGNER: public_key(key).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        for name in MEMBERS:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), {**contents, **signed}[name])
    return hashlib.sha256(note).hexdigest()


def read_bundle(path: Path, signer: str | None = None) -> tuple[Bundle, str, str, dict[str, bytes]]:
    """Return (bundle, SHA-256 of bundle.json, public key of the signer, content by member) of a file.

    Raises DataError if it is damaged, has other members, is not signed by the key that it names, or by another key than
    `signer`. Without `signer` the signature shows that nobody has changed it since, not who made it.
    """
    contents = _read_members(path)
    note, named = contents[BUNDLE], contents[SIGNER].decode(errors="replace").strip()
    if signer is not None and named != signer.strip().lower():
        why = f"it is signed by {named[:64]}, not by {signer}"
        raise DataError(f"{path} is not from the expected sender", why, "ask the sender for the public key")
    keys = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        public = keys.Ed25519PublicKey.from_public_bytes(bytes.fromhex(named))
        public.verify(bytes.fromhex(contents[SIGNATURE].decode(errors="replace").strip()), note)
    except (InvalidSignature, ValueError) as error:
        raise _damaged(path, "the signature does not fit") from error
    try:
        bundle = Bundle.model_validate_json(note)
    except ValidationError as error:
        raise _damaged(path, describe_problems(error)) from error
    if bundle.format != FORMAT:
        raise DataError(f"{path} has format {bundle.format}", f"this raylab reads {FORMAT}", "use the same version")
    wrong = [name for name in HASHED if hashlib.sha256(contents[name]).hexdigest() != bundle.files.get(name)]
    if wrong:
        raise _damaged(path, f"{', '.join(wrong)} does not have the hash that was signed")
    return bundle, hashlib.sha256(note).hexdigest(), named, contents


def _read_members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = sorted(info.filename for info in infos)
            if names != sorted(MEMBERS):
                raise _damaged(path, f"it has the members {', '.join(names)[:200] or 'none'}")
            if any(info.file_size > MOST_BYTES or info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise _damaged(path, "a member is compressed or too large")
            return {info.filename: archive.read(info) for info in infos}
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is not a model bundle of raylab, or is damaged", why, "copy it again from the sender")


def extract_model(contents: Mapping[str, bytes], directory: Path) -> None:
    """Write the model of a bundle into `directory`, so that `read_model` finds it."""
    for name in (WEIGHTS, NOTE):
        target = directory / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(contents[name])
