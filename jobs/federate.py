"""raylab federate: train one model at several sites whose data stays where it is, by files in a directory."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from jobs import cli
from jobs.common import home, outputs, run_tracking
from jobs.common.console import open_screen, say, set_status
from jobs.train import add_recipe_options, build_recipe, parse_settings
from raylab.documents import describe_problems
from raylab.errors import DataError, UsageError
from raylab.federation.arithmetic import LIMITS, pin
from raylab.tasks import find_task
from tracking.outbox import Outbox
from tracking.runs import PRIVACY

if TYPE_CHECKING:  # it needs the optional package cryptography
    from raylab.federation.agreement import Agreement, LocalSteps
    from raylab.federation.federation import Federation
    from raylab.federation.keys import PrivateKeys
    from raylab.federation.privacy import Privacy

DEFAULT_DELTA = 1e-5
EXAMPLE = "raylab federate run --exchange DIR --key north.key --data prepared/ards"


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="do", metavar="keys|agree|sign|run|pool", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        cli.add_common_options(one, default=argparse.SUPPRESS)
        return one

    keys = verb("keys", "make the keys of a site: NAME.key stays there, the other sites get NAME.public.json")
    keys.add_argument("--site", required=True, metavar="NAME", help="lower-case letters, digits, '-' and '_'")
    keys.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the two files")

    agree = verb("agree", "write an agreement of several sites into a new exchange directory, for all of them to sign")
    agree.add_argument("task", help="the task to train")
    add_exchange(agree)
    agree.add_argument("--sites", type=Path, nargs="+", required=True, metavar="FILE", help="NAME.public.json of each")
    agree.add_argument("--rows", type=int, nargs="+", required=True, metavar="N", help="rows of each site in a step")
    agree.add_argument(
        "--shards",
        type=int,
        nargs="+",
        metavar="N",
        help="shards into which each site's rows are cut (default: 1 each)",
    )
    agree.add_argument(
        "--local-steps", type=parse_local_steps, metavar="N|epoch",
        help="average the weights after so many steps that each site takes alone, and at the end of each epoch "
        "(default: every step is an exact sum over all sites)",
    )  # fmt: skip
    agree.add_argument(
        "--gradient-bound", type=float, metavar="B",
        help="exact sums: largest norm of the gradient of a shard's mean loss; larger ones are scaled down "
        "(default: 16; with a privacy budget, where a shard is a row, 1)",
    )  # fmt: skip
    agree.add_argument(
        "--epsilon", type=float, metavar="E",
        help="privacy budget of a patient: sites add noise, and do not start a run that would spend more (default: no "
        "noise)",
    )  # fmt: skip
    agree.add_argument(
        "--delta", type=float, metavar="D", help=f"of the privacy budget (default: {DEFAULT_DELTA:g})"
    )  # fmt: skip
    agree.add_argument(
        "--noise-multiplier", type=float, metavar="Z",
        help="with --epsilon: standard deviation of the noise divided by the gradient bound of a row",
    )  # fmt: skip
    agree.add_argument(
        "--colluding-sites", type=int, metavar="N",
        help="with --epsilon: how many sites may put together what they know (default: 1)",
    )  # fmt: skip
    agree.add_argument(
        "--cpu-capability", choices=tuple(LIMITS), default="avx2",
        help="vector instructions that all sites use (default: avx2)",
    )  # fmt: skip
    agree.add_argument(
        "--patience", type=float, default=3600.0, metavar="SECONDS",
        help="silence of a site after which the others go on without it (default: 3600)",
    )  # fmt: skip
    add_recipe_options(agree)

    sign = verb("sign", "print an agreement and sign it for a site")
    run = verb("run", "train as one site, to the end; the same command continues an interrupted run")
    for one in (sign, run):
        add_exchange(one)
        one.add_argument("--key", type=Path, required=True, metavar="FILE", help="NAME.key of this site")
    run.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared directory of this site")
    run.add_argument("--name", help="name of the run (default: made from task, site and agreement)")

    pool = verb("pool", "train on the data of all sites in this process, to compare: the same weights, to the bit")
    add_exchange(pool)
    pool.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="prepared directory of every site")
    pool.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the run; continued if it exists"
    )


def parse_local_steps(text: str) -> "LocalSteps":
    """A number of steps, or `epoch`."""
    if text != "epoch" and not text.isdecimal():
        raise UsageError(f"--local-steps {text}: neither a number of steps nor 'epoch'")
    return "epoch" if text == "epoch" else int(text)


def parse_privacy(args: argparse.Namespace) -> "Privacy | None":
    """The privacy budget that the options ask for; UsageError if they do not fit each other."""
    from raylab.federation.privacy import Privacy

    if args.epsilon is None:
        others = ("delta", "noise_multiplier", "colluding_sites")
        if given := [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) is not None]:
            raise UsageError(f"{', '.join(given)} without a privacy budget", do="give --epsilon too, or leave it out")
        return None
    if args.noise_multiplier is None:
        raise UsageError(
            "a privacy budget needs --noise-multiplier",
            "how much noise keeps the budget depends on the rows of each site, which nobody else knows",
            "try --noise-multiplier 1: `federate run` refuses too little noise before anything is sent, and says how "
            "much is enough",
        )
    try:
        return Privacy(
            epsilon=args.epsilon,
            delta=DEFAULT_DELTA if args.delta is None else args.delta,
            noise_multiplier=args.noise_multiplier,
            colluding_sites=1 if args.colluding_sites is None else args.colluding_sites,
        )
    except ValidationError as error:
        raise UsageError("this is not a privacy budget", describe_problems(error), "change the option") from error


def add_exchange(parser: argparse.ArgumentParser) -> None:
    text = "directory that all sites read and write, or that is copied between them"
    parser.add_argument("--exchange", type=Path, required=True, metavar="DIR", help=text)


def main(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "raylab federate needs the package cryptography", str(error), "pip install 'raylab[cryptography]'"
        ) from error
    do = {"keys": make_keys, "agree": write_agreement, "sign": sign_agreement, "run": run_site, "pool": run_pooled}
    return do[args.do](args)


def make_keys(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.federation.keys import write_keys

    outputs.check_directory(args.out, "--out")
    secret, public = write_keys(args.site, args.out)
    if not args.quiet:
        say(f"{secret}: keep it here; whoever has it can send messages as this site")
        say(f"{public}: for the other sites, by a way on which nobody can exchange it")
    return {"site": args.site, "key": str(secret), "public": str(public)}


def write_agreement(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.federation import agreement as agreements
    from raylab.federation.keys import read_identity

    outputs.check_directory(args.exchange, "--exchange")
    identities = [read_identity(path) for path in args.sites]
    recipe, privacy = build_recipe(args.task, parse_settings(args), None, args.smoke), parse_privacy(args)
    agreement = agreements.propose(
        recipe,
        identities,
        args.rows,
        args.shards or ([1] * len(identities) if privacy is None else args.rows),
        args.gradient_bound,
        args.cpu_capability,
        args.patience,
        args.local_steps,
        privacy,
    )
    path = agreements.write_agreement(agreement, args.exchange)
    if not args.quiet:
        tell_agreement(agreement)
        say(f"written to {path}; next, at every site: raylab federate sign --exchange {args.exchange} --key NAME.key")
    return {"agreement": agreement.sha256, "sites": list(agreement.names)}


def tell_agreement(agreement: "Agreement") -> None:
    from raylab.federation.agreement import PRIVATE_SITES

    recipe = agreement.parse_recipe()
    say(f"agreement {agreement.sha256}")
    say(f"{recipe.task}, model {recipe.model.name}, {recipe.loop.epochs} epochs, seed {recipe.seed}")
    for site in agreement.sites:
        say(f"  {site.site}: {site.rows} rows of a step in {site.shards} shard(s), key {site.signing_key[:16]}...")
    if agreement.privacy is not None:
        say(
            f"every step is a sum with noise over all sites, of gradients of rows up to norm {agreement.gradient_bound}"
        )
    elif agreement.local_steps is None:
        say(
            f"every step is an exact sum over all sites, of gradients of shards up to norm {agreement.gradient_bound:g}"
        )
    elif agreement.local_steps == "epoch":
        say("the weights are averaged at the end of each epoch")
    else:
        say(f"the weights are averaged after {agreement.local_steps} local steps, and at the end of each epoch")
    say(f"instructions {agreement.cpu_capability}, {agreement.patience_seconds:g} s of patience")
    if privacy := agreement.privacy:
        say(
            f"privacy budget of a patient: epsilon {privacy.epsilon:g}, delta {privacy.delta:g}; noise multiplier "
            f"{privacy.noise_multiplier:g}, even if {privacy.colluding_sites} of {len(agreement.sites)} sites collude"
        )
    if len(agreement.sites) < PRIVATE_SITES:
        say("two sites: each of them can subtract its own values from a sum, and so gets the other's")


def sign_agreement(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.federation import agreement as agreements
    from raylab.federation.keys import read_keys

    agreement, keys = agreements.read_agreement(args.exchange), read_keys(args.key)
    agreements.sign(agreement, keys, args.exchange)
    missing = agreements.find_unsigned(agreement, args.exchange)
    if not args.quiet:
        tell_agreement(agreement)
        say(
            f"signed by {keys.site}"
            + (f"; still to sign: {', '.join(missing)}" if missing else ", and so by all sites")
        )
    return {"agreement": agreement.sha256, "site": keys.site, "unsigned": missing}


def run_site(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.federation.keys import bind_data, read_keys

    keys = read_keys(args.key)
    agreement = read_signed(args.exchange)
    recipe, data = agreement.parse_recipe(), args.data.absolute()
    if agreement.find(keys.site).signing_key != keys.identity().signing_key:
        raise DataError(f"the agreement has another key for site '{keys.site}' than {args.key}", do="use the right key")
    meta = find_task(recipe.task).read_meta(data)
    bind_data(args.key, agreement.sha256, meta.data_hash)
    pin(agreement.cpu_capability)
    name = args.name or f"{recipe.task}-{keys.site}-{agreement.sha256[:8]}"
    directory = home.home() / "runs" / name
    with open_screen(args.quiet, f"{name}: joining the other sites"):
        if home.is_open(directory):
            if home.note(directory).tags.get("raylab.agreement") != agreement.sha256:
                raise UsageError(f"the run '{name}' belongs to something else", do="choose another --name")
            with run_tracking.reopen_run(directory):
                return continue_site(directory, agreement, keys, args, data)
        uri = run_tracking.checked_address()
        directory = home.new_run(name, recipe.task)
        tags = {"raylab.agreement": agreement.sha256, "raylab.site": keys.site}
        new = run_tracking.describe_run(directory, recipe, meta, data, "federate", uri, more_tags=tags)
        with run_tracking.open_run(directory, new):
            return continue_site(directory, agreement, keys, args, data)


def read_signed(exchange: Path) -> "Agreement":
    """The agreement of an exchange directory; DataError unless all sites have signed it."""
    from raylab.federation import agreement as agreements

    agreement = agreements.read_agreement(exchange)
    if missing := agreements.find_unsigned(agreement, exchange):
        have = "has" if len(missing) == 1 else "have"
        raise DataError(
            f"{', '.join(missing)} {have} not signed the agreement in {exchange}",
            "nothing is sent before all sites have",
            f"at that site: raylab federate sign --exchange {exchange} --key NAME.key",
        )
    return agreement


def continue_site(
    directory: Path, agreement: "Agreement", keys: "PrivateKeys", args: argparse.Namespace, data: Path
) -> dict[str, Any]:
    """Train the tracked run in `directory` to its end, and score it on the site's own validation split."""
    from jobs.common.training import finish  # loads torch, after its instructions are pinned
    from raylab.federation.exchange import Exchange
    from raylab.federation.journal import Journal
    from raylab.federation.run import join
    from raylab.federation.sums import SiteSums
    from raylab.training.checkpoint import list_checkpoints
    from raylab.training.run_result import read_result

    quiet = args.quiet
    if (directory / "result.json").is_file():
        say(f"run {directory.name} has already finished training")
        return finish(directory, agreement.parse_recipe(), data, read_result(directory), quiet)

    def saved_step() -> int:
        """The step of the oldest of two or more checkpoints, which this site resumes from if the others are damaged."""
        here = list_checkpoints(directory / "checkpoints")
        return int(here[-1].name.removeprefix("step-")) if len(here) > 1 else 0

    journal = None
    if agreement.privacy is not None:
        journal = Journal(args.key.with_suffix(".sent") / agreement.sha256[:16])
    sums = SiteSums(Exchange(args.exchange, agreement, keys, saved_step), keys, agreement, say, journal)
    set_status("waiting for all sites to join")
    with sums.announce_end():
        federation = join(agreement, {keys.site: data}, sums)
        note_spending(federation, directory, keys.site, federation.steps)  # the most that it can be
        result = train_federation(federation, directory, quiet)
    if (spent := note_spending(federation, directory, keys.site, result["steps"])) and not quiet:
        say(f"spent of each patient of this site: {spent}")
    sums.tell_refused()
    traffic = {
        "rounds": sums.rounds,
        "bytes_sent": sums.exchange.bytes_sent,
        "bytes_received": sums.exchange.bytes_received,
        "seconds_waited": sums.seconds_waited,
        "refused": sums.told,
    }
    return finish(directory, federation.recipe, data, result, quiet) | {"traffic": traffic}


