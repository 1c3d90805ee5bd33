"""A run in its directory, end to end without Ray: resumed, damaged, inherited from; and its ledger."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_process_group import in_world

from raylab.config.old_names import PROGRESS
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.errors import CheckpointError, DataError
from raylab.files import read_lines
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint
from raylab.training import run as runs
from raylab.training.ledger import summarise_ledger
from raylab.training.loop import AttemptHandedOver, weights_sha256
from raylab.training.peers import FixedPeers
from raylab.training.process_group import ProcessGroup
from raylab.training.run import Recorder, execute, inherit, load_samples, read_model, write_model

# 124 samples: 2 steps an epoch, 6 in all; checkpoints after 3 and 6
RECIPE = override(shipped_recipe("ards", smoke=True), {"loop.checkpoint_steps": 3, "loop.ema_decay": 0.9})


class Killed(BaseException):
    """No handler of ours may catch it."""


class Rows:
    """A `send` that remembers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> int:
        self.rows += rows
        return 0  # on their way


def killed(recipe: Recipe, data: Path, directory: Path, step: int) -> None:
    """A run that is killed right after `step` went into its ledger, before any checkpoint of it."""
    whole = Recorder.__call__

    def call(recorder: Recorder, metrics: dict[str, Any], state: dict[str, Any] | None) -> bool:
        asked = whole(recorder, metrics, state)
        if state is None and metrics["step"] == step:
            raise Killed
        return asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__call__", call)
        with pytest.raises(Killed):
            # nothing is sent before the kill
            execute(recipe, *load_samples(recipe, data), directory, Rows(), flush_seconds=3600)


@pytest.fixture(scope="module")
def undisturbed(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    directory.mkdir()
    return directory, execute(RECIPE, *load_samples(RECIPE, ards_data), directory, Rows())


def test_a_run_leaves_its_result_its_ledger_and_its_model(undisturbed, ards_data):
    directory, result = undisturbed
    assert json.loads((directory / "result.json").read_text()) == result
    assert (result["steps"], result["attempts"], result["workers"]) == (6, 1, [1])
    assert (result["steps_repeated"], result["gaps"], result["damaged_checkpoints"]) == (0, 0, 0)
    lines = read_lines(directory / "ledger.jsonl")
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["checkpoint"] for line in lines if "checkpoint" in line] == [3, 6]
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoints", "ledger.jsonl", "model", "result.json"]
    job, recipe, spec, model = read_model(directory)
    assert (job.name, recipe) == ("ards", RECIPE)
    val = job.load(ards_data, "val", recipe.data, spec)
    p = runs.checkpoint.load(runs.checkpoint.find_newest(directory / "checkpoints")[0])["progress"]["best_model"]
    assert all(torch.equal(p[name], tensor) for name, tensor in model.state_dict().items())
    assert len(val) == json.loads((ards_data / "meta.json").read_text())["counts"]["val"]["n"]


@pytest.mark.parametrize(("at", "start", "repeated"), [(2, 0, 2), (4, 3, 1), (6, 3, 3)])
def test_a_killed_run_goes_on_to_the_same_weights(at, start, repeated, undisturbed, ards_data, tmp_path):
    killed(RECIPE, ards_data, tmp_path, at)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "model").exists()
    again = Rows()
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, again)
    # Nothing was sent before the kill: what the checkpoint held back is sent now, before the steps after it
    assert [row["step"] for row in again.rows] == list(range(1, 7))
    assert [line["start"] for line in read_lines(tmp_path / "ledger.jsonl") if "start" in line] == [0, start]
    assert (result["attempts"], result["steps_repeated"], result["gaps"]) == (2, repeated, 0)
    for fact in ("weights_sha256", "val", "best", "steps"):
        assert result[fact] == undisturbed[1][fact]
    assert weights_sha256(read_model(tmp_path)[3]) == weights_sha256(read_model(undisturbed[0])[3])


