"""The plugin that MLflow's client calls before each request if MLFLOW_TRACKING_AUTH is `raylab`: it verifies the server
and adds the token.

MLflow finds it by the entry point `mlflow.request_auth_provider` in pyproject.toml.
"""

from urllib.parse import urlsplit

from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider
from requests import PreparedRequest
from requests.auth import AuthBase

from tracking.access import identity, login, secret


class Auth(AuthBase):
    """Sends the home's token to the home's server only, and nothing to a stranger on a loopback port."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """`request` with the token, or with the login for another server. Raises TrackingError before
        anything is sent to a server that does not prove its identity."""
        parts = urlsplit(str(request.url))
        uri = f"{parts.scheme}://{parts.netloc}"
        if not identity.is_local(uri):
            return login.authorize(request)
        file = identity.token_file(uri)
        if file is not None:
            token = secret.read(file)
            identity.prove(uri, token)
            request.headers["Authorization"] = f"Bearer {token}"
            return request
        if login.find(uri) is None:
            identity.refuse_stranger(uri)
        return login.authorize(request)


class AuthProvider(RequestAuthProvider):
    """raylab's entry in MLflow's list of auth providers."""

    def get_name(self) -> str:
        return identity.AUTH

    def get_auth(self) -> Auth:
        return Auth()
