"""What learns at which step of a transfer, and how fast."""

import pytest
import torch
from torch import nn

from raylab.config.overrides import override
from raylab.config.recipe import CovidNetModel, Optim, Recipe, VisionModel
from raylab.data.images.dataset import load_images
from raylab.models import network
from raylab.tasks.recipes import shipped_recipe
from raylab.training.adamw import AdamW
from raylab.training.batchnorm import reestimate
from raylab.training.finetune import FinetuneSchedule, layer_lr_scales
from raylab.training.process_group import ProcessGroup

RECIPE = override(
    shipped_recipe("covidnet", smoke=True), {"loop.epochs": 10, "optim.lr": 0.01, "schedule.kind": "constant"}
)


def model() -> nn.Module:
    return network("cxr-frontal-u8", "covidnet")(CovidNetModel(name="covidnet", width=0.25, depth=0.4), {}, 3)


def plan(mode: str, net: nn.Module, transferred: bool = True, **more: object) -> FinetuneSchedule:
    settings = {"transfer.mode": mode, **{k.replace("__", "."): v for k, v in more.items()}}
    return FinetuneSchedule(override(RECIPE, settings), net, per_epoch=4, transferred=transferred)


@pytest.mark.parametrize(
    ("mode", "transferred", "probe_steps"),
    [("scratch", True, 0), ("probe", True, 40), ("full", True, 0), ("lp-ft", True, 12), ("lp-ft", False, 0)],
)
def test_how_long_a_mode_probes(mode, transferred, probe_steps):
    assert plan(mode, model(), transferred).probe_steps == probe_steps


def test_the_shortest_runs():
    net = model()
    assert plan("lp-ft", net, loop__epochs=1).probe_steps == 0  # one epoch is for tuning
    assert plan("lp-ft", net, loop__epochs=2, transfer__probe_fraction=0.01).probe_steps == 4
    assert plan("lp-ft", net, loop__epochs=2, transfer__probe_fraction=0.99).probe_steps == 4


def test_a_probe_learns_the_head_alone_and_then_everything_learns():
    net = model()
    steps = plan("lp-ft", net)
    scales = steps.prepare_step(net, 0)
    learning = [name for name, p in net.named_parameters() if p.requires_grad]
    assert learning == ["head.weight", "head.bias"] and sum(scales) == 2
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout))
    assert steps.is_probing(11) and not steps.is_probing(12)
    assert [s for s in range(40) if steps.starts_finetuning(s)] == [12]
    scales = steps.prepare_step(net, 12)
    assert all(p.requires_grad for p in net.parameters()) and net.stem.training
    assert scales[0] == pytest.approx(0.3) and scales[-1] == 1
    assert steps.prepare_step(net, 0) == plan("lp-ft", model()).prepare_step(net, 0)  # back again, as after a restart


def test_each_phase_has_the_schedule_to_itself():
    net = model()
    steps = plan("lp-ft", net, schedule__kind="cosine", schedule__warmup_steps=2)
    scales = [steps.lr(s, 0) for s in range(40)]
    assert scales[0] == pytest.approx(0.1 / 2) and scales[2] == pytest.approx(0.1)  # ten times optim.lr
    assert scales[12] == pytest.approx(0.01 / 2) and max(scales[12:]) == pytest.approx(0.01)
    assert scales[11] < 0.02 and scales[39] < 0.001
    plain = plan("lp-ft", net, transferred=False, schedule__kind="plateau")
    assert plain.lr(20, 2) == pytest.approx(0.01 * 0.7**2)


def test_rates_fall_towards_the_input():
    net = model()
    names = [name for name, _ in net.named_parameters()]
    scales = dict(zip(names, layer_lr_scales(names, 0.01), strict=True))
    assert scales["stem.0.weight"] == pytest.approx(0.01) and scales["head.weight"] == 1
    stages = [scales[f"stages.{at}.long.0.weight"] for at in (1, 3, 5, 7)]
    assert stages == sorted(stages) and len(set(stages)) == 4
    assert set(layer_lr_scales(names, 1.0)) == {1.0}
    resnet = [
        n for n, _ in network("cxr-frontal-u8", "resnet18")(VisionModel(name="resnet18"), {}, 3).named_parameters()
    ]
    scales = dict(zip(resnet, layer_lr_scales(resnet, 0.1), strict=True))
    assert (
        scales["body.layer2.1.bn1.bias"] == scales["body.layer2.0.conv1.weight"] < scales["body.layer4.0.conv1.weight"]
    )


def test_a_share_of_the_rate_is_a_step_of_that_rate():
    """And a weight whose share is 0 stays as it is, with its moments."""

    def stepped(shares: list[float] | None, rate: float) -> tuple[list[torch.Tensor], AdamW]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(3)) for _ in range(3)]
        for w in weights:
            w.grad = torch.ones(3)
        optim = AdamW(weights)
        for _ in range(3):
            optim.step(rate, Optim(), shares)
        return [w.detach() for w in weights], optim

    mixed, optim = stepped([1.0, 0.0, 0.1], 0.1)
    full, _ = stepped(None, 0.1)
    slow, _ = stepped(None, 0.01)
    still, _ = stepped([0.0, 0.0, 0.0], 0.1)
    assert torch.equal(mixed[0], full[0]) and torch.allclose(mixed[2], slow[2]) and torch.equal(mixed[1], still[1])
    assert float(optim.steps[1]) == 0 and not optim.first[1].any() and float(optim.steps[0]) == 3


def test_reestimated_statistics_are_those_of_the_data(covidnet_data):
    torch.manual_seed(0)
    net = model()
    train = load_images(covidnet_data, "train", size=32)
    reestimate(net, train, ProcessGroup(), 0, "cpu")
    x = net.stem[0](train.batch(train.y * 0 + range(len(train))))
    first = net.stem[1]
    torch.testing.assert_close(first.running_mean, x.mean((0, 2, 3)).detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.running_var, x.var((0, 2, 3)).detach(), rtol=1e-2, atol=1e-4)
    assert net.training and all(float(b) == 0 for n, b in net.named_buffers() if "num_batches" in n)


def test_recipes_default_to_a_probe_and_then_fine_tuning():
    assert Recipe(task="covidnet", model=CovidNetModel(name="covidnet")).transfer.mode == "lp-ft"