def test_a_checkpoint_with_the_names_of_version_0_1_is_resumed(undisturbed, ards_data, tmp_path):
    killed(RECIPE, ards_data, tmp_path, 4)
    at = tmp_path / "checkpoints" / "step-00000003"
    state = checkpoint.load(at)
    old = {new: name for name, new in PROGRESS.items()}
    state["progress"] = {old.get(name, name): value for name, value in state["progress"].items()}
    assert {"cuts", "cut_wait", "waited"} <= state["progress"].keys()
    shutil.rmtree(at)
    checkpoint.save(tmp_path / "checkpoints", 3, state, keep=2)
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows())
    assert [line["start"] for line in read_lines(tmp_path / "ledger.jsonl") if "start" in line] == [0, 3]
    assert result["weights_sha256"] == undisturbed[1]["weights_sha256"]


def test_a_damaged_checkpoint_costs_an_interval_and_nothing_else(undisturbed, ards_data, tmp_path):
    killed(override(RECIPE, {"loop.checkpoint_steps": 1}), ards_data, tmp_path, 6)
    newest = tmp_path / "checkpoints" / "step-00000005" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows())
    assert next(reversed([line for line in read_lines(tmp_path / "ledger.jsonl") if "start" in line]))["damaged"] == [
        "step-00000005"
    ]
    assert (result["damaged_checkpoints"], result["steps_repeated"]) == (1, 2)
    assert result["weights_sha256"] == undisturbed[1]["weights_sha256"]


def test_a_finished_run_has_nothing_left_to_do(undisturbed, ards_data, tmp_path):
    samples = load_samples(RECIPE, ards_data)
    first = execute(RECIPE, *samples, tmp_path, Rows(), flush_seconds=3600)  # in one bundle, however slow this is
    rows = Rows()
    again = execute(RECIPE, *samples, tmp_path, rows)
    assert [row["step"] for row in rows.rows] == list(range(1, 7))  # once more, lest a bundle was lost at the end
    assert again.pop("ledger_sha256") != first.pop("ledger_sha256"), "the second attempt is in the ledger, too"
    assert again == first | {"attempts": 2, "workers": [1, 1]}


def world_of(recipe: Recipe, data: Path, directory: Path, send: Callable[[Any], int]) -> dict[str, Any]:
    return execute(recipe, *load_samples(recipe, data), directory, send)


