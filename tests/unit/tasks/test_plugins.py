"""Own models from files and packages: known by name, stored with what uses them, and never executed unasked."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs import cli
from jobs.common.run_end import describe_end
from raylab.config.overrides import override
from raylab.config.recipe import CXR_FRONTAL, FAMILIES, ICU_HOURLY
from raylab.errors import UsageError
from raylab.models import MODELS
from raylab.tasks import TASKS, find_task, plugin_code, plugins
from raylab.tasks.recipe_page import lines
from raylab.tasks.recipes import parse_recipe, read_recipe, shipped_recipe, with_search_space
from raylab.training.run import read_model, write_model
from raylab.training.run_failure import explain_own_failure

MODEL = '''
from typing import Literal
from pydantic import Field
from torch import nn
from raylab.config.recipe import NetworkModel, Search
from raylab.tasks.plugins import OwnModel, Plugin

class Settings(NetworkModel):
    name: Literal["tiny"]
    """name of the model"""
    width: int = Field(8, ge=1)
    """units of the only layer"""
    slope: float = Field(0.1, gt=0)
    """of negative values"""

class Tiny(nn.Module):
    def __init__(self, settings, spec, outputs):
        super().__init__()
        self.body = nn.LazyLinear(settings.width)
        self.slope = settings.slope
        self.head = nn.Linear(settings.width, outputs)
        self(__import__("torch").zeros(1, spec["hours"], 3 * len(spec["features"]) + len(spec["static"])))

    def forward(self, x):
        return self.head(nn.functional.leaky_relu(self.body(x[:, -1]), self.slope))

PLUGIN = Plugin(models=(OwnModel(Settings, Tiny, search=Search(space={"model.width": "randint(2,9)"})),))
'''
SPEC = {"kind": ICU_HOURLY, "classes": ["no", "yes"], "features": ["hr", "map"], "static": ["age"], "hours": 12}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Nothing is allowed before, and nothing stays loaded."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    for found in list(plugins._loaded.values()):
        plugins._remove(found)
    plugins._named.clear()


def write(path: Path, text: str = MODEL) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def tiny(tmp_path):
    return plugins.load_file(write(tmp_path / "tiny.py"))


def test_an_own_model_has_its_fields_in_recipe_and_help(tiny):
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny", "model.width": 5})
    assert recipe.model.width == 5 and recipe.model.slope == 0.1 and recipe.model.dropout == 0.5
    assert any(line.startswith("model.slope") and line.endswith("of negative values") for line in lines(recipe))
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    with pytest.raises(UsageError, match=r"model\.width: Input should be greater than or equal to 1, got 0"):
        override(recipe, {"model.width": 0})
    with pytest.raises(UsageError, match="the model tiny has no field 'hidden'"):
        override(recipe, {"model.hidden": 8})
    with pytest.raises(UsageError, match="the model gru has no field 'slope'") as error:
        override(shipped_recipe("ards"), {"model.slope": 1})
    assert error.value.why == "models that have it: tiny"


def test_a_field_without_a_description_has_that_of_the_class_above(tmp_path):
    plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace('    """name of the model"""\n', "")))
    shown = lines(override(shipped_recipe("ards"), {"model.name": "tiny"}))
    assert any(line.startswith("model.name") and line.endswith("name of the model") for line in shown)


def test_its_search_is_that_of_the_plugin(tiny):
    recipe = with_search_space(override(shipped_recipe("ards"), {"model.name": "tiny"}))
    assert recipe.search.space == {"model.width": "randint(2,9)"}


def test_without_a_search_of_its_own_it_is_searched_by_the_fields_that_it_has(tmp_path):
    plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace(", search=Search", ", search=None and Search")))
    recipe = with_search_space(override(shipped_recipe("ards"), {"model.name": "tiny"}))
    assert set(recipe.search.space) == {"optim.lr", "optim.weight_decay", "model.dropout"}
    assert [set(point) for point in recipe.search.points] == [set(recipe.search.space)]


def test_its_network_is_built_from_its_settings(tiny):
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny", "model.width": 5, "model.members": 2})
    model = find_task("ards").model(recipe, SPEC)
    assert model(torch.zeros(3, 12, 7)).shape == (3, 2, 1)
    assert model.members[0].head.in_features == 5


def test_a_model_of_images_is_one_of_the_tasks_on_images(tmp_path):
    text = MODEL.replace("OwnModel(Settings, Tiny,", f"OwnModel(Settings, Tiny, inputs={CXR_FRONTAL!r},")
    plugins.load_file(write(tmp_path / "tiny.py", text))
    assert override(shipped_recipe("covidnet"), {"model.name": "tiny"}).model.width == 8
    assert override(shipped_recipe("covidnet"), {"model.name": "resnet18"}).model.name == "resnet18"
    with pytest.raises(UsageError, match="unknown ards model 'tiny'"):
        override(shipped_recipe("ards"), {"model.name": "tiny"})


BAD_NETWORKS = {
    "return self.head(": ("return self.head(x[:, 99, :8] + ", "does not work on inputs of shape (2, 12, 7): line "),
    "self.head(nn.": ("(nn.", "returned (2, 8) for 2 rows and 1 outputs"),
    "self.slope = settings.slope": ("self.slope = settings.steepness", "AttributeError: 'Settings' object has no"),
}


@pytest.mark.parametrize("old", BAD_NETWORKS)
def test_a_network_that_cannot_be_trained_is_refused_before_the_run(old, tmp_path):
    new, said = BAD_NETWORKS[old]
    text = MODEL.replace(old, new).replace("        self(__import__", "        # self(__import__")
    plugins.load_file(write(tmp_path / "tiny.py", text))
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny"})
    samples = SimpleNamespace(spec=SPEC, batch=lambda index: torch.zeros(len(index), 12, 7))
    with pytest.raises(UsageError) as error:
        plugins.check_network(find_task("ards"), recipe, samples)
    assert said in f"{error.value.what}: {error.value.why}"


def test_a_change_of_the_file_replaces_what_it_was(tiny, tmp_path):
    changed = plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace("Field(8, ge=1)", "Field(9, ge=1)")))
    assert changed.version != tiny.version
    assert override(shipped_recipe("ards"), {"model.name": "tiny"}).model.width == 9
    assert sum(family.__name__ == "Settings" for family in FAMILIES[ICU_HOURLY]) == 1


WRONG = {
    "PLUGIN = ": ("MINE = ", "has no PLUGIN"),
    "from torch import nn": ("from torch import absent", "line 4: ImportError: cannot import name 'absent'"),
    "class Tiny(nn.Module):": ("class Tiny(nn.Module)", "line 16: expected ':'"),
    'Literal["tiny"]': ("str", "cannot be the settings of a model"),
    '["tiny"]': ('["gru"]', "the model 'gru' is taken"),
    "Field(8, ge=1)": (
        "Field(0, ge=1)",
        "the defaults of Settings are invalid\n  why:  width: Input should be greater",
    ),
    "OwnModel(Settings, Tiny,": ("OwnModel(Settings, Tiny, inputs='icu',", "unknown kind of inputs 'icu'"),
    "(Settings, Tiny,": ("(Settings, Tiny, [],", "line 27: TypeError: `inputs` must be the name of a kind of inputs"),
    "Settings, Tiny,": ("Settings, 'Tiny',", "line 27: TypeError: `build` must be a class or function, not 'Tiny'"),
    "search=Search(space=": ("search=dict(space=", "TypeError: `search` must be a raylab.config.recipe.Search"),
    "})),))": ("}))))", "line 27: TypeError: `models` must be a tuple of OwnModel, as (ONE,), not OwnModel("),
    "Plugin(models=": ("Plugin(sources=", "line 27: TypeError: `sources` must be {name: function}"),
    "PLUGIN = Plugin(models": ("PLUGIN = Plugin(tasks", "line 27: TypeError: `tasks` must be a tuple of Task"),
    "from pydantic import Field": ("from pydantic import Field; import sys; sys.exit(3)", "line 3: SystemExit: 3"),
    "class Settings": ("\0class Settings", "null bytes"),
}


@pytest.mark.parametrize("old", WRONG)
def test_a_wrong_file_is_refused_and_changes_nothing(old, tmp_path):
    before = {name: list(of) for name, of in FAMILIES.items()}, {name: dict(of) for name, of in MODELS.items()}
    new, said = WRONG[old]
    with pytest.raises(UsageError) as error:
        plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace(old, new)))
    assert said in str(error.value)
    assert before == (FAMILIES, MODELS)
    assert not plugin_code.allowed_file().exists()


FAILING = {
    "return 3": "returned int instead of SourceData",
    "return raw.absent": "failed (line 5: AttributeError)\n  why:  'Raw' object has no attribute 'absent'",
    "return SourceData(pl.DataFrame(), pl.DataFrame())": "(line 5: TypeError)\n  why:  `events` must be a polars Lazy",
}


@pytest.mark.parametrize("line", FAILING)
def test_code_that_fails_later_is_named_with_its_line(line, tmp_path, capsys):
    text = "import polars as pl\nfrom raylab.data.icu.concepts import SourceData\n"
    text += "from raylab.tasks.plugins import Plugin\n"
    text += f"def read(raw):\n    {line}\nPLUGIN = Plugin(sources={{'ward': read}})\n"
    plugins.load_file(write(tmp_path / "ward.py", text))
    words = ["--source", "ward", "--path", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["prepare", "ards", *words]) in (1, 2)
    said = capsys.readouterr().err
    assert FAILING[line] in said and "ward" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_message_of_an_error_in_a_plugin_is_shown_and_not_recorded(tmp_path):
    """It may have values of data."""
    fails = "        if self.training and len(x) > 1: raise KeyError('patient-17')\n        return self.head("
    plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace("        return self.head(", fails)))
    network = find_task("ards").model(override(shipped_recipe("ards"), {"model.name": "tiny"}), SPEC)
    with pytest.raises(KeyError) as raised:
        network(torch.zeros(3, 12, 7))
    told = explain_own_failure(raised.value)
    assert told.what == "the code of the plugin tiny.py failed (line 25: KeyError)" and told.why == "'patient-17'"
    assert "start another run" in told.do
    assert describe_end(raised.value, told) == ("FAILED", told.what, told.do)
    assert explain_own_failure(KeyError("not of a plugin")) is None


def test_a_wrong_change_leaves_what_was_loaded(tiny, tmp_path):
    with pytest.raises(UsageError, match="taken"):
        plugins.load_file(write(tmp_path / "tiny.py", MODEL.replace('["tiny"]', '["tiny", "gru"]')))
    assert override(shipped_recipe("ards"), {"model.name": "tiny"}).model.width == 8


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"the plugin .*/absent.py could not be read"):
        plugins.load_file(tmp_path / "absent.py")


def test_a_model_is_stored_with_its_code_and_needs_no_file(tiny, tmp_path):
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny"})
    network = find_task("ards").model(recipe, SPEC)
    write_model(tmp_path / "run" / "model", network.state_dict(), recipe, SPEC)
    (tmp_path / "tiny.py").unlink()
    forget()
    _, read, _, again = read_model(tmp_path / "run")
    assert read.model.name == "tiny"
    assert torch.equal(again.head.weight, network.head.weight)


def run_of_another(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose plugin this user has never named, and the file that would exist if it were executed."""
    executed = tmp_path / "executed"
    text = MODEL + f"\nopen({str(executed)!r}, 'w').close()\n"
    file = write(tmp_path / "run" / "plugins" / "tiny.py", text)
    recipe = {**shipped_recipe("ards").model_dump(mode="json"), "model": {"name": "tiny"}}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    return file, executed


