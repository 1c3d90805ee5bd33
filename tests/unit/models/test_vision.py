from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from raylab.config.recipe import VisionModel
from raylab.errors import DataError, UsageError
from raylab.models.vision import classifier, describe, names

SPEC = {"size": 32}


def make(name: str, **options: object) -> torch.nn.Module:
    return classifier(name)(VisionModel(name=name, **options), SPEC, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "mobilenet_v3_small", "vit_b_16"])
def test_grey_image_to_logits(name: str) -> None:
    model = make(name).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert isinstance(model.head, torch.nn.Linear)


def test_published_sizes() -> None:
    """VGG-19 without dense layers 20.0 M and 89.6 GMACs at 480 px, as published; ResNet-50 with its usual 23.5 M."""
    with torch.device("meta"):
        vgg, resnet = make("vgg19"), make("resnet50")
    assert describe(vgg, 480) == {"parameters": 20_025_923, "macs": pytest.approx(89.6e9, rel=0.01)}
    assert describe(resnet, 480) == {"parameters": 23_514_179, "macs": pytest.approx(18.8e9, rel=0.01)}


def test_macs_of_known_layers() -> None:
    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)
            self.deep = torch.nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.deep(self.conv(x)).mean((2, 3)))

    toy = Toy().train()
    assert describe(toy, 8) == {"parameters": 40 + 40 + 10, "macs": 64 * 4 * 9 + 64 * 4 * 9 + 8}
    assert toy.training and not toy.conv._forward_hooks


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="use one of: resnet50"):
        classifier("resnet_50")(VisionModel(name="resnet_50"), SPEC, 3)
    assert "inception_v3" not in names()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pretrained_weights(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    trained = torchvision.models.resnet18(num_classes=10)
    path = tmp_path / f"weights{suffix}"
    save_file(trained.state_dict(), path) if suffix == ".safetensors" else torch.save(trained.state_dict(), path)
    model = make("resnet18", weights=str(path))
    assert torch.equal(model.body.conv1.weight, trained.conv1.weight)
    assert model.head.out_features == 3
    with pytest.raises(DataError, match=r"do not fit[\s\S]*body\.features\.0\.weight is missing"):
        make("vgg11", weights=str(path))
    wider = torchvision.models.wide_resnet50_2().state_dict()
    torch.save(wider, tmp_path / "wide.pt")
    with pytest.raises(DataError, match=r"body\.layer1\.0\.conv1\.weight \(128, 64, 1, 1\), expected \(64, 64, 1, 1\)"):
        make("resnet50", weights=str(tmp_path / "wide.pt"))


def test_weights_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's cache where they are; else fetched, and what to do where that fails."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DataError, match="torchvision has no weights 'ResNet18'"):
        make("resnet18", weights="torchvision:ResNet18")
    trained = torchvision.models.resnet18()
    file = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"

    def offline(url: str, *rest: object, **more: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DataError, match=r"no route to host[\s\S]*resnet18-f37072fd\.pth"):
        make("resnet18", weights="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    torch.save(trained.state_dict(), file)
    model = make("resnet18", weights="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert torch.equal(model.body.conv1.weight, trained.conv1.weight)


def test_weights_of_our_own_keep_a_head_of_the_same_size(tmp_path: Path) -> None:
    mine = make("resnet18")
    save_file(mine.state_dict(), tmp_path / "mine.safetensors")
    again = make("resnet18", weights=str(tmp_path / "mine.safetensors"))
    assert torch.equal(again.head.weight, mine.head.weight)
    two = classifier("resnet18")(VisionModel(name="resnet18", weights=str(tmp_path / "mine.safetensors")), SPEC, 2)
    assert two.head.out_features == 2 and torch.equal(two.body.conv1.weight, mine.body.conv1.weight)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no weights"):
        make("resnet18", weights=str(tmp_path / "none.pt"))
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickle.pt")  # a whole module: code, refused by weights_only
    for name, what in {"bad.pt": "cannot read", "bad.safetensors": "cannot read", "pickle.pt": "cannot read",
                       "tensor.pt": "not a state dict"}.items():  # fmt: skip
        with pytest.raises(DataError, match=what):
            make("resnet18", weights=str(tmp_path / name))
