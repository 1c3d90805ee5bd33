"""The check before MLflow's pages, around an application that answers everything."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tracking.access import secret
from tracking.access.guard import COOKIE, Guard

TOKEN = "a" * 64
HOST = secret.host_name(TOKEN)


def pages(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    pages.seen = environ  # type: ignore[attr-defined]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"private"]


class Answer:
    def __init__(self, guard: Guard, path: str = "/", method: str = "GET", query: str = "", **headers: str) -> None:
        environ = {
            "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "wsgi.url_scheme": "http",
            "HTTP_HOST": f"{HOST}:5000", **{f"HTTP_{name.upper()}": value for name, value in headers.items()},
        }  # fmt: skip
        self.text = b"".join(guard(environ, self._start)).decode()

    def _start(self, status: str, headers: list[tuple[str, str]]) -> None:
        self.status, self.headers = int(status[:3]), dict(headers)

    @property
    def cookie(self) -> str:
        return self.headers["Set-Cookie"].partition(";")[0]


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(pages, TOKEN, tmp_path / "spent")


def enter(guard: Guard, **headers: str) -> Answer:
    return Answer(guard, query=f"ticket={secret.ticket(TOKEN)}", **headers)


def test_without_the_secret_everything_is_refused_and_tells_nothing(guard: Guard) -> None:
    wrong = (
        {}, {"authorization": "Bearer " + "b" * 64}, {"authorization": "Bearer"}, {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"}, {"authorization": "Bearer \xff\u20ac"}, {"cookie": f"{COOKIE}={TOKEN}"},
        {"cookie": f"{COOKIE}="}, {"cookie": f";;={COOKIE}; {COOKIE}"}, {"x_forwarded_for": "127.0.0.1"},
    )  # fmt: skip
    for path in ("/", "/health", "//health", "/static-files/main.js", "/api/2.0/mlflow/experiments/search", "/../x"):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"):
            for headers in wrong:
                answer = Answer(guard, path, method, **headers)
                assert answer.status == 401 and "private" not in answer.text
                assert not {"Set-Cookie", "Raylab-Proof"} & answer.headers.keys()
                assert answer.text == "" if method == "HEAD" else answer.text.startswith("401")


def test_the_token_opens_everything_and_goes_no_further(guard: Guard) -> None:
    answer = Answer(guard, "/health", authorization=f"Bearer {TOKEN}", origin="http://evil.example")
    assert (answer.status, answer.text) == (200, "private")
    assert not {"HTTP_AUTHORIZATION", "HTTP_ORIGIN"} & pages.seen.keys()  # type: ignore[attr-defined]


def test_a_ticket_becomes_a_cookie_once(guard: Guard) -> None:
    query = f"ticket={secret.ticket(TOKEN)}"
    first = Answer(guard, query=query)
    assert first.status == 303 and first.headers["Location"] == "/" and "private" not in first.text
    assert all(word in first.headers["Set-Cookie"] for word in ("Path=/", "HttpOnly", "SameSite=Strict"))
    assert Answer(guard, query=query).status == 401  # spent
    assert (
        Answer(guard, "/ajax-api/x", "POST", cookie=f"a=b; {first.cookie}", origin=f"http://{HOST}:5000").text
        == "private"
    )
    again = Guard(pages, TOKEN, guard.spent)
    assert Answer(again, cookie=first.cookie).status == 401  # cookies end with the server
    assert Answer(again, query=query).status == 401  # and tickets are spent for good


def test_old_tickets_are_forgotten(guard: Guard) -> None:
    query = f"ticket={secret.ticket(TOKEN)}"
    assert Answer(guard, query=query).status == 303
    (spent,) = guard.spent.iterdir()
    os.utime(spent, (1, 1))
    Guard(pages, TOKEN, guard.spent)
    assert not list(guard.spent.iterdir())


@pytest.mark.parametrize("how", ["forged", "old", "of another home", "two", "on another path", "sent"])
def test_a_ticket_that_is_not_good_opens_nothing(guard: Guard, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with monkeypatch.context() as patch:
        if how == "old":
            patch.setattr(time, "time", lambda: now - secret.TICKET_SECONDS - 5)
        made = secret.ticket("b" * 64 if how == "of another home" else TOKEN)
    if how == "forged":
        made = f"{int(now) + 1}{made[made.index('-') :]}"
    query = f"ticket={made}" + (f"&ticket={secret.ticket(TOKEN)}" if how == "two" else "")
    answer = Answer(guard, "/x" if how == "on another path" else "/", "POST" if how == "sent" else "GET", query)
    assert answer.status == 401 and "Set-Cookie" not in answer.headers and not list(guard.spent.iterdir())


def test_a_link_on_another_page_gets_a_page_that_asks_again(guard: Guard) -> None:
    """A browser sends a SameSite=Strict cookie not even after a redirect, when another site began the request."""
    answer = enter(guard, sec_fetch_site="cross-site")
    assert (
        answer.status == 200 and 'location.replace("/" + location.hash)' in answer.text and "private" not in answer.text
    )
    assert Answer(guard, cookie=answer.cookie, sec_fetch_site="same-origin").text == "private"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": f"http://{HOST}:6000"},  # another port of the same name: the same site for a cookie
        {"origin": "http://localhost:5000"},
        {"origin": "null"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "cross-site"},
    ],
)
def test_another_page_cannot_use_the_cookie(guard: Guard, headers: dict[str, str]) -> None:
    cookie = enter(guard).cookie
    for method in ("GET", "POST", "OPTIONS"):
        answer = Answer(guard, "/ajax-api/x", method, cookie=cookie, **headers)
        assert answer.status == 403 and "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1:5000", "evil.example", "h-00000000.localhost:5000", ""])
def test_cookies_and_tickets_count_at_the_home_s_own_name_only(guard: Guard, host: str) -> None:
    """Browsers send the cookies of a name to all its ports, and an attacker's name may lead to loopback."""
    assert Answer(guard, query=f"ticket={secret.ticket(TOKEN)}", host=host).status == 401
    assert Answer(guard, cookie=enter(guard).cookie, host=host).status == 401


def test_a_challenge_is_answered_with_the_refusal(guard: Guard) -> None:
    answer = Answer(guard, raylab_challenge="c1")
    assert answer.status == 401 and answer.headers["Raylab-Proof"] == secret.proof(TOKEN, "c1")
    assert "Raylab-Proof" not in Answer(guard, raylab_challenge="x" * 1000).headers
    assert secret.proof(TOKEN, "c1") != secret.proof("b" * 64, "c1")
