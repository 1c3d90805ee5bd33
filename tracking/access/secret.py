"""The secret of a home's MLflow server: HOME/mlflow/token, which only the home's owner can read.

Its holders are admitted (`guard.py`), and a server that has it belongs to the home (`identity.py`):

    token    HOME/mlflow/token, 256 random bits in hexadecimal, 0600; a client sends it as a Bearer token
    proof    HMAC(token, challenge): the answer by which a server proves its identity to a client
    ticket   for a browser: works once, within TICKET_SECONDS; derived from the token by anyone who can read it

Processes receive the path of the file, never its content, because Ray shows the environment of jobs and `ps` shows
arguments.
"""

import hashlib
import hmac
import os
import secrets
import stat
import time
from pathlib import Path

from raylab.errors import TrackingError

ENVIRONMENT = "RAYLAB_MLFLOW_TOKEN_PATH"
TICKET_SECONDS = 900


def path(home: Path) -> Path:
    """Where a home keeps its token."""
    return Path(home).absolute() / "mlflow" / "token"


def create(home: Path) -> str:
    """The token of this home, created if it has none; processes that create it at the same time get the same one."""
    file = path(home)
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = file.with_name(f".token.{os.getpid()}.{time.monotonic_ns()}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, secrets.token_hex(32).encode())
            os.fsync(fd)
            os.link(beside, file)
        except FileExistsError:
            pass  # another process was faster; its token is used
        finally:
            os.close(fd)
            beside.unlink()
    return read(file)


def read(file: Path) -> str:
    """The token in `file`. Raises TrackingError if it is missing, or if others own it or may read it."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TrackingError(
            f"the token of the MLflow server cannot be read: {file}",
            error.strerror or "",
            f"start the server (raylab ui), or name another file in {ENVIRONMENT}",
        ) from error
    with os.fdopen(fd) as opened:
        facts = os.fstat(opened.fileno())
        if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise TrackingError(
                f"the token of the MLflow server is not private: {file}",
                f"it belongs to user {facts.st_uid} with mode {stat.S_IMODE(facts.st_mode):04o}",
                f"rm {file}, and restart the server, which creates a new one",
            )
        token = opened.read().strip()
    if len(token) < 32:
        raise TrackingError(
            f"{file} does not contain a token", do=f"rm {file}, and restart the server, which creates a new one"
        )
    return token


def host_name(token: str) -> str:
    """The host name of this home's pages. Browsers share cookies between all ports of a name, so each home has its own.

    Chrome, Edge and Firefox resolve every name under `localhost` to loopback.
    """
    return f"h-{_mac(token, 'host')[:8]}.localhost"


def proof(token: str, challenge: str) -> str:
    """The answer to `challenge` that only a holder of the token can give."""
    return _mac(token, f"proof:{challenge}")


def ticket(token: str) -> str:
    """A new ticket for a browser, valid for TICKET_SECONDS."""
    made, nonce = int(time.time()), secrets.token_hex(16)
    return f"{made}-{nonce}-{_mac(token, f'ticket:{made}:{nonce}')}"


def is_ticket(token: str, text: str) -> bool:
    """Whether `text` is a ticket made from this token, at most TICKET_SECONDS ago."""
    made, _, rest = text.partition("-")
    nonce, _, mac = rest.partition("-")
    if not made.isdecimal() or not is_equal(mac, _mac(token, f"ticket:{made}:{nonce}")):
        return False
    return abs(time.time() - int(made)) <= TICKET_SECONDS


def link(token: str, port: int, page: str = "") -> str:
    """An address that opens the pages in a browser, once: `page` (from `#` on, views.py), else MLflow's first."""
    return f"http://{host_name(token)}:{port}/?ticket={ticket(token)}{page}"


def is_equal(one: str, other: str) -> bool:
    """Whether two secrets are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode(errors="replace"))


def _mac(token: str, text: str) -> str:
    return hmac.new(token.encode(), text.encode(errors="replace"), hashlib.sha256).hexdigest()
