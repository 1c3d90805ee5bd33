"""Checks who answers at an address before a client sends anything to a loopback port.

An address is not an identity. When a server has ended, anybody on the machine can listen on its port, receive what runs
send, and tell them where to write artifacts. Therefore

- nothing is sent to a loopback port on which another user listens (`raylab/loopback.py` asks the kernel);
- the server of a home, also behind `ssh -L` or the relay, must first prove that it has the home's token; only then is
  the token sent.

MLflow's client calls `plugin.py` before each request, in every process that has MLFLOW_TRACKING_AUTH=raylab.
"""

import http.client
import os
import secrets
from pathlib import Path
from urllib.parse import urlsplit

from raylab.errors import TrackingError
from raylab.loopback import is_loopback, is_own_listener, listener_uids
from tracking.access import secret

AUTH = "raylab"  # the name of raylab's entry in MLflow's group of auth providers
CHALLENGE, PROOF = "Raylab-Challenge", "Raylab-Proof"
SECONDS = 20.0  # for a busy machine; a port on which nothing listens fails at once

# host:port of servers known to belong to a home -> the home's token file
trusted: dict[str, Path] = {}


def is_local(uri: str) -> bool:
    """Whether this is an HTTP address on loopback. (With HTTPS a certificate identifies the server.)"""
    parts = urlsplit(uri)
    try:
        return parts.scheme == "http" and is_loopback(parts.hostname or "") and parts.port != 0
    except ValueError:  # the port is not a number
        return False


def trust(uri: str, token: Path) -> None:
    """From now on, require of `uri` the proof that it is the server of the home with this token file."""
    os.environ["MLFLOW_TRACKING_AUTH"] = AUTH
    trusted[_place(uri)] = token


def token_file(uri: str) -> Path | None:
    """The token file of the home whose server is expected at the loopback address `uri`; None for other servers."""
    named = os.environ.get(secret.ENVIRONMENT)
    return trusted.get(_place(uri)) or (Path(named) if named else None)


def prove(uri: str, token: str) -> None:
    """Raise TrackingError unless the server at `uri` has `token`. The token itself is not sent."""
    refuse_stranger(uri)
    parts = urlsplit(uri)
    challenge = secrets.token_hex(32)
    host = "127.0.0.1" if (parts.hostname or "").endswith("localhost") else parts.hostname or ""
    connection = http.client.HTTPConnection(host, parts.port or 80, timeout=SECONDS)
    try:
        connection.request("HEAD", "/", headers={"Host": parts.netloc, CHALLENGE: challenge})
        answer = connection.getresponse().getheader(PROOF, "")
    except (OSError, http.client.HTTPException) as error:
        why = "Connection refused" if isinstance(error, ConnectionRefusedError) else str(error) or type(error).__name__
        raise TrackingError(
            f"nothing answers at {uri}", why, "raylab ui --detach starts the server; raylab cluster tunnel the relay"
        ) from error
    finally:
        connection.close()
    if not secret.is_equal(answer, secret.proof(token, challenge)):
        raise TrackingError(
            f"the server at {uri} does not prove that it is this home's MLflow server; nothing was sent to it",
            "it ended or moved, and something else listens there now",
            'raylab ui --detach, or on a cluster: eval "$(raylab cluster env)"; else unset MLFLOW_TRACKING_URI and '
            f"{secret.ENVIRONMENT}",
        )


def refuse_stranger(uri: str) -> None:
    """Raise TrackingError if another user of this machine listens at the loopback address `uri`."""
    port = urlsplit(uri).port or 80
    if not is_own_listener(port) and (uids := listener_uids(port)):
        raise TrackingError(
            f"another user listens at {uri} (user id {', '.join(map(str, sorted(uids)))}); nothing was sent there",
            "anybody may open a port of this machine, and the intended server has ended",
            "start your server again (raylab ui --detach); to use a server of another user, set its login in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )


def _place(uri: str) -> str:
    parts = urlsplit(uri)
    return f"{parts.hostname}:{parts.port}"
