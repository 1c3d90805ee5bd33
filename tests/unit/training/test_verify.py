"""A run against its ledger: an honest one passes, also killed and resumed; each alteration is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import RECIPE, Rows, killed

from raylab.config.overrides import override
from raylab.data.prepared import sha256
from raylab.errors import DataError, UsageError
from raylab.training import checkpoint, ledger
from raylab.training.run import execute, load_samples, read_model
from raylab.training.verify import Claims, Interval, Verifier, check_model, list_intervals, read_claims

# 6 steps in 3 epochs; every checkpoint is kept
KEPT = override(RECIPE, {"loop.checkpoint_steps": 2, "loop.max_checkpoints": 9})


@pytest.fixture(scope="module")
def honest(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "honest"
    directory.mkdir()
    execute(KEPT, *load_samples(KEPT, ards_data), directory, Rows())
    return directory


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def chain_of(directory: Path) -> ledger.Chain:
    return ledger.follow_chain((directory / ledger.FILE).read_bytes())


def claims_of(directory: Path) -> Claims:
    return read_claims(ledger.read_ledger(directory / ledger.FILE))


def differences(directory: Path, data: Path) -> list[tuple[Interval, str]]:
    """What is found when every interval is computed again."""
    claims, verifier = claims_of(directory), Verifier(directory, KEPT, data, None)
    kept = [int(path.name[5:]) for path in checkpoint.list_checkpoints(directory / "checkpoints")]
    checked = [(one, verifier.check(one, claims)) for one in list_intervals(claims.states, kept)]
    return [(interval, found) for interval, found in checked if found is not None]


def forge(directory: Path, change: dict[int, dict[str, object]]) -> None:
    """Change lines of the ledger, by number from 0, and compute the whole chain anew, as a forger would."""
    head, lines = ledger.follow_chain(b"").head, b""
    for number, line in enumerate((directory / ledger.FILE).read_text().splitlines()):
        content = json.loads(line)
        del content["chain"]
        entry = ledger.parse_entry(content | change.get(number, {}), directory)
        new, head = ledger.render_line(entry, head)
        lines += new
    (directory / ledger.FILE).write_bytes(lines)


def line_of(directory: Path, field: str, value: object) -> int:
    lines = [json.loads(line) for line in (directory / ledger.FILE).read_text().splitlines()]
    return next(number for number, line in enumerate(lines) if line.get(field) == value)


def test_an_honest_run_passes(honest, ards_data):
    result = json.loads((honest / "result.json").read_text())
    chain = chain_of(honest)
    assert (chain.broken, chain.unchained, chain.head) == ((), 0, result["ledger_sha256"])
    assert ledger.find_head((honest / ledger.FILE).read_bytes()) == chain.head
    claims = claims_of(honest)
    assert (claims.contradictions, check_model(honest, claims)) == ([], [])
    assert claims.finish is not None and claims.finish.weights_sha256 == result["weights_sha256"]
    assert list_intervals(claims.states, [2, 4, 6]) == [(0, 2), (2, 4), (4, 6)]
    assert differences(honest, ards_data) == []


@pytest.mark.parametrize("at", [2, 5])
def test_a_run_that_was_killed_and_resumed_passes(at, honest, ards_data, tmp_path):
    killed(KEPT, ards_data, tmp_path, at)
    with (tmp_path / ledger.FILE).open("a") as file:
        file.write('{"attempt": 0, "st')  # the line that the crash has cut off
    execute(KEPT, *load_samples(KEPT, ards_data), tmp_path, Rows())
    chain, claims = chain_of(tmp_path), claims_of(tmp_path)
    assert (chain.broken, chain.unchained) == ((), 0)
    assert chain.head == json.loads((tmp_path / "result.json").read_text())["ledger_sha256"]
    assert (claims.contradictions, check_model(tmp_path, claims)) == ([], [])
    assert claims.states == claims_of(honest).states and differences(tmp_path, ards_data) == []


def test_a_ledger_of_an_earlier_version_is_continued(ards_data, tmp_path):
    killed(KEPT, ards_data, tmp_path, 3)
    lines = [json.loads(line) for line in (tmp_path / ledger.FILE).read_text().splitlines()]
    new = ("chain", "cpus", "recipe_sha256", "state_sha256")
    old = [json.dumps({name: value for name, value in line.items() if name not in new}) + "\n" for line in lines]
    (tmp_path / ledger.FILE).write_text("".join(old))
    execute(KEPT, *load_samples(KEPT, ards_data), tmp_path, Rows())
    chain = chain_of(tmp_path)
    assert (chain.broken, chain.unchained) == ((), len(old))
    assert list_intervals(claims_of(tmp_path).states, [2, 4, 6]) == [(0, 4), (4, 6)]
    text = (tmp_path / ledger.FILE).read_text()
    (tmp_path / ledger.FILE).write_text(text.replace('"step": 1', '"step": 9', 1))
    assert ledger.find_head("".join(old).encode()) == ledger.follow_chain("".join(old).encode()).head
    assert chain_of(tmp_path).broken == (len(old) + 1,), "the first chained line depends on all lines before"


def test_a_changed_removed_or_added_line_breaks_the_chain(copy):
    path = copy / ledger.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (
        [*lines[:2], lines[2].replace(b'"loss": ', b'"loss": 1'), *lines[3:]],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:3], *lines[2:]],
    ):
        assert ledger.follow_chain(b"".join(changed)).broken
    cut, whole = ledger.follow_chain(b"".join(lines[:-1])), chain_of(copy)
    assert not cut.broken and cut.head != whole.head, "only the head shows that the end is missing"


def test_an_altered_interval_is_found_although_the_chain_is_new(copy, ards_data):
    before = chain_of(copy).head
    forge(copy, {line_of(copy, "step", 3): {"loss": 0.25}})
    chain = chain_of(copy)
    assert not chain.broken and chain.head != before
    ((interval, found),) = differences(copy, ards_data)
    assert interval == (2, 4) and "the ledger has 0.25" in found


def test_a_state_that_training_does_not_lead_to_is_found(copy, ards_data):
    """The forger changes weights in a checkpoint, its checksum, its line in the ledger and the chain."""
    path = copy / "checkpoints" / "step-00000004"
    state = checkpoint.load(path)
    next(iter(state["model"].values())).view(-1)[0] += 1e-3
    shutil.rmtree(path)
    checkpoint.save(path.parent, 4, state, keep=9)
    assert any("step-00000004" in wrong for wrong in check_model(copy, claims_of(copy)))
    forge(copy, {line_of(copy, "checkpoint", 4): {"state_sha256": checkpoint.hash_state(state)}})
    assert check_model(copy, claims_of(copy)) == []
    found = dict(differences(copy, ards_data))
    assert found[Interval(2, 4)] == "step 4: all losses are equal, but the state is not"


def test_another_model_is_found(copy):
    model = copy / "model" / "model.safetensors"
    tensors = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(model).items()}
    save_file(tensors, model)
    assert check_model(copy, claims_of(copy)) == [
        "model/model.safetensors is not the file that the ledger names",
        "model/model.safetensors is not the best network of the last checkpoint",
    ]
    forge(copy, {line_of(copy, "finished", 6): {"model_sha256": sha256(model)}})
    assert check_model(copy, claims_of(copy)) == [
        "model/model.safetensors is not the best network of the last checkpoint"
    ]


def test_a_model_that_is_cut_off_is_found(copy):
    path = copy / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    found = check_model(copy, claims_of(copy))
    assert len(found) == 2 and "not the file" in found[0] and "could not be read as safetensors" in found[1]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b""])
def test_a_checksum_that_is_no_text_is_a_damaged_checkpoint(content, copy):
    newest = checkpoint.list_checkpoints(copy / "checkpoints")[0]
    (newest / "sha256").write_bytes(content)
    assert check_model(copy, claims_of(copy)) == [f"checkpoints/{newest.name} is damaged: its checksum does not match"]


@pytest.mark.parametrize("state", [[1, 2], {}])
def test_a_checkpoint_that_holds_no_state_is_found(state, copy):
    newest = checkpoint.list_checkpoints(copy / "checkpoints")[0]
    torch.save(state, newest / "state.pt")
    (newest / "sha256").write_text(sha256(newest / "state.pt"))
    (found,) = check_model(copy, claims_of(copy))
    assert newest.name in found


def test_a_step_of_a_damaged_ledger_may_have_any_number(copy):
    with (copy / ledger.FILE).open("a") as file:
        file.write('{"attempt": 0, "step": 999999999999, "loss": 1.0}\n')
        file.write("[" * 100_000 + "\n")
    assert claims_of(copy).contradictions == ["999999999992 steps are missing, the first is step 7"]
    assert ledger.summarise_ledger(copy / ledger.FILE)["gaps"] == 999999999992


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {}},
        {"spec": {"kind": "unknown"}},
        {"spec": {"kind": "icu-hourly", "features": 3}},
        {"recipe": {}},
        {"recipe": {"task": "ards", "search": 5}},
    ],
)
def test_a_note_that_no_network_can_be_built_from_is_damaged(change, copy):
    path = copy / "model" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((DataError, UsageError), match=r"(?s)model\.json .*next: restore it") as found:
        read_model(copy)
    assert found.value.exit_code == 2


def test_weights_of_another_network_are_named(copy):
    path = copy / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)
    with pytest.raises(DataError, match="does not have the weights of the network"):
        read_model(copy)


def test_contradictions_of_attempts_are_found(tmp_path):
    step, checkpoint_of = ledger.Step, ledger.Checkpoint
    entries = [
        step(attempt=0, step=1, loss=0.5),
        step(attempt=1, step=1, loss=0.5000001),
        step(attempt=1, step=3, loss=1),
    ]
    entries += [checkpoint_of(attempt=a, checkpoint=1, state_sha256=s) for a, s in enumerate("xy")]
    first, second, third = read_claims(entries).contradictions
    assert "step 1 has two losses" in first and "two states" in second and "1 steps are missing" in third


def test_intervals_start_where_a_state_is_known():
    states = {5: "a", 10: "b", 15: "c", 18: "d"}
    assert list_intervals(states, []) == [(0, 5)]
    assert list_intervals(states, [15, 18]) == [(0, 5), (15, 18)]
    assert list_intervals({}, [5]) == []


def test_sums_that_depend_on_the_order_are_refused(ards_data, tmp_path):
    with pytest.raises(DataError, match="cannot be verified to the bit"):
        Verifier(tmp_path, override(KEPT, {"loop.gradient_reduction": "float"}), ards_data, None)


def test_the_hash_of_a_state_depends_on_each_part_and_not_on_the_layout():
    def state(**more: object) -> dict[str, object]:
        return {"model": {"w": torch.arange(8.0).reshape(1, 2, 2, 2)}, "step": 1, "rows": [1], "x": None} | more

    known = checkpoint.hash_state(state())
    last = torch.arange(8.0).reshape(1, 2, 2, 2).to(memory_format=torch.channels_last)
    assert checkpoint.hash_state(state(rows=[], model={"w": last})) == known
    others = [
        *({"step": value} for value in (2, 1.0, True, "1", None)),
        {"model": {"w": torch.arange(8.0).reshape(2, 4)}},
        {"model": {"w": torch.arange(8).reshape(1, 2, 2, 2)}},
        {"model": {"v": torch.arange(8.0).reshape(1, 2, 2, 2)}},
        {"x": float("nan")},
        {"x": torch.zeros((), dtype=torch.bfloat16)},
        {"x": torch.zeros(0)},
        {"x": [1, [2]]},
        {"x": [1, 2]},
    ]
    assert len({known, *(checkpoint.hash_state(state(**more)) for more in others)}) == 1 + len(others)
    with pytest.raises(TypeError):
        checkpoint.hash_state({"x": object()})
