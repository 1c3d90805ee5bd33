"""What another user of the machine gets from the embedded server, and what its owner cannot do by mistake."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.mlflow.conftest import bearer
from tests.other_user import as_other_user, run_as_other_user
from tracking import runs, server

# Requests as [method, path] a line, answers as statuses, over one connection
KNOCK = """
host, port = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=60)

def knock(method, path):
    body = b"{}" if method in ("POST", "PUT", "PATCH", "DELETE") else None
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return [answer.status, len(answer.read())]

for line in sys.stdin:
    try:
        answer = knock(*json.loads(line))
    except (http.client.HTTPException, OSError):  # the connection was idle for too long
        connection.close()
        answer = knock(*json.loads(line))
    print(json.dumps(answer))
"""

# What an attacker did: an experiment whose artifacts lie in his directory, and there a link to somebody's files
ATTACK = """
uri, mine, victim, header = sys.argv[1:]
seen = {}

def ask(name, path, body=None, raw=None):
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **json.loads(header)}
    try:
        with urllib.request.urlopen(urllib.request.Request(uri + path, data, headers), timeout=60) as answer:
            seen[name] = [answer.status, answer.read().decode(errors="replace")]
    except urllib.error.HTTPError as error:
        seen[name] = [error.code, error.read().decode(errors="replace")]
    try:
        return json.loads(seen[name][1])
    except ValueError:
        return {}

ask("list", "/api/2.0/mlflow/experiments/search?max_results=100")
made = ask("create", "/api/2.0/mlflow/experiments/create",
           {"name": "a" + os.urandom(4).hex(), "artifact_location": "file://" + mine})
run = ask("run", "/api/2.0/mlflow/runs/create", {"experiment_id": made.get("experiment_id", "0")})
run_id = run.get("run", {}).get("info", {}).get("run_id", "none")
os.makedirs(f"{mine}/{run_id}")
os.symlink(victim, f"{mine}/{run_id}/artifacts")
ask("read", f"/get-artifact?run_uuid={run_id}&path=private")
ask("write", f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run_id}&path=authorized_keys", raw=b"planted")
print(json.dumps(seen))
"""


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    directory = tmp_path / "ssh"
    directory.mkdir(mode=0o700)
    (directory / "private").write_text("a private key")
    return directory


@pytest.fixture
def attacker() -> Iterator[Path]:
    """A directory that all users can reach and the second one owns."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def test_another_user_reads_and_writes_nothing(
    served: server.Server, direct: str, victim: Path, attacker: Path
) -> None:
    runs.start_run(direct, "of the owner", "secret-run")
    seen = json.loads(run_as_other_user(ATTACK, served.uri, attacker, victim, "{}"))
    assert {name: status for name, (status, _) in seen.items()} == dict.fromkeys(seen, 401) and len(seen) == 5
    assert not [text for _, text in seen.values() if "of the owner" in text or "private key" in text]
    assert [path.name for path in victim.iterdir()] == ["private"]


def test_not_even_the_owner_leads_the_server_out_of_its_store(
    home: Path, served: server.Server, victim: Path, attacker: Path
) -> None:
    seen = json.loads(run_as_other_user(ATTACK, served.uri, attacker, victim, json.dumps(bearer(home))))
    assert seen["list"][0] == 200 and seen["create"][0] == 403 and "outside of the store" in seen["create"][1]
    assert seen["read"][0] >= 400 and "private key" not in seen["read"][1]
    assert [path.name for path in victim.iterdir()] == ["private"]


@pytest.mark.parametrize(
    "location",
    ["file://{}", "{}", "FILE://{}", "file:{}", "file://localhost{}", "file://%2e%2e{}", "file:{}/../../etc",
     "file://{home}/artifacts/../..", "s3://bucket", "http://127.0.0.1:1/", "ftp://127.0.0.1/", "sftp://127.0.0.1/",
     "dbfs:/x", "unknown:/x"],
)  # fmt: skip
def test_no_address_outside_the_store_is_taken(home: Path, served: server.Server, victim: Path, location: str) -> None:
    place = location.format(victim, home=home / "mlflow")
    answer = requests.post(
        f"{served.uri}/api/2.0/mlflow/experiments/create", timeout=60, headers=bearer(home),
        json={"name": f"outside {location} {victim}", "artifact_location": place},
    )  # fmt: skip
    assert answer.status_code in (400, 403), answer.text


