"""python -m cluster.testbed VERB: a Slurm cluster of three nodes on this machine, for tests and for trying things."""

import argparse
import os
import sys
import time

from cluster import testbed
from cluster.testbed import control, faults
from raylab.errors import RaylabError

VERBS = {
    "up": "start the cluster, and print the line that adds its Slurm commands to PATH",
    "down": "stop the cluster and remove all its files",
    "status": "print nodes and jobs; exit code 3 if it is down",
    "crash": "simulate a power failure of NODE",
    "boot": "start NODE again",
    "netdown": "unplug NODE's network cable",
    "netup": "plug NODE's network cable in again",
    "kill-controller": "stop slurmctld; jobs continue",
    "start-controller": "start slurmctld again",
    "exec": "[--on NODE] COMMAND...: run a command on the login node, or on NODE",
    "path": "print the directory of its Slurm commands; exit code 3 if it is down",
}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.testbed", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        if name in {"crash", "boot", "netdown", "netup"}:
            verb.add_argument("node", metavar="NODE")
        if name == "up":
            verb.formatter_class = argparse.RawDescriptionHelpFormatter
            verb.epilog = "faults:\n" + "\n".join(f"  {fault:18} {what}" for fault, what in faults.ABOUT.items())
            verb.add_argument("--fault", action="append", default=[], metavar="FAULT",
                              help="start it as a foreign site that differs so; may be repeated")  # fmt: skip
            verb.add_argument("--accounting", action="store_true", help="with slurmdbd: accounts, limits and bills")
        if name == "exec":
            verb.add_argument("--on", metavar="NODE", default="ctl")
            verb.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(words)
    try:
        return run(args, parser)
    except RaylabError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    root = testbed.root()
    match args.verb:
        case "up":
            began = time.monotonic()
            plan = control.up(root, args.accounting, faults.parse(args.fault))
            size = f"{plan.cpus} CPUs, {plan.memory} MB, {plan.gpus} fake GPUs"
            lines = [f"{plan.nodes} nodes of {size} after {time.monotonic() - began:.1f} s, in {root}"]
            if not plan.cgroups:
                lines.append("cgroups version 1 is not available: a job's memory is checked every 2 s, not limited")
            lines += [f"fault {fault}: {faults.ABOUT[fault]}" for fault in sorted(plan.faults)]
            print("\n".join([*lines, f"  export PATH={root}/bin:$PATH"]))
        case "down":
            control.down(root)
        case "status" | "path" if testbed.bin_directory() is None:
            print(f"no testbed is up in {root}", file=sys.stderr)
            return 3
        case "status":
            print(control.status(root), end="")
        case "path":
            print(testbed.bin_directory())
        case "exec":
            command = args.command[1:] if args.command[:1] == ["--"] else args.command
            if not command:
                parser.error("exec: no command given")
            control.check_up(root)
            line = control.command(root, command, args.on)
            os.execvp(line[0], line)
        case "netdown" | "netup":
            control.cable(root, args.node, args.verb.removeprefix("net"))
        case "crash":
            control.crash(root, args.node)
        case "boot":
            control.boot(root, args.node)
        case "kill-controller":
            control.kill_controller(root)
        case "start-controller":
            control.start_controller(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
