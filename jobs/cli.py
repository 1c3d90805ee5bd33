"""The command line: `raylab VERB ...` or `python -m jobs.VERB ...`.

A verb is a module of this package with `arguments(parser)`, which adds its options, a working EXAMPLE, and
`main(args) -> dict`, whose result `--json FILE` writes. Exit codes: 0 success, 1 a run failed, 2 usage or data error.
"""

import argparse
import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.common import console
from jobs.common.console import say
from jobs.common.interrupts import handle_interrupts, ignore_interrupts
from raylab import __version__
from raylab.errors import RaylabError, UsageError, unknown
from raylab.files import write_json
from raylab.memory import explain_memory_error
from raylab.storage import explain_storage_error

GROUPS = {
    "data": {
        "prepare": "create a checked data directory from raw tables or images",
        "concepts": "print the intensive-care concepts: units, ranges, source ids, coverage in a prepared directory",
    },
    "training": {
        "recipe": "print the fields of a recipe with their values and descriptions",
        "train": "train a model on N or MIN:MAX workers, or in this process without Ray",
        "transfer": "train from the weights of another run: a linear probe, then fine-tuning",
        "tune": "search hyperparameters",
        "resume": "resume an interrupted run or search, to the same result",
        "federate": "train one model at several sites whose data stays there, by files in a directory",
        "rerun": "train the run behind a figure, a report or a name again, and compare the weights to the bit",
        "verify": "check a finished run against its ledger, and compute random intervals of it again, to the bit",
        "warm": "keep a Ray running, so that later commands start sooner",
    },
    "models": {
        "evaluate": "score a run on a split of its own or of other data, with intervals",
        "export": "write a run's model, or an experiment, as one file for others that holds no patient",
        "predict": "write a run's probabilities for every stay or image to a parquet file",
        "explain": "plot which hours and features, or which pixels of a section, influence a network's predictions",
        "benchmark": "compare all models of a task on the same splits, or measure how it scales with its workers",
        "models": "list image networks with parameters, MACs and images/s, next to the published figures",
    },
    "runs": {
        "runs": "list the runs of this home with their status, their score, and the command that comes next",
        "compare": "print a table of tracked runs, or differences between runs, and write an HTML report",
        "ui": "serve MLflow on loopback, accessible only to you, and print a link",
        "sync": "send records that are waiting on disk to MLflow, and mark runs whose process was killed",
        "rm": "print what runs occupy on disk, and remove runs or parts of them",
    },
    "clusters": {
        "cluster": "manage a Ray cluster on Slurm: up, status, down, submit, ...",
        "site": "write a site section from what Slurm says, and check it",
        "doctor": "check whether clusters can run at a site",
        "estimate": "say what a run or search will cost, from 20 measured steps, and whether the budget suffices",
        "cost": "print what runs have cost: the bills of their Slurm jobs, divided among them exactly",
        "notebook": "write a Jupyter kernel with the modules, the environment and the home of a site",
    },
    "the lung model": {
        "simulate": "sweep the lung model over parameters, or plot one virtual patient",
        "fit": "fit the lung model to the blood gases of every stay, with posterior widths",
    },
    "raylab itself": {
        "demo": "run the whole workflow, from data to comparison",
        "completion": "print the shell script that completes verbs, options, runs, recipe fields and models",
    },
}
PLUGIN_VERBS = (
    "prepare", "recipe", "train", "transfer", "tune", "resume", "evaluate", "predict", "explain", "benchmark",
    "compare", "estimate", "fit", "runs", "rerun", "verify", "export",
)  # fmt: skip
"""those that read names of tasks, models or sources"""
CONTINUE = {
    **dict.fromkeys(("train", "transfer", "tune", "resume"), "; to continue it: raylab resume NAME"),
    **dict.fromkeys(("simulate", "benchmark", "rerun"), "; the same command continues it"),
}
"""what is said after an interruption of a verb whose work can be continued"""
VERBS = {verb: text for group in GROUPS.values() for verb, text in group.items()}

