"""What bf16, channels_last and torch.compile bring on a GPU: whole training steps of COVID-Net and ResNet-50.

    python benchmarks/gpu.py [--batch 64] [--size 224] [--steps 30] [--peak TFLOPS]

It needs torch and torchvision alone, no Ray and no other package of this project, so that it runs on a bare machine.
Each switch is measured by itself and all together, on inputs that are on the card, so that nothing but the step is
timed; the step does not wait for the host. The share of the peak is of 6 floating-point operations a
multiply-accumulate (forward 2, backward 4) against --peak, the card's dense bf16 TFLOP/s from its data sheet.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "float32": (False, False, False),
    "bf16": (True, False, False),
    "channels_last": (False, True, False),
    "compile": (False, False, True),
    "bf16 + channels_last": (True, True, False),
    "all": (True, True, True),
}


def covidnet() -> nn.Module:
    """CovidNet from its own file, without the package around it."""
    spec = importlib.util.spec_from_file_location("covidnet", ROOT / "raylab" / "models" / "covidnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.CovidNet(3)
    return network


def resnet50() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 1), torchvision.models.resnet50(num_classes=3))


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one image in convolutions and dense layers."""
    total = 0

    def count(layer: Any, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        per = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features
        total += out[0].numel() * per

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(x[:1])
    for hook in hooks:
        hook.remove()
    model.train()
    return total


def images_per_s(model: nn.Module, x: torch.Tensor, y: torch.Tensor, way: tuple[bool, bool, bool], steps: int) -> float:
    """Median over 5 rounds of `steps` training steps, timed by events on the card."""
    bf16, channels_last, compiled = way
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    run: Any = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(run(x).float(), y)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    for _ in range(5):
        step()
    rounds = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        stop.record()
        torch.cuda.synchronize()
        rounds.append(steps * len(x) / (start.elapsed_time(stop) / 1e3))
    return statistics.median(rounds)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s of the card")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch}, {options.size} px")
    x = torch.randn(options.batch, 1, options.size, options.size, device="cuda")
    y = torch.arange(options.batch, device="cuda") % 3
    for name, make in (("covidnet", covidnet), ("resnet50", resnet50)):
        plain = 0.0
        for label, way in WAYS.items():
            torch.manual_seed(0)
            model = make().cuda().train()
            each = macs(model, x)
            pace = images_per_s(model, x, y, way, options.steps)
            plain = plain or pace
            rate = 6 * each * pace / 1e12
            peak = f"{rate / options.peak:7.1%} of the peak" if options.peak else ""
            print(f"{name:<10}{label:<22}{pace:>10,.0f} images/s{pace / plain:>8.2f} x{rate:>9.1f} TFLOP/s {peak}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
