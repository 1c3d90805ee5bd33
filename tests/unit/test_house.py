"""The rules of the house (docs: the picture of the rooms) as tests over the source text."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import raylab
from jobs.cli import VERBS

ROOT = Path(__file__).parents[2]
PACKAGES = ("raylab", "jobs", "tracking", "cluster")

# Each room of the library, and those whose modules it may import beside its own
ROOMS: dict[str, set[str]] = {}
for _room, _more in {
    "errors": "",
    "files loopback interfaces scratch documents score storage processes memory energy": "errors",
    "work": "energy",
    "witness": "memory",
    "config": "files",
    "physiology": "config",
    "data": "",
    "data.lung": "physiology data",
    "data.icu": "data.lung",
    "data.images": "data",
    "models": "config",
    "evaluation": "data.icu data.images models",
    "tasks": "evaluation",
    "training": "tasks",
    "federation": "training",
    "distributed": "training witness interfaces work",
}.items():
    _below = {"errors", "files", "documents", "memory", "score", "storage"}.union(
        *({name} | ROOMS[name] for name in _more.split())
    )
    ROOMS |= dict.fromkeys(_room.split(), _below)


SMALL = {
    "errors",
    "files",
    "storage",
    "documents",
    "score",
    "loopback",
    "interfaces",
    "memory",
    "scratch",
    "processes",
    "__version__",
}
"""what tracking and cluster may import"""


def room(module: str) -> str:
    """`data.icu` of `raylab.data.icu.labels`, `data` of `raylab.data.splits`, `errors` of `raylab.errors`."""
    first, *rest = module.split(".")[1:3]
    return f"{first}.{rest[0]}" if rest and f"{first}.{rest[0]}" in ROOMS else first


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for package in PACKAGES for path in files(package)}


TREES = trees()


def name(path: Path) -> str:
    """`raylab.data.icu.prepare` of raylab/data/icu/prepare.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, lazy: bool = True) -> Iterator[str]:
    """Full names of what a file imports; without `lazy`, of what it imports as soon as it is imported itself."""
    inside = {
        id(node)
        for function in ast.walk(TREES[path])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(function, ast.If) and ast.unparse(function.test) == "TYPE_CHECKING")
        for node in ast.walk(function)
    }
    for node in ast.walk(TREES[path]):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of(path: Path, package: str) -> set[str]:
    """The modules of `package` that a file imports, without the package's name."""
    return {what.split(".")[1] for what in imports(path) if what.startswith(f"{package}.")}


def test_the_library_has_these_rooms_and_no_others():
    found = {room(name(path)) for path in files("raylab") if path != ROOT / "raylab" / "__init__.py"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("path", files("raylab"), ids=name)
def test_imports_of_the_library_point_one_way(path):
    library = {what for what in imports(path) if what.startswith("raylab.")}
    above = {what for what in imports(path) if what.split(".")[0] in {"jobs", "tracking", "cluster"}}
    if path == ROOT / "raylab" / "__init__.py":  # the one exception: lazy names for the functions behind the verbs
        assert not library
        assert above == {f"jobs.{verb}.{verb}" for verb in raylab.__all__}
        return
    assert not above
    mine = room(name(path))
    for what in library:
        assert room(what) in ROOMS[mine] | {mine}, f"{mine} imports {what}"


@pytest.mark.parametrize("package", ["tracking", "cluster"])
def test_tracking_and_cluster_know_nothing_of_models(package):
    others = {"tracking", "cluster", "jobs"} - {package}
    for path in files(package):
        assert of(path, "raylab") <= SMALL, path
        assert not [what for what in imports(path) if what.split(".")[0] in others], path


def test_only_tests_know_the_test_cluster():
    """A site is data: what a test cluster has of its own stands in sites.toml."""
    for path in TREES:
        if ROOT / "cluster" / "testbed" not in path.parents:
            assert not [what for what in imports(path) if what.startswith("cluster.testbed")], path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "raylab":
            module = importlib.import_module(node.module or "")
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), (node.module, name)


