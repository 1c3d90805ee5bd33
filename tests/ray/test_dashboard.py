"""Ray's dashboard behind jupyter-server-proxy: our process adds the token, and lets nobody in from other pages."""

import asyncio
from pathlib import Path

from aiohttp import ClientSession, UnixConnector, web

from jobs.common.jupyter_proxy import Target, make_app
from raylab.errors import UsageError
from tests.ray.conftest import Cluster

JOBS = "/api/jobs/"  # of the dashboard's API


def test_the_dashboard_is_opened_with_a_token_that_the_browser_lacks(cluster: Cluster, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{cluster.dashboard_port}"
    token = cluster.token.read_text()
    targets = [UsageError("no cluster of this home is up", do="raylab cluster up")]

    def find() -> Target:
        if targets:
            raise targets.pop()
        return Target(address, "X-Ray-Authorization", token)

    async def ask() -> None:
        runner = web.AppRunner(make_app(find))
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "socket")).start()
        async with ClientSession() as direct, ClientSession(connector=UnixConnector(str(tmp_path / "socket"))) as ours:
            assert (await direct.get(address + JOBS)).status == 401
            first = await ours.get(f"http://jupyter{JOBS}")
            assert first.status == 502 and "no cluster of this home is up" in await first.text()
            of_jupyter = {"Authorization": "token of-jupyter", "Cookie": "jupyter=1", "Host": "jupyter.example.org"}
            answer = await ours.get(f"http://jupyter{JOBS}", headers=of_jupyter)
            assert answer.status == 200 and isinstance(await answer.json(), list)
            page = await ours.get("http://jupyter/", headers=of_jupyter)
            assert page.status == 200 and token not in await page.text() + str(page.headers)
            foreign = await ours.get(f"http://jupyter{JOBS}", headers={"Sec-Fetch-Site": "cross-site"})
            assert foreign.status == 403
        await runner.cleanup()

    asyncio.run(ask())
