"""Logins for MLflow servers. An address that is printed, stored or passed on never contains credentials.

Credentials come from the environment (MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN; those in MLFLOW_TRACKING_URI
move there) or from a file of mode 0600: RAYLAB_MLFLOW_LOGIN, else raylab/mlflow-login.json in the user's configuration
directory. The file maps addresses to logins:

    {"https://mlflow.example.org": {"username": "me", "password": "..."}}    or    {"token": "..."}

A login is sent to its own address and to no other.
"""

import base64
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from raylab.errors import TrackingError

if TYPE_CHECKING:
    import requests

FILE = "RAYLAB_MLFLOW_LOGIN"  # the environment variable that names the file
VARIABLES = {
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "token": "MLFLOW_TRACKING_TOKEN",
}
ADVICE = f"export {VARIABLES['username']} and {VARIABLES['password']}, or write them into %s (mode 0600)"
NO_HOST = ("sqlite", "file")  # schemes of paths, in which @ is an ordinary character


@dataclass(frozen=True)
class Login:
    """The login that a server requires: a user name and password, or a token. Its repr shows the name only."""

    username: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.username or self.password or self.token)

    @property
    def header(self) -> str:
        """The value of the HTTP header Authorization."""
        if self.username or self.password:
            pair = f"{self.username}:{self.password}".encode()
            return f"Basic {base64.b64encode(pair).decode()}"
        return f"Bearer {self.token}"


def split(text: str) -> tuple[str, Login]:
    """(the address without credentials, the credentials in it).

    Raises TrackingError, without quoting what may be secret, for an address with a query and for credentials whose end
    is ambiguous.
    """
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        return text.strip().rpartition("@")[2].rstrip("/"), Login()  # not an address; `runs.check` reports it
    shown = f"{scheme}://..."
    path, mark, _ = re.sub("[?#]", "?", rest).partition("?")
    if mark and "@" not in rest[len(path) :]:
        raise TrackingError(
            f"the tracking address {shown} has a query (?) or a fragment (#)",
            "MLflow accepts neither, and its content would be printed and stored",
            f"remove it; for credentials: {advice()}",
        )
    if scheme.lower() in NO_HOST or "@" not in rest:
        return text.strip().rstrip("/"), Login()
    authority, slash, below = rest.partition("/")
    credentials, _, host = authority.rpartition("@")
    if mark or "@" in below or not credentials:
        raise TrackingError(
            f"the credentials in the tracking address {shown} cannot be separated from its host",
            "they contain an unquoted / ? # or @",
            f"remove them: {advice()}",
        )
    username, _, password = credentials.partition(":")
    return f"{scheme}://{host}{slash}{below}".rstrip("/"), Login(unquote(username), unquote(password))


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI without credentials, "" if it is not set.

    Credentials in it move to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of this process.
    """
    uri, found = split(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if found:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        os.environ.pop(VARIABLES["token"], None)
        os.environ.update({VARIABLES[name]: value for name, value in asdict(found).items() if value})
    return uri


def find(uri: str) -> Login | None:
    """The login for the server at `uri`: of the environment, if that names this server or none, else of the file."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return None
    named, given = tracking_uri(), _of_environment()
    if given and (not named or _origin(named) == _origin(uri)):
        return given
    return _read(file()).get(_origin(uri))


def files(uri: str, name: str) -> dict[str, str]:
    """{name: text} of a login file with the login for `uri` alone, a secret for mode 0600; {} without a login."""
    found = find(uri)
    if found is None:
        return {}
    return {name: json.dumps({uri: {key: value for key, value in asdict(found).items() if value}}) + "\n"}


def file() -> Path:
    """The login file: RAYLAB_MLFLOW_LOGIN, else mlflow-login.json in the user's configuration directory."""
    if chosen := os.environ.get(FILE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "raylab" / "mlflow-login.json"


def advice() -> str:
    """How to provide a missing login."""
    return ADVICE % file()


def refusal(uri: str, error: Exception) -> TrackingError | None:
    """The error for the user if `error` says that the server at `uri` refuses the login or the action; else None."""
    import requests
    from mlflow.exceptions import MlflowException

    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if isinstance(error, requests.HTTPError) and error.response is not None:  # of an artifact
        status = error.response.status_code
    if status == 401:
        return TrackingError(f"{uri} refuses the login (HTTP 401)", "it requires a login, or a different one", advice())
    if status == 403:
        login = find(uri)
        who = f"'{login.username}' has" if login and login.username else "this login has"
        return TrackingError(
            f"{uri} does not permit this (HTTP 403)",
            f"{who} no such permission on the experiment, run or model",
            "ask its owner or the server's administrator; MLFLOW_EXPERIMENT_NAME names an experiment of your own",
        )
    return None


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turns MLflow's refusals and failures within the context into TrackingErrors."""
    try:
        yield
    except Exception as error:
        if (known := refusal(uri, error)) is not None:
            raise known from error
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException):
            why = str(error).partition("\n")[0][:300]
            do = "read the server's log, then run the same command again"
            raise TrackingError(f"the MLflow server at {uri} failed to handle a request", why, do) from error
        raise


def authorize(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    """`request` with the login for its server, and without one for another server. plugin.py calls it for each."""
    if login := find(str(request.url)):
        request.headers["Authorization"] = login.header
    elif _of_environment():  # added by MLflow, but for another server
        request.headers.pop("Authorization", None)
    return request


def _of_environment() -> Login:
    return Login(**{name: os.environ.get(variable, "") for name, variable in VARIABLES.items()})


def _origin(uri: str) -> tuple[str, str, int | None]:
    parts = urlsplit(uri)
    try:
        port = parts.port
    except ValueError:  # not a number: nothing answers there
        port = None
    return parts.scheme, parts.hostname or "", port or {"http": 80, "https": 443}.get(parts.scheme)


def _read(path: Path) -> Mapping[tuple[str, str, int | None], Login]:
    if not path.is_file():
        return {}
    seen = path.stat()
    if seen.st_mode & 0o077 or seen.st_uid != os.getuid():
        raise TrackingError(
            f"{path} is not private (mode {seen.st_mode & 0o777:04o})",
            "it holds credentials",
            f"chmod 600 {path}; if others could read it, change the password",
        )
    try:
        return {_origin(uri): Login(**login) for uri, login in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        form = '{"https://HOST": {"username": "...", "password": "..."}}'
        raise TrackingError(f"{path} is not a login file", type(error).__name__, f"write it as {form}") from error