def test_two_workers_write_one_run(undisturbed, ards_data, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    rank_0, rank_1 = in_world(2, tmp_path / "world", world_of, RECIPE, ards_data, directory, Rows())
    assert rank_0["weights_sha256"] == rank_1["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert (rank_0["attempts"], rank_0["workers"], rank_0["gaps"]) == (1, [2], 0)
    start, *rest = read_lines(directory / "ledger.jsonl")
    assert len(set(start["pids"])) == 2
    assert len([line for line in rest if "step" in line]) == 6  # one line a step, not one a worker


def error_of(recipe: Recipe, data: Path, directory: Path) -> tuple[str, ...]:
    """The error with which this rank ends."""
    with pytest.raises(CheckpointError) as caught:
        execute(recipe, *load_samples(recipe, data), directory, Rows())
    return caught.value.args


def test_a_full_disk_ends_the_run_on_all_ranks_and_spares_the_checkpoint_before(
    small_disk, undisturbed, ards_data, tmp_path
):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "checkpoints").symlink_to(small_disk)
    size = (undisturbed[0] / "checkpoints" / "step-00000003" / "state.pt").stat().st_size
    resize = ["mount", small_disk, "-o"]
    subprocess.run([*resize, f"remount,size={3 * size // 2}"], check=True)  # there is space for one
    recipe = override(RECIPE, {"loop.checkpoint_steps": 2})
    rank_0, rank_1 = in_world(2, tmp_path / "world", error_of, recipe, ards_data, directory)
    assert rank_0 == rank_1
    assert "step 4 could not be written" in rank_0[0] and "raylab resume" in rank_0[2]
    assert checkpoint.find_newest(small_disk) == (small_disk / "step-00000002", [])
    assert not (directory / "result.json").exists() and not (directory / "model").exists()
    subprocess.run([*resize, f"remount,size={9 * size}"], check=True)
    result = execute(recipe, *load_samples(recipe, ards_data), directory, Rows())
    assert (result["attempts"], result["damaged_checkpoints"], result["gaps"]) == (2, 0, 0)
    assert result["weights_sha256"] == undisturbed[1]["weights_sha256"]


# changes of workers


def test_the_steps_that_a_writer_takes_over_are_in_its_ledger_once(tmp_path):
    """Of rank 0, which stays so and gets the state of a rank that was a step ahead."""
    recorder, group = Recorder(tmp_path, RECIPE, {}, Rows()), ProcessGroup()
    recorder.resume(None, [])
    recorder.start_group(group, 0)
    rows = [{"step": step, "train/loss": 0.5} for step in (1, 2, 3)]
    for row in rows[:2]:
        recorder(row, None)
    recorder.carry({**recorder.carried(), "rows": rows})
    recorder.start_group(group, 3)
    other = Recorder(tmp_path, RECIPE, {}, Rows())  # the next rank 0
    other.carry(recorder.carried())
    other.start_group(group, 3)
    lines = read_lines(tmp_path / "ledger.jsonl")
    assert [next(name for name in ("start", "step", "regroup") if name in line) for line in lines] == (
        ["start", "step", "step", "step", "regroup", "regroup"]
    )
    facts = summarise_ledger(tmp_path / "ledger.jsonl")
    assert (facts["attempts"], facts["regroups"], facts["steps_repeated"], facts["gaps"]) == (1, 2, 0, 0)


def test_an_attempt_has_its_start_though_its_first_writer_died_before(tmp_path):
    """A writer that dies before it can note that the attempt has begun, from step 2."""
    before, first, second = (Recorder(tmp_path, RECIPE, {}, Rows()) for _ in range(3))
    before.resume(None, [])
    before.start_group(ProcessGroup(), 0)
    for step in (1, 2, 3):
        before({"step": step, "train/loss": 0.5}, None)
    first.resume({"rows": [], "progress": {"step": 2}}, ["step-00000003"])
    second.carry(first.carried())
    second.start_group(ProcessGroup(), 2)
    second({"step": 3, "train/loss": 0.5}, None)
    *_, start, step = read_lines(tmp_path / "ledger.jsonl")
    assert (start["start"], start["attempt"], start["damaged"]) == (2, 1, ["step-00000003"])
    assert (step["step"], step["attempt"]) == (3, 1)
    facts = summarise_ledger(tmp_path / "ledger.jsonl")
    assert (facts["attempts"], facts["steps_repeated"], facts["gaps"]) == (2, 1, 0)


def test_a_writer_that_hangs_in_the_middle_of_a_line_writes_nothing_after_the_next_one(tmp_path):
    """It hangs after it has looked whether its group stands; another takes over meanwhile."""
    hung, other = (Recorder(tmp_path, RECIPE, {}, Rows()) for _ in range(2))
    row: dict[str, Any] = {"step": 1, "train/loss": 0.5}

    def hang() -> None:
        other.carry(hung.carried() | {"rows": []})
        other.start_group(ProcessGroup(), 0)
        other(row, None)

    hung.start_group(ProcessGroup(), 0)
    hung._check_group = hang  # type: ignore[method-assign]
    hung(row, None)
    lines = read_lines(tmp_path / "ledger.jsonl")
    assert [next(name for name in ("start", "step", "regroup") if name in line) for line in lines] == (
        ["start", "regroup", "step"]
    )


def test_a_line_that_a_crash_has_torn_is_gone_when_another_takes_over(tmp_path):
    before, other = (Recorder(tmp_path, RECIPE, {}, Rows()) for _ in range(2))
    before.start_group(ProcessGroup(), 0)
    path = tmp_path / "ledger.jsonl"
    complete, mode = path.read_bytes(), path.stat().st_mode
    path.write_bytes(complete + b'{"attempt": 0, "st')
    other.carry(before.carried())
    other.start_group(ProcessGroup(), 0)
    assert path.read_bytes().startswith(complete) and len(read_lines(path)) == 2
    assert path.read_bytes().count(b"\n") == 2 and path.stat().st_mode == mode


# leaving


class Leaving(FixedPeers):
    """The only worker, which is told to leave before its third step."""

    def __init__(self) -> None:
        super().__init__()
        self.boundaries = 0

    def is_leaving(self) -> bool:
        self.boundaries += 1
        return self.boundaries > 2


def test_when_every_worker_leaves_the_run_is_saved_and_handed_over(undisturbed, ards_data, tmp_path):
    with pytest.raises(AttemptHandedOver):
        execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows(), peers=Leaving())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    *_, saved, last = read_lines(tmp_path / "ledger.jsonl")
    del saved["time"], saved["chain"], saved["state_sha256"], last["chain"]
    assert saved == {"attempt": 0, "checkpoint": 2}, "it is complete before the run is handed over"
    assert last == {"attempt": 0, "moved": 2, "why": "every worker was told to leave"}
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows())
    assert (result["attempts"], result["steps_repeated"]) == (2, 0)
    assert result["weights_sha256"] == undisturbed[1]["weights_sha256"]


