"""raylab verify: check a finished run against its ledger, and compute random intervals of it again, to the bit."""

import argparse
import random
import secrets
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, provenance
from jobs.common.console import say, set_status
from jobs.common.disk_use import measure
from jobs.common.environment import verb_environment
from jobs.common.results import RunReference, find_run
from jobs.rerun import compare_environment
from raylab.documents import read_json
from raylab.errors import DataError, UsageError
from raylab.tasks import find_task
from raylab.tasks.recipes import read_recipe
from raylab.training import checkpoint, ledger
from raylab.training.run_result import FILE as RESULT
from raylab.training.run_result import read_result

EXAMPLE = "raylab verify NAME --samples 5"
SAMPLES = 3


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", help="name, MLflow run id or directory of a finished run")
    text = f"intervals between checkpoints to compute again (default: {SAMPLES}; 0: check the chain alone)"
    parser.add_argument("--samples", type=int, default=SAMPLES, metavar="K", help=text)
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared directory (default: the run's)")
    text = "head of the ledger's chain, from a figure or from MLflow (default: the run's own record)"
    parser.add_argument("--head", metavar="SHA256", help=text)
    text = "seed of the choice of intervals (default: drawn, and printed)"
    parser.add_argument("--seed", type=int, metavar="N", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    return verify(args.name, samples=args.samples, data=args.data, head=args.head, seed=args.seed, quiet=args.quiet)


@verb_environment()
def verify(
    run: RunReference,
    *,
    samples: int = SAMPLES,
    data: Path | str | None = None,
    head: str | None = None,
    seed: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Check the chain of a finished run's ledger, its repeated steps, kept checkpoints and model, and compute up to
    `samples` intervals between checkpoints again.

    `head`: what the chain must end with; one that was published with a figure binds whoever has the run's directory.
    `seed`: of the choice of intervals. Returns {"run", "is_valid", "problems", "chain", "checkpoints", "intervals",
    "covered_steps", "steps", "seed", "differences", "exit_code": 0 or 1}. Raises DataError or UsageError if the run
    cannot be verified at all.
    """
    if samples < 0:
        raise UsageError("--samples takes a number from 0 up", do=f"--samples {SAMPLES}")
    directory = find_run(run)
    record = home.note(directory)
    if record.kind == "federate":
        raise UsageError(
            f"{directory.name} was trained across sites: its steps need the rows of all of them",
            "with a privacy budget its noise was secret, and no seed gives it again",
            "without one, where the data of all sites may be in one place: raylab federate pool",
        )
    if record.kind not in ("train", "transfer"):
        raise UsageError(f"{directory.name} is a run of '{record.kind}'; train and transfer keep a ledger of steps")
    if not (directory / RESULT).is_file():
        raise DataError(f"run {directory.name} has not finished", do=f"raylab resume {directory.name}")
    from raylab.training import verify as verifying  # loads torch
    from raylab.training.run import hash_recipe

    result, content = read_result(directory), ledger.read_content(directory / ledger.FILE)
    chain = ledger.follow_chain(content)
    claims = verifying.read_claims(ledger.read_ledger(directory / ledger.FILE))
    problems = check_chain(chain, content, head, result.get("ledger_sha256"))
    problems += [*claims.contradictions, *verifying.check_model(directory, claims)]
    recipe, place = read_recipe(directory / "recipe.json"), Path(data or record.data).absolute()
    if find_task(recipe.task).read_meta(place).data_hash != record.data_hash:
        raise DataError(f"{place} is not the data of {directory.name}", "its data hash differs", "give --data DIR")
    document = read_json(directory / "recipe.json", dict, "restore it: the run itself writes it")
    if claims.recipes and hash_recipe(document) not in claims.recipes:
        problems.append("recipe.json is not the recipe that the ledger names")
    kept = checkpoint.list_checkpoints(directory / "checkpoints")
    steps = [int(path.name.removeprefix("step-")) for path in kept if checkpoint.is_valid(path)]
    possible = verifying.list_intervals(claims.states, steps)
    seed = secrets.randbelow(2**31) if seed is None else seed
    chosen = sorted(random.Random(seed).sample(possible, min(samples, len(possible))))
    done: list[dict[str, Any]] = []
    if chosen:
        verifier = verifying.Verifier(directory, recipe, place, home.require_parent(record))
        for interval in chosen:
            set_status(f"computing steps {interval.start + 1} to {interval.stop} again")
            difference = verifier.check(interval, claims)
            done.append({"from": interval.start, "to": interval.stop, "difference": difference})
            if difference is not None:
                problems.append(f"interval {interval.start} to {interval.stop}: {difference}")
            elif not quiet:
                say(f"steps {interval.start + 1} to {interval.stop}: the same to the bit")
    bytes_kept = sum(measure(one).bytes for one in kept)
    differences = compare_environment(provenance.describe(directory))
    out = {
        "run": directory.name,
        "is_valid": not problems,
        "problems": problems,
        "chain": {"head": chain.head, "lines": chain.lines, "unchained": chain.unchained},
        "checkpoints": {"kept": len(kept), "bytes": bytes_kept, "in_ledger": len(claims.states)},
        "intervals": done,
        "possible_intervals": len(possible),
        "covered_steps": sum(interval.stop - interval.start for interval in possible),
        "steps": result["steps"],
        "seed": seed,
        "differences": differences,
        "exit_code": 1 if problems else 0,
    }
    if not quiet:
        tell(out)
    return out


def check_chain(chain: ledger.Chain, content: bytes, head: str | None, recorded: str | None) -> list[str]:
    """What is wrong with a chain whose head must be `head`, else the `recorded` one."""
    problems = []
    if chain.broken:
        lines = ", ".join(map(str, chain.broken[:5]))
        problems.append(f"the chain of the ledger is broken at line {lines}: it, or one before, was changed")
    if not content.endswith(b"\n"):
        problems.append("the last line of the ledger is cut off")
    expected = head or recorded
    if expected is not None and chain.head != expected:
        problems.append(f"the ledger ends with {chain.head[:16]}, not with {expected[:16]}")
    return problems


def tell(out: dict[str, Any]) -> None:
    """Print what was verified, what could have been, and what is wrong."""
    chain, kept, possible = out["chain"], out["checkpoints"], out["possible_intervals"]
    say(f"ledger: {chain['lines']} lines, chain {chain['head'][:16]}")
    if chain["unchained"]:
        say(f"  {chain['unchained']} lines of an earlier version have no chain of their own")
    say(f"checkpoints: {kept['kept']} kept ({kept['bytes'] / 1e6:.1f} MB), {kept['in_ledger']} in the ledger")
    say(f"intervals: {len(out['intervals'])} computed again of {possible} possible, which cover "
        f"{out['covered_steps']} of {out['steps']} steps (seed {out['seed']})")  # fmt: skip
    if out["covered_steps"] < out["steps"]:
        say("  for more: keep more checkpoints, --set loop.max_checkpoints=N")
    for line in out["problems"]:
        say(f"PROBLEM: {line}")
    for line in out["differences"] if out["problems"] else ():
        say(f"  differs from the run, and may be the reason: {line}")
    say("valid" if out["is_valid"] else "NOT valid")


if __name__ == "__main__":
    sys.exit(cli.main(["verify", *sys.argv[1:]]))