def test_what_leads_outside_already_opens_nothing(
    home: Path, served: server.Server, direct: str, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment from before, made by a client on the database itself, and links within the store."""
    from mlflow import MlflowClient

    plain = MlflowClient(direct, direct)  # not through the server
    get = f"{served.uri}/get-artifact"
    upload = f"{served.uri}/ajax-api/2.0/mlflow/upload-artifact"
    listing = f"{served.uri}/api/2.0/mlflow/artifacts/list"
    inside = home / "mlflow" / "artifacts"
    (inside / "linked").symlink_to(victim.parent)
    for name, location in (("planted", victim.parent.as_uri()), ("linked", (inside / "linked").as_uri())):
        experiment = plain.create_experiment(f"{name} {victim}", artifact_location=location)
        run_id = plain.create_run(experiment).info.run_id
        (victim.parent / run_id).mkdir()
        (victim.parent / run_id / "artifacts").symlink_to(victim)
        asked = {"run_uuid": run_id, "run_id": run_id, "path": "private"}
        answers = [
            requests.get(get, params=asked, headers=bearer(home), timeout=60),
            requests.get(listing, params={"run_id": run_id}, headers=bearer(home), timeout=60),
            requests.post(upload, params=asked | {"path": "new"}, data=b"x", headers=bearer(home), timeout=60),
        ]
        assert all(
            answer.status_code >= 400 and "private" not in answer.text.replace(str(victim), "") for answer in answers
        )
        # nor does our own client write there
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"{name} {victim}")
        with pytest.raises(Exception, match="outside of this home's store"):
            runs.start_run(direct, f"{name} {victim}", "r")
    # a link in a run's own directory, and the artifact proxy
    run_id = runs.start_run(direct, "links", "r")
    place = Path(runs.client(direct).get_run(run_id).info.artifact_uri.removeprefix("file://"))
    place.mkdir(parents=True, exist_ok=True)
    (place / "link").symlink_to(victim)
    proxied = place.relative_to(inside)
    for path in ("link/private", "../../../../private", "%2e%2e/private", "/etc/passwd", f"{victim}/private"):
        for answer in (
            requests.get(get, params={"run_uuid": run_id, "path": path}, headers=bearer(home), timeout=60),
            requests.get(
                f"{served.uri}/api/2.0/mlflow-artifacts/artifacts/{proxied}/{path}", headers=bearer(home), timeout=60
            ),
            requests.put(
                f"{served.uri}/api/2.0/mlflow-artifacts/artifacts/{proxied}/link/new", b"x",
                headers=bearer(home), timeout=60,
            ),
        ):  # fmt: skip
            assert answer.status_code >= 400 and "private key" not in answer.text, (path, answer.text)
    assert [path.name for path in victim.iterdir()] == ["private"]


def test_a_model_version_from_outside_is_refused(home: Path, served: server.Server, direct: str, victim: Path) -> None:
    run_id = runs.start_run(direct, "versions", "r")
    api = f"{served.uri}/api/2.0/mlflow"
    name = {"name": "from outside"}
    assert requests.post(f"{api}/registered-models/create", json=name, headers=bearer(home), timeout=60).ok
    for source in (f"file://{victim}", str(victim), "s3://bucket/x", "http://127.0.0.1:1/x", "ftp://h/x"):
        for lineage in ({}, {"run_id": run_id}):
            asked = name | {"source": source} | lineage
            made = requests.post(f"{api}/model-versions/create", json=asked, headers=bearer(home), timeout=60)
            assert made.status_code in (400, 403), made.text


ODD = (
    *("//", "//health", "/./health", "/%68ealth", "/health/", "/HEALTH", "/metrics", "/v1/traces", "/ws"),
    *("/static-files/../health", "/static-files/%2e%2e/index.html"),
    *("/?ticket=", "/?ticket=1-2-3", "/health?ticket=x&ticket=y"),
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")


def routes() -> set[tuple[str, str]]:
    """(method, path) of MLflow's Flask application, of the FastAPI one around it, and of odd spellings."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import app as fastapi

    rules = {(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods or ()}
    rules |= {(method.upper(), path) for path, methods in fastapi.openapi()["paths"].items() for method in methods}
    plain = {(method, re.sub(r"<[^>]*>|\{[^}]*\}", "1", rule)) for method, rule in rules}
    plain |= {(method, path) for _, path in plain for method in ("OPTIONS", "HEAD")}
    return plain | {(method, path) for path in ODD for method in METHODS}


def test_every_route_refuses_another_user(served: server.Server) -> None:
    known = sorted(routes())
    assert len(known) > 500, "the routes were not found"
    host, _, port = served.uri.removeprefix("http://").partition(":")
    with as_other_user(KNOCK, host, port) as process:
        lines, errors = process.communicate("".join(json.dumps(route) + "\n" for route in known), timeout=240)
    answers = [json.loads(line) for line in lines.splitlines()]
    assert len(answers) == len(known), errors
    let_in = [(route, answer) for route, answer in zip(known, answers, strict=True) if answer[0] not in (401, 403)]
    assert not let_in, let_in[:20]
    assert {length for _, length in answers} <= {0, answers[0][1]}, "an answer says more than the others"


def test_a_websocket_is_refused(served: server.Server) -> None:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x" * 16}
    assert requests.get(f"{served.uri}/ws", headers=headers, timeout=60).status_code == 401


def test_another_user_cannot_read_the_token(home: Path) -> None:
    read = """
try:
    print(pathlib.Path(sys.argv[1]).read_text())
except PermissionError:
    print("refused")
"""
    assert run_as_other_user(read, home / "mlflow" / "token").strip() == "refused"