# the ledger


def ledger(path: Path, *lines: dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"attempt": 0, **line}) + "\n" for line in lines))
    return summarise_ledger(path)


def start(step: int, workers: int = 1, damaged: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"start": step, "workers": workers, "damaged": damaged}


def computed(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 0.1} for step in steps]


def test_facts_of_a_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert ledger(path, start(0), *computed(1, 2, 3)) == {
        "attempts": 1,
        "regroups": 0,
        "workers": [1],
        "cpus": [],
        "steps_repeated": 0,
        "gaps": 0,
        "damaged_checkpoints": 0,
    }
    facts = ledger(path, start(0, 2), *computed(1, 2, 3), {"checkpoint": 2}, start(2, 3, ("x",)), *computed(3, 4))
    assert (facts["attempts"], facts["workers"], facts["steps_repeated"], facts["gaps"]) == (2, [2, 3], 1, 0)
    assert facts["damaged_checkpoints"] == 1
    assert ledger(path, start(0), *computed(1, 2), start(4), *computed(5))["gaps"] == 2
    assert ledger(path, start(0), *computed(1, 2), start(0), start(1), *computed(2))["steps_repeated"] == 2
    regroup = {"regroup": 2, "workers": 1, "pids": [7], "time": 1.5}
    facts = ledger(path, start(0, 2), *computed(1, 2), regroup, *computed(3))
    assert (facts["attempts"], facts["regroups"], facts["workers"], facts["steps_repeated"]) == (1, 1, [2, 1], 0)
    assert ledger(path, start(0, 2), *computed(1, 2), regroup, *computed(2, 3))["steps_repeated"] == 1
    assert summarise_ledger(tmp_path / "none.jsonl")["attempts"] == 0


def test_lines_cut_short_by_a_crash_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    whole = '{"step": 1, "values": {"a": 1}}\n'
    for torn in ('{"st', '{"step": 2, "values": {"a": 1}', "\0\0\0", '{"step": 3}'):
        path.write_text(whole + torn)
        assert [line["step"] for line in read_lines(path)] == [1], torn
        path.write_text(whole + torn + "\n" + whole)  # ended by the next writer
        assert [line["step"] for line in read_lines(path) if line["step"] != 3] == [1, 1], torn
    path.write_bytes(whole.encode() + b"\xff\xfe\n" + whole.encode())
    assert len(read_lines(path)) == 2


def test_a_run_whose_ledger_was_torn_goes_on(tmp_path, undisturbed, ards_data):
    killed(RECIPE, ards_data, tmp_path, 4)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"attempt": 0, "step": 5, "lo')
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows())
    assert (result["attempts"], result["gaps"], result["steps_repeated"]) == (2, 0, 1)
    assert result["weights_sha256"] == undisturbed[1]["weights_sha256"]