def note_spending(federation: "Federation", directory: Path, site: str, steps: int) -> str | None:
    """Tag the run with what `steps` steps spend of the privacy budget, and return it; None without a budget."""
    from raylab.federation.budget import spent_epsilon

    privacy = federation.agreement.privacy
    if privacy is None:
        return None
    of = f"{privacy.colluding_sites} of {len(federation.agreement.sites)} sites"
    text = (
        f"epsilon {spent_epsilon(federation, site, steps):.3g} of {privacy.epsilon:g}, delta {privacy.delta:g}, "
        f"noise multiplier {privacy.noise_multiplier:g}, if {of} collude"
    )
    home.annotate(directory, tags={**home.note(directory).tags, PRIVACY: text})
    Outbox(directory / "outbox").append({"kind": "tags", "values": {PRIVACY: text}})
    return text


def train_federation(federation: "Federation", directory: Path, quiet: bool) -> dict[str, Any]:
    """Train a tracked run as one site, with its progress on the screen."""
    from jobs.common.progress import Display
    from raylab.federation.run import train
    from raylab.work import WorkMeter, write_to

    recipe, counts = federation.recipe, federation.counts
    if not quiet:
        names = ", ".join(federation.agreement.names)
        say(f"run {directory.name}: {recipe.task}, {counts.train} training rows of {names}, {federation.steps} steps")
    if left_out := federation.inputs_left_out:
        say(f"{left_out} inputs of this site's data do not stand out from the noise, and are not used")
    rows = run_tracking.ToOutbox(directory)
    meter = WorkMeter("worker-0", recipe.scaling.cpus_per_worker, 1.0, False, write_to(directory))
    with Display(directory, recipe.loop.epochs, federation.steps, federation.task.objective, quiet), meter:
        result = train(federation, directory, rows.send, meter.note_training)
    facts = result["federation"]
    if clipped := facts["clipped_shards"]:
        say(f"{clipped} gradients of shards exceeded the agreed bound and were scaled down")
    if gone := set(federation.agreement.names) - set(facts["sites"]):
        say(f"the run ended without {', '.join(sorted(gone))}")
    return result


