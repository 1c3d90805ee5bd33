"""Compressed files and archives, read into memory up to a bound: a small one may unpack to any size."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from raylab.errors import DataError

UNPACKED_BYTES = 1 << 29  # 512 MiB; a set of PhysioNet 2012 has 40 MB
NAME_BYTES = 255  # Linux's limit for a file name
BLOCK = 1 << 20


def unpack(path: Path, limit: int = UNPACKED_BYTES) -> bytearray:
    """Return the content of a file, unpacked if its name ends in `.gz`. Raises DataError beyond `limit` bytes."""
    content = bytearray()
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        while block := stream.read(BLOCK):
            content += block
            if len(content) > limit:
                raise DataError(
                    f"{path} has more than {limit >> 20:,} MiB, unpacked",
                    f"it is not read into memory ({path.stat().st_size:,} bytes on disk)",
                    "check where it comes from; unpack it yourself if it is right",
                )
    return content


def read_tar(path: Path, suffix: str, limit: int = UNPACKED_BYTES) -> Iterator[tuple[str, bytes]]:
    """Yield (file name without folders, bytes) of every member of a tar or tar.gz whose name ends in `suffix`.

    Hidden files are left out. Raises DataError for a truncated archive, for one of more than `limit` bytes, and for a
    member that is not a plain file with a plain name: such archives were not made by the publisher of the data.
    """
    try:
        content = unpack(path, limit)
        if content[-1024:].strip(b"\0"):  # tarfile would accept it
            raise tarfile.ReadError("no end-of-archive mark")
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isdir() or not name.endswith(suffix) or name.startswith("."):
                    continue
                if why := _describe_problem(member, name):
                    raise DataError(
                        f"{path} has a member that is not read: {name[:80]!r}",
                        why,
                        "pack it again with plain files only",
                    )
                stream = tar.extractfile(member)
                assert stream is not None  # of a plain file
                yield name, stream.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is damaged or truncated", str(error), "download it again") from error


def _describe_problem(member: tarfile.TarInfo, name: str) -> str:
    if member.issym() or member.islnk():
        return "it is a link"
    if member.issparse():
        return f"it is a sparse file of {member.size:,} bytes"
    if not member.isreg():
        return "it is not a file"
    if len(name.encode(errors="surrogateescape")) > NAME_BYTES:
        return f"its name has more than {NAME_BYTES} bytes"
    return "" if name.isprintable() else "its name has control characters"
