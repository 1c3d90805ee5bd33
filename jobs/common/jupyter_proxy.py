"""MLflow and Ray's dashboard for the owner of a JupyterLab, through jupyter-server-proxy.

    python -m jobs.common.jupyter_proxy mlflow|dashboard SOCKET

    browser -> Jupyter (its login) -> SOCKET, in a directory that only its owner can open -> loopback port (token)

Jupyter uses the header Authorization itself, and its host name is none of those that MLflow allows: so requests are
sent on under the address of the loopback port, without Jupyter's credentials, and with the token of the page, which the
browser never sees. The address is looked up for each request: heads and servers come and go. `/runs` opens MLflow at
the runs of the experiment, as `raylab ui` does.
"""

import asyncio
import atexit
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from cluster import client, relay
from cluster.directory import Directory, find
from cluster.slurm import Slurm
from jobs.common import home
from jobs.common.environment import verb_environment
from raylab.errors import RaylabError, SlurmError, UsageError
from raylab.loopback import is_own_listener
from tracking import runs, server, views
from tracking.access import identity, login, secret

OWN_REQUEST = ("none", "same-origin")  # values of Sec-Fetch-Site: requested by the user, by a page of Jupyter's origin
# Of one connection, or of Jupyter: not for the page
DROPPED = {
    "authorization", "connection", "cookie", "host", "keep-alive", "origin", "proxy-authorization", "referer", "te",
    "trailer", "transfer-encoding", "upgrade", "x-xsrftoken",
}  # fmt: skip
DROPPED_OF_ANSWER = {"connection", "keep-alive", "set-cookie", "trailer", "transfer-encoding", "upgrade"}
BODY_BYTES = 1 << 30  # of a request
# After a link or a login elsewhere the browser says that the request comes from there, also when it is repeated. This
# page makes the next one; without the question mark the part from `#` on would be all that changes.
ENTRANCE = (
    '<!doctype html><meta charset="utf-8"><script>location.replace(location.pathname + "?" + location.hash)</script>\n'
)
# While the page starts: Jupyter gives up a process that answers nothing for some time
STARTING = (
    '<!doctype html><meta charset="utf-8"><title>raylab</title><p style="font-family: sans-serif">Starting ...</p>'
    "<script>setTimeout(() => location.reload(), 1000)</script>\n"
)
PATIENCE = 1.0  # seconds until a person is told that the page starts


@dataclass(frozen=True)
class Target:
    """A page: its address, and the header with which it lets us in."""

    uri: str
    header: str
    token: str


Shortcut = Callable[[Target], str]
"""Returns the part of the page's address that a path of ours opens."""


def find_mlflow() -> Target:
    """The MLflow of this home: that of its cluster through the relay, else a server on this machine, which is started
    if there is none and then ends with this process."""
    if elsewhere := login.tracking_uri():
        raise UsageError(f"runs are tracked at {elsewhere}", do="open that address")
    where = home.home()
    is_served_by_cluster = any(not cluster.spec.tracking for cluster in _list_clusters(where))
    uri = _relay_port("mlflow") if is_served_by_cluster else None
    if uri is None:
        serving = server.serve(where)
        if serving.is_new:
            atexit.register(serving.stop)
        uri = serving.uri
    return Target(uri, "Authorization", secret.create(where))


def open_runs(target: Target) -> str:
    """The part of MLflow's address that opens the runs of the experiment."""
    from jobs.common.run_tracking import experiment_name  # with what MLflow's client loads, for this path alone

    identity.trust(target.uri, secret.path(home.home()))
    return views.publish_runs(runs.client(target.uri), experiment_name())


def find_dashboard() -> Target:
    """The dashboard of this home's cluster, through the relay."""
    uri, directory = _relay_port("dashboard"), find(home.home(), None)
    if uri is None:
        raise UsageError(f"cluster '{directory.path.name}' is down", do="raylab.cluster(SITE)")
    return Target(uri, "X-Ray-Authorization", directory.token.read_text().strip())


def _list_clusters(where: Path) -> list[Directory]:
    return [Directory(path.parent) for path in (where / "clusters").glob("*/cluster.json")]