def run_pooled(args: argparse.Namespace) -> dict[str, Any]:
    outputs.check_directory(args.out, "--out")
    agreement = read_signed(args.exchange)
    members = parse_members(args.data, agreement)
    if agreement.local_steps is not None:
        raise UsageError(
            "a pooled run repeats exact sums, and the sites of this agreement average their weights",
            "there is no run on pooled rows with the same weights",
            "to compare, make an agreement without --local-steps in another directory",
        )
    if agreement.privacy is not None:
        raise UsageError(
            "a pooled run repeats exact sums, and the sites of this agreement add noise",
            "the noise is secret and drawn once, so no other run has the same weights",
            "to compare, make an agreement without --epsilon in another directory",
        )
    pin(agreement.cpu_capability)
    from raylab.federation.exchange import Inbox
    from raylab.federation.run import join, train
    from raylab.federation.sums import PooledSums, find_exclusions

    sums = PooledSums(agreement, find_exclusions(Inbox(args.exchange, agreement)))
    with open_screen(args.quiet, f"{agreement.recipe['task']}: training on the data of all sites"):
        federation = join(agreement, members, sums)
        args.out.mkdir(mode=0o700, parents=True, exist_ok=True)
        result = train(federation, args.out, lambda rows: 0)
    if not args.quiet:
        say(f"{result['steps']} steps, val loss {result['best']['loss']:.4f}, weights {result['weights_sha256']}")
    return {key: value for key, value in result.items() if key != "val"} | {"directory": str(args.out)}


def parse_members(words: list[str], agreement: "Agreement") -> Mapping[str, Path]:
    """{site: prepared directory} of NAME=DIR, in the order of the agreement; UsageError unless it has every site."""
    given = dict(word.partition("=")[::2] for word in words)
    for name in given:
        agreement.find(name)
    if missing := [name for name in agreement.names if not given.get(name)]:
        raise UsageError(
            f"no data of {', '.join(missing)}", do=f"give --data {' '.join(f'{n}=DIR' for n in missing)} too"
        )
    return {name: Path(given[name]).absolute() for name in agreement.names}


if __name__ == "__main__":
    sys.exit(cli.main(["federate", *sys.argv[1:]]))