def test_code_of_another_is_executed_only_when_it_is_named(tmp_path):
    file, executed = run_of_another(tmp_path)
    for _ in range(2):
        with pytest.raises(UsageError, match="is not executed unasked") as error:
            read_recipe(tmp_path / "run" / "recipe.json")
        assert f"--plugin {file}" in error.value.do and not executed.exists()
    with pytest.raises(UsageError, match="is not executed unasked"):
        write(tmp_path / "run" / "model" / "plugins" / "tiny.py", file.read_text())
        write(tmp_path / "run" / "model" / "model.json", json.dumps({"recipe": {}, "spec": {}}))
        read_model(tmp_path / "run")
    assert not executed.exists()
    plugins.load_file(file)
    forget()
    assert read_recipe(tmp_path / "run" / "recipe.json").model.name == "tiny" and executed.exists()


def test_code_that_changed_since_it_was_named_is_that_of_another(tmp_path):
    file, executed = run_of_another(tmp_path)
    plugins.load_file(file)
    forget()
    executed.unlink()
    file.write_text(file.read_text() + "# more\n")
    with pytest.raises(UsageError, match="is not executed unasked"):
        read_recipe(tmp_path / "run" / "recipe.json")
    assert not executed.exists()


def test_a_run_says_that_a_corrected_file_is_not_used(tmp_path, caplog):
    file, _ = run_of_another(tmp_path)
    plugins.load_file(file)
    read_recipe(tmp_path / "run" / "recipe.json")
    assert not caplog.messages
    corrected = write(tmp_path / "mine" / "tiny.py", MODEL + "\n# corrected\n")
    plugins.load_file(corrected)
    read_recipe(tmp_path / "run" / "recipe.json")
    assert caplog.messages == [f"{tmp_path}/run keeps the tiny.py with which it began, so {corrected} is not used"]


