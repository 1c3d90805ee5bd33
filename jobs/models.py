"""raylab models: list the networks for chest X-rays with their cost, next to the published figures."""

import argparse
import statistics
import sys
import time
from typing import Any

from jobs import cli
from jobs.common.console import say
from raylab.config.recipe import CXR_FRONTAL, model_family

EXAMPLE = "raylab models --size 96 --names covidnet resnet50 densenet121"

CLASSES = 3
AT = 480  # px: input size of the published parameters and MACs
PUBLISHED = {  # (millions of parameters, GMACs) at 480 px: Wang and Wong, arXiv 2003.09871, and their repository
    "covidnet": (11.7, 7.50),
    "covidnet-large": (40.2, 23.63),
    "resnet50": (24.97, 17.75),
    "vgg19": (20.37, 89.63),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", metavar="NAME",
                        help="networks to list (default: raylab's own and the published ones)")  # fmt: skip
    parser.add_argument("--size", type=int, default=224,
                        help="size of the timed images in pixels per side (default: 224)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="images per timed training step (default: 8)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    from raylab.models import MODELS

    rows = [cost(name, args.size, args.batch) for name in args.names or MODELS[CXR_FRONTAL]]
    if not args.quiet:
        tell(rows, args.size)
    return {"size": args.size, "batch": args.batch, "published_at": AT, "models": rows}


def cost(name: str, size: int, batch: int) -> dict[str, Any]:
    """Parameters and MACs at 480 px, the published ones, and images/s of a training step on this machine."""
    import torch

    from raylab.models import network
    from raylab.models.vision import describe

    make = network(CXR_FRONTAL, name)
    # The meta device counts without computing
    with torch.device("meta"):
        counted = describe(make(model_family(name)(name=name), {"size": AT}, CLASSES), AT)
    parameters, gmacs = PUBLISHED.get(name, (None, None))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make(model_family(name)(name=name), {"size": size}, CLASSES).train()
    x, y = torch.randn(batch, 1, size, size), torch.arange(batch) % CLASSES
    seconds = []
    for _ in range(4):  # the first step allocates memory and starts threads, and is discarded
        started = time.perf_counter()
        torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - started)
    return {
        "name": name,
        "parameters": counted["parameters"],
        "macs": counted["macs"],
        "published_parameters": None if parameters is None else parameters * 1e6,
        "published_macs": None if gmacs is None else gmacs * 1e9,
        "images_per_s": batch / statistics.median(seconds[1:]),
    }


def tell(rows: list[dict[str, Any]], size: int) -> None:
    """Print the table of networks."""
    say(f"{'':18}{'parameters, M':>24}{f'GMACs at {AT} px':>24}{'images/s':>12}")
    say(f"{'network':18}{'here':>12}{'published':>12}{'here':>12}{'published':>12}{f'at {size} px':>12}")

    def shown(value: float | None, unit: float) -> str:
        return "-" if value is None else f"{value / unit:.2f}"

    for row in rows:
        columns = [
            shown(row["parameters"], 1e6),
            shown(row["published_parameters"], 1e6),
            shown(row["macs"], 1e9),
            shown(row["published_macs"], 1e9),
            f"{row['images_per_s']:.1f}",
        ]
        say(f"{row['name']:18}" + "".join(f"{text:>12}" for text in columns))
    say("images/s: forward and backward pass of a training step on one CPU thread of this machine")
    say("covidnet, covidnet-large: reconstructions, because no architecture was published")
    say("--names also accepts any classification model of torchvision")


if __name__ == "__main__":
    sys.exit(cli.main(["models", *sys.argv[1:]]))