def _relay_port(name: str) -> str | None:
    """The address of a page of this home's cluster; None if the cluster is down. Raises SlurmError while it starts."""
    directory = find(home.home(), None)
    state = client.status(directory, Slurm())["state"]
    if state == "down":
        return None
    if state != "ready":
        raise SlurmError(f"cluster '{directory.path.name}' is {state}", do="reload this page in a while")
    return f"http://127.0.0.1:{relay.start(directory)['ports'][name]}"


class Proxy:
    """Sends requests on to the page that `find` returns, in a thread, because it may start processes. `shortcuts`: by
    path."""

    def __init__(self, find: Callable[[], Target], shortcuts: Mapping[str, Shortcut]) -> None:
        self.find, self.shortcuts = find, shortcuts
        self.finding: asyncio.Task[Target] | None = None  # one for all requests

    async def handle(self, request: web.Request) -> web.StreamResponse:
        is_entrance = request.method == "GET" and request.path in ("/", *self.shortcuts)
        if request.headers.get("Sec-Fetch-Site", "none") not in OWN_REQUEST:
            # Not of other addresses, which may do something: Ray's dashboard ends actors by GET
            if is_entrance and request.headers.get("Sec-Fetch-Dest") == "document":
                return web.Response(text=ENTRANCE, content_type="text/html")
            return web.Response(status=403, text="403: this request comes from another page.\n")
        try:
            target = await self.locate(PATIENCE if is_entrance else None)
            if target is None:
                return web.Response(status=503, text=STARTING, content_type="text/html", headers={"Retry-After": "1"})
            if shortcut := self.shortcuts.get(request.path):
                page = await asyncio.to_thread(shortcut, target)
                return web.Response(status=303, headers={"Location": f"./{page}", "Cache-Control": "no-store"})
            return await self.forward(request, target)
        except RaylabError as error:
            return web.Response(status=502, text=f"raylab: {error}\n")
        except ClientError as error:
            self.finding = None
            return web.Response(status=502, text=f"raylab: the page does not answer: {error}\n  next: reload\n")

    async def locate(self, patience: float | None) -> Target | None:
        """The page, which is looked up again when nobody of ours listens at its address any more; None if that takes
        longer than `patience` seconds."""
        finding = self.finding
        if finding is None or (finding.done() and not is_own_listener(urlsplit(finding.result().uri).port or 80)):
            finding = self.finding = asyncio.create_task(self._find())
        await asyncio.wait({finding}, timeout=patience)
        if not finding.done():
            return None
        if finding.exception() is not None and self.finding is finding:
            self.finding = None
        return finding.result()

    async def _find(self) -> Target:
        target = await asyncio.to_thread(self.find)
        if target.header == "Authorization":
            await asyncio.to_thread(identity.prove, target.uri, target.token)
        return target

    async def forward(self, request: web.Request, target: Target) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in DROPPED}
        headers[target.header] = f"Bearer {target.token}"
        async with (
            ClientSession(auto_decompress=False, timeout=ClientTimeout(total=None, connect=10)) as session,
            session.request(
                request.method,
                target.uri + request.raw_path,
                headers=headers,
                data=await request.read(),
                allow_redirects=False,
            ) as answer,
        ):
            response = web.StreamResponse(status=answer.status, reason=answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in DROPPED_OF_ANSWER:
                    response.headers.add(name, value)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def make_app(find: Callable[[], Target], shortcuts: Mapping[str, Shortcut] = MappingProxyType({})) -> web.Application:
    """The proxy of one page."""
    app = web.Application(client_max_size=BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", Proxy(find, shortcuts).handle)
    return app


PAGES: dict[str, tuple[Callable[[], Target], dict[str, Shortcut]]] = {
    "mlflow": (find_mlflow, {"/runs": open_runs}),
    "dashboard": (find_dashboard, {}),
}


def main() -> None:
    page, socket = sys.argv[1], Path(sys.argv[2])
    if socket.parent.stat().st_mode & 0o077 or socket.parent.stat().st_uid != os.getuid():
        sys.exit(f"raylab: others can open {socket.parent}, and would be let into {page}")
    with verb_environment():
        web.run_app(make_app(*PAGES[page]), path=str(socket), access_log=None, print=None)


if __name__ == "__main__":
    main()