# starting from another run's weights


def parent_of(recipe: Recipe, data: Path, directory: Path, **changes: Any) -> Path:
    """A finished run of `recipe`, untrained, whose spec has `changes`."""
    job = find_task(recipe.task)
    spec = {**job.load(data, "train", recipe.data, None).spec, **changes}
    write_model(directory / "model", job.model(override(recipe, {"seed": 7}), spec).state_dict(), recipe, spec)
    return directory


def child_of(recipe: Recipe, data: Path) -> tuple[Any, dict[str, Any]]:
    job = find_task(recipe.task)
    spec = job.load(data, "train", recipe.data, None).spec
    return job.model(recipe, spec), spec


COVIDNET = shipped_recipe("covidnet", smoke=True)


def test_the_same_classes_inherit_every_layer(covidnet_data, tmp_path):
    parent = parent_of(COVIDNET, covidnet_data, tmp_path)
    child, spec = child_of(COVIDNET, covidnet_data)
    inherit(child, parent, spec)
    theirs = load_file(parent / "model" / "model.safetensors")
    assert all(torch.equal(theirs[name], tensor) for name, tensor in child.state_dict().items())


@pytest.mark.parametrize("classes", [["a", "b"], ["COVID-19", "normal", "pneumonia"]])
def test_other_classes_keep_a_new_head(classes, covidnet_data, tmp_path):
    """Also as many classes in another order: a head that fits by shape would name them wrongly."""
    parent = parent_of(COVIDNET, covidnet_data, tmp_path, classes=classes)
    child, spec = child_of(COVIDNET, covidnet_data)
    fresh = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    inherit(child, parent, spec)
    theirs = load_file(parent / "model" / "model.safetensors")
    for name, tensor in child.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith("head.") else theirs[name]), name


@pytest.mark.parametrize(
    ("settings", "layer"), [({"model.hidden": 8}, "cell.weight_ih_l0"), ({"model.layers": 2}, "cell.weight_ih_l1")]
)
def test_weights_that_do_not_fit_are_refused_by_layer(settings, layer, ards_data, tmp_path):
    parent = parent_of(RECIPE, ards_data, tmp_path / "parent")
    child, spec = child_of(override(RECIPE, settings), ards_data)
    before = weights_sha256(child)
    with pytest.raises(DataError, match=r"do not fit") as caught:
        inherit(child, parent, spec)
    assert layer in caught.value.why and "gru" in caught.value.do and caught.value.exit_code == 2
    assert weights_sha256(child) == before


def test_a_parent_of_another_task_is_refused(ards_data, covidnet_data, tmp_path):
    parent = parent_of(COVIDNET, covidnet_data, tmp_path / "parent")
    child, spec = child_of(RECIPE, ards_data)
    with pytest.raises(DataError, match="cxr-frontal-u8"):
        inherit(child, parent, spec)


def test_a_run_starts_from_its_parent_only_when_it_has_no_checkpoint(undisturbed, ards_data, tmp_path):
    first = Rows()
    result = execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, first, parent=undisturbed[0])
    assert result["weights_sha256"] != undisturbed[1]["weights_sha256"]
    fresh = Rows()
    (tmp_path / "fresh").mkdir()
    execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path / "fresh", fresh)
    assert first.rows[0]["train/loss"] < fresh.rows[0]["train/loss"]
    assert execute(RECIPE, *load_samples(RECIPE, ards_data), tmp_path, Rows(), parent=tmp_path / "gone")["steps"] == 6


def test_models_that_are_not_there_or_damaged(undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="no trained model yet"):
        read_model(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "run" / "model" / name).write_bytes((undisturbed[0] / "model" / name).read_bytes()[:-9])
    (tmp_path / "run" / "model" / "model.json").write_bytes((undisturbed[0] / "model" / "model.json").read_bytes())
    with pytest.raises(DataError, match="could not be read as safetensors"):
        read_model(tmp_path / "run")


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "note.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": object()})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]