def test_a_list_that_others_can_write_allows_nothing(tmp_path):
    file, executed = run_of_another(tmp_path)
    plugins.load_file(file)
    assert plugin_code.allowed_file().stat().st_mode & 0o777 == 0o600
    forget()
    executed.unlink()
    plugin_code.allowed_file().chmod(0o666)
    with pytest.raises(UsageError, match="may be another user's"):
        read_recipe(tmp_path / "run" / "recipe.json")
    assert not executed.exists()


def test_other_processes_of_this_user_get_the_code_itself(tiny):
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny"})
    document, code = recipe.model_dump(mode="json"), [tuple(one) for one in plugins.code_of(recipe)]
    assert plugins.code_of(shipped_recipe("ards")) == []
    forget()
    with pytest.raises(UsageError, match="unknown ards model 'tiny'"):
        parse_recipe(document)
    plugins.load_all(code)
    assert parse_recipe(document).model.width == 8
    assert not any(line for line in plugin_code.read_allowed() if line != tiny.version)


def test_an_installed_package_needs_no_option(tmp_path, monkeypatch):
    write(tmp_path / "site" / "own_models.py")
    info = tmp_path / "site" / "own_models-1.2.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: own-models\nVersion: 1.2\n")
    write(info / "entry_points.txt", "[raylab]\nmine = own_models:PLUGIN\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(plugins, "_searched", False)
    recipe = override(shipped_recipe("ards"), {"model.name": "tiny"})
    assert plugins.versions(plugins.used_by(recipe)) == {"own-models": "1.2"} and plugins.code_of(recipe) == []


def test_a_package_that_does_not_load_is_named(tmp_path, monkeypatch):
    write(tmp_path / "site" / "own_models.py", "1 / 0")
    info = tmp_path / "site" / "own_models-1.2.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: own-models\nVersion: 1.2\n")
    write(info / "entry_points.txt", "[raylab]\nmine = own_models:PLUGIN\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    monkeypatch.setattr(plugins, "_searched", False)
    with pytest.raises(UsageError, match="the plugin of the package own-models could not be loaded"):
        find_task("ards")


def test_the_tasks_that_ship_are_those_that_are_tested():
    shipped = {"ards", "covidnet", "landcover", "landcover-multilabel", "mortality", "sections", "sections-pretraining"}
    assert set(TASKS) == {*shipped, "surrogate"}, "a plugin has stayed loaded"