STDOUT = Path("-")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # in LANG=C and the like: what it cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    if not words or words[0] in {"-h", "--help"}:
        say("usage: raylab VERB ...   (raylab VERB --help shows an example)")
        for group, verbs in GROUPS.items():
            say(f"\n{group}")
            say("\n".join(f"  {verb:10} {text}" for verb, text in verbs.items()))
        return 0 if words else 2
    if words[0] == "--version":
        say(__version__)
        return 0
    try:
        code = run(words[0], words[1:])
    except (Exception, KeyboardInterrupt) as error:
        code = explain_end(error, words[0])
    finally:
        console.flush_output()
    if console.lost is not None and code == 0 and (failure := console.explain_lost_output(console.lost)):
        code = explain_end(failure, words[0])
    end_stuck_ray(code)
    return code


def end_stuck_ray(code: int) -> None:
    """End this process with `code` if it has used a Ray that does not end (session.py)."""
    if session := sys.modules.get("jobs.common.session"):
        session.exit_if_stuck(code)


def explain_end(error: BaseException, verb: str) -> int:
    """Say on standard error why a verb ended with `error`; returns the exit code. Raises an error in the program."""
    if isinstance(error, KeyboardInterrupt):
        ignore_interrupts()  # all that is left to do is to exit
        console.tell_error(f"interrupted{CONTINUE.get(verb, '')}")
        return 130
    from raylab.tasks.plugin_code import explain_own_error  # imported late, to keep `raylab --help` fast

    explained = error if isinstance(error, RaylabError) else explain_memory_error(error) or explain_storage_error(error)
    explained = explained or explain_own_error(error)
    if explained is None:
        raise error
    console.tell_error(explained)
    return explained.exit_code


def add_common_options(parser: argparse.ArgumentParser, **default: Any) -> None:
    """Add the common options. A verb with subcommands adds them to each, with default=argparse.SUPPRESS."""
    where = "write the result to FILE; without FILE, print it and nothing else"
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help=where, **default)
    parser.add_argument("--quiet", action="store_true", help="print only the result, no progress", **default)


def build_parser(verb: str) -> tuple[argparse.ArgumentParser, ModuleType]:
    """The parser of a verb and the verb's module."""
    parser = argparse.ArgumentParser(
        prog=f"raylab {verb}",
        description=VERBS[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module = add_arguments(parser, verb)
    parser.epilog = f"example:\n  {module.EXAMPLE}"
    return parser, module


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> ModuleType:
    """Add all arguments of a verb to a parser; returns the verb's module."""
    module = importlib.import_module(f"jobs.{verb}")
    module.arguments(parser)
    if verb in PLUGIN_VERBS:
        add_plugin_option(parser)
    add_common_options(parser)
    return module


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    text = "Python file with own models, sources or tasks; repeat for more. Its code is executed (docs/extend.md)"
    parser.add_argument("--plugin", type=Path, action="append", default=[], metavar="FILE", help=text)


def load_plugins(words: list[str]) -> None:
    """Load the plugins of installed packages, and those that `--plugin` names, before a verb lists what there is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_option(parser)
    from raylab.tasks import load_installed  # which reads all tasks
    from raylab.tasks.plugins import load_file

    load_installed()
    named: dict[str, Path] = {}
    for path in parser.parse_known_args(words)[0].plugin:
        if named.setdefault(path.name, path) != path:
            raise UsageError(f"two plugins have the name {path.name}: {named[path.name]} and {path}", do="rename one")
        load_file(path)


def run(verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS)
    with console.open_screen("--quiet" in words, f"{verb}: starting"):  # some verbs load torch, which takes seconds
        if verb in PLUGIN_VERBS:
            load_plugins(words)
        parser, module = build_parser(verb)
    args = parser.parse_args(words)
    vars(args).pop("plugin", None)  # they are loaded
    from jobs.common.environment import verb_environment  # imported late, to keep `raylab --help` fast

    handle_interrupts()
    with verb_environment():
        return _run(module, args)


def _run(module: ModuleType, args: argparse.Namespace) -> int:
    """Run a verb, write or print its result, and return the exit code."""
    from jobs.common import outputs

    if args.json not in (None, STDOUT):
        outputs.check(args.json, "--json", "result")
    args.quiet = args.quiet or args.json == STDOUT  # so that a program can read what is printed
    result: dict[str, Any] = module.main(args)
    if args.json == STDOUT:
        say(json.dumps(result, indent=1))
    elif args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, result)
        except OSError:  # it could be written when the verb began
            say(json.dumps(result, indent=1))
            raise
    elif args.quiet:
        say(json.dumps(result))
    return int(result.get("exit_code", 0))


if __name__ == "__main__":
    sys.exit(main())