def test_ray_is_imported_in_one_room_and_lazily_by_jobs():
    """What sets Ray's environment runs before Ray is imported, and a run without Ray never pays for it."""

    def imported(path: Path, lazy: bool) -> bool:
        return any(
            what.split(".")[0] == "ray" or what.startswith("raylab.distributed.") for what in imports(path, lazy)
        )

    for path in TREES:
        package = path.relative_to(ROOT).parts[0]
        if ROOT / "raylab" / "distributed" in path.parents:
            continue
        if path == ROOT / "cluster" / "provider.py":  # Ray's autoscaler imports it, and nothing else does
            continue
        assert not imported(path, lazy=package in {"raylab", "tracking"}), path


def test_only_evaluation_names_the_test_split():
    """`prepare` of images takes a list of it, `predict` writes rows of any split, `demo` calls evaluate, `benchmark`
    scores the winners of its nested searches, `overlap` compares identifiers, `compare` reads the predictions that
    `evaluate` has kept; nothing that trains sees it."""
    allowed = {"raylab/evaluation/overlap.py", "raylab/tasks/images.py"} | {
        f"jobs/{verb}.py" for verb in ("evaluate", "predict", "compare", "demo", "common/benchmark_icu")
    }
    naming = {
        str(path.relative_to(ROOT))
        for path, tree in TREES.items()
        if any(isinstance(node, ast.Constant) and node.value == "test" for node in ast.walk(tree))
    }
    assert {path for path in naming if not path.startswith(("raylab/data/", "tracking/"))} <= allowed
    assert "jobs/evaluate.py" in naming, "this test looks at nothing"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module(verb):
    path = ROOT / "jobs" / f"{verb}.py"
    assert path.is_file()
    body = TREES[path].body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in functions["arguments"].args.args] == ["parser"]
    assert [a.arg for a in functions["main"].args.args] == ["args"]
    constants = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    assert ast.literal_eval(constants["EXAMPLE"]).startswith(f"raylab {verb}")
    assert isinstance(body[-1], ast.If), "python -m jobs.VERB is what `ray job submit` runs"


LONG = 15  # lines; shorter ones may speak for themselves


def public(body: list[ast.stmt]) -> list[ast.FunctionDef | ast.ClassDef]:
    found = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [node for node in found if not node.name.startswith("_")]


@pytest.mark.parametrize("path", files("raylab"), ids=name)
def test_what_is_public_and_long_has_a_docstring(path):
    """Modules too. `read` of a source is what its module's docstring is about."""
    tree = TREES[path]
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{path} has no docstring"
    top = public(tree.body)
    methods = [method for node in top if isinstance(node, ast.ClassDef) for method in public(node.body)]
    source = path.parent.name == "sources"
    for node in [node for node in top if not (source and node.name == "read")] + methods:
        assert ast.get_docstring(node) or node.end_lineno - node.lineno <= LONG, f"{path}:{node.lineno} {node.name}"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for path in (ROOT / line for line in listed.stdout.split("\0") if line) if path.is_file()]


MACHINE = re.compile(r"(?<![\w.$}~>])/" + r"(work|home|root|Users|nobackup)/[\w.]")
REGISTRY = re.compile(r"https?://[^\s\"')]*" + r"(pypi|/simple\b|artifactory|nexus|registry)")


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["a machine's path", "a registry's address"])
def test_tracked_files_hold_nothing_of_one_machine(pattern):
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for():
    for text in ('"/' + 'work/main"', "cd /" + "home/someone", "=/" + "root/.cache"):
        assert MACHINE.search(text), text
    for text in ("$HOME/" + "work/x", "~/" + "home/x", "shared/" + "work/x"):
        assert not MACHINE.search(text), text
    assert REGISTRY.search("https:" + "//py" + "pi.org/simple")
