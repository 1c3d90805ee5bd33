"""Admits holders of the home's token to the home's MLflow server, which opens no file outside the home's store.

`server.py` starts MLflow with `--app-name raylab`, which finds `create_app` by the entry point `mlflow.app`. The check
is in front of the whole Flask application: no route, page, file or method bypasses it.

    client    Authorization: Bearer TOKEN
    browser   /?ticket=... (secret.py), once -> a cookie -> the pages

Every other request gets 401, with the proof that answers a challenge (identity.py) and nothing else.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tracking.access import secret
from tracking.access.identity import CHALLENGE, PROOF

COOKIE = "raylab"
TICKET = "ticket"
CHALLENGE_LENGTH = 128
OWN_REQUEST = ("none", "same-origin")  # values of Sec-Fetch-Site: requested by the user, by a page of this server
HEADERS = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
REFUSAL = (
    "401: this MLflow server belongs to one user of this machine.\n"
    "Its owner opens it with the link that `raylab ui --detach` prints, which works once.\n"
)
FOREIGN = "403: this request comes from another page.\n"
# After a link on another page, the browser sends a SameSite=Strict cookie only if this page makes the request. The part
# of the address from `#` on names the view to open.
ENTRANCE = (
    '<!doctype html><meta charset="utf-8"><title>MLflow</title><script>location.replace("/" + location.hash)</script>\n'
)

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class Guard:
    """A WSGI application in front of `app`, for holders of `token`."""

    def __init__(self, app: Application, token: str, spent: Path) -> None:
        """`spent`: a directory that records used tickets across restarts of the server."""
        self.app, self.token, self.host = app, token, secret.host_name(token)
        # In memory: cookies expire with the server, so a later listener on this port cannot use them.
        self.sessions: set[str] = set()
        self.spent = spent
        self.spent.mkdir(mode=0o700, exist_ok=True)
        for old in self.spent.iterdir():
            if time.time() - old.stat().st_mtime > 2 * secret.TICKET_SECONDS:
                old.unlink()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        def answer(status: str, text: str, *headers: tuple[str, str], kind: str = "text/plain") -> Iterable[bytes]:
            body = text.encode()
            about = [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))]
            start_response(status, [*about, *HEADERS, *headers])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

        if self._has_token(environ):
            return self.app(_without_credentials(environ), start_response)
        if self._has_cookie(environ):
            if not _is_same_origin(environ):
                return answer("403 Forbidden", FOREIGN)
            return self.app(_without_credentials(environ), start_response)
        if self._spend_ticket(environ):
            cookie = ("Set-Cookie", f"{COOKIE}={self._begin_session()}; Path=/; HttpOnly; SameSite=Strict")
            if environ.get("HTTP_SEC_FETCH_SITE", "none") in OWN_REQUEST:
                return answer("303 See Other", "", cookie, ("Location", "/"))
            return answer("200 OK", ENTRANCE, cookie, kind="text/html")
        challenge = environ.get(f"HTTP_{CHALLENGE.upper().replace('-', '_')}", "")
        proof = [(PROOF, secret.proof(self.token, challenge))] if 0 < len(challenge) <= CHALLENGE_LENGTH else []
        return answer("401 Unauthorized", REFUSAL, ("WWW-Authenticate", "Bearer"), *proof)

    def _has_token(self, environ: Environ) -> bool:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        return scheme.lower() == "bearer" and secret.is_equal(token.strip(), self.token)

    def _has_cookie(self, environ: Environ) -> bool:
        if _host(environ) != self.host:
            return False
        cookies = (one.strip().partition("=") for one in environ.get("HTTP_COOKIE", "").split(";"))
        return any(name == COOKIE and _digest(value) in self.sessions for name, _, value in cookies)

    def _spend_ticket(self, environ: Environ) -> bool:
        """Whether the request has a valid ticket, which this call uses up."""
        tickets = parse_qs(environ.get("QUERY_STRING", "")).get(TICKET, [])
        entrance = environ["REQUEST_METHOD"] == "GET" and environ.get("PATH_INFO") == "/"
        if len(tickets) != 1 or not entrance or _host(environ) != self.host:
            return False
        if not secret.is_ticket(self.token, tickets[0]):
            return False
        try:
            (self.spent / _digest(tickets[0])).touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _begin_session(self) -> str:
        session = secrets.token_urlsafe(32)
        self.sessions.add(_digest(session))
        return session


def create_app() -> Guard:
    """MLflow's Flask application behind the check, confined to the store that contains the token."""
    token = Path(os.environ[secret.ENVIRONMENT])
    from mlflow.server import app

    from tracking.access.confine import confine

    confine(token.parent / "artifacts")
    return Guard(app, secret.read(token), token.parent / "spent-tickets")


def _is_same_origin(environ: Environ) -> bool:
    """Whether a page of this server or the user makes this request.

    SameSite=Strict excludes other sites, but a page on another port of the same host name is the same site.
    """
    origin = environ.get("HTTP_ORIGIN")
    if origin is not None and origin != f"{environ['wsgi.url_scheme']}://{environ.get('HTTP_HOST', '')}":
        return False
    return environ.get("HTTP_SEC_FETCH_SITE", "none") in OWN_REQUEST


def _without_credentials(environ: Environ) -> Environ:
    """The request for MLflow, without credentials, and without the origin, for which MLflow makes exceptions."""
    return {key: value for key, value in environ.items() if key not in ("HTTP_AUTHORIZATION", "HTTP_ORIGIN")}


def _host(environ: Environ) -> str:
    return str(environ.get("HTTP_HOST", "")).partition(":")[0].lower()


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode(errors="replace")).hexdigest()
