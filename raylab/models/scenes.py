"""Networks for scenes of any number of bands: a small convolutional network, torchvision's classifiers with a first
layer of as many channels as there are bands, and boosting on the means of 3 x 3 cells."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raylab.config.recipe import BoostingModel, SceneCnnModel
from raylab.errors import DataError
from raylab.models.baselines import Boosting

MAP = 4  # pixels a side from which maps are not halved any more
CELLS = 3  # a side, of boosting's summary


class SceneCnn(nn.Module):
    """x float32 [B, C, S, S] -> logits [B, outputs]: 3 x 3 convolutions in pairs, whose maps are halved, and their
    channels doubled, until they have MAP pixels a side or fewer. The head sees every pixel of the last map, because in
    small neighbourhoods the central one counts."""

    def __init__(self, bands: int, size: int, config: SceneCnnModel, outputs: int) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        width, channels = config.width, bands
        while True:
            for _ in range(2):
                self.stages.append(
                    nn.Sequential(
                        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                    )
                )
                channels = width
            if size <= MAP:
                break
            self.stages.append(nn.MaxPool2d(2, ceil_mode=True))
            size, width = -(-size // 2), 2 * width
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(channels * size * size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.dropout(self.stages(x).flatten(1))))


def scene_cnn(config: SceneCnnModel, spec: dict[str, Any], outputs: int) -> SceneCnn:
    return SceneCnn(len(spec["bands"]), spec["size"], config, outputs)


class CellSummary(nn.Module):
    """x [B, C, S, S] -> float64 [B, 10C]: the means of 3 x 3 cells of each band and its standard deviation. In 3 x 3
    neighbourhoods the cells are the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        cells = F.adaptive_avg_pool2d(x, CELLS).flatten(1)
        return torch.cat([cells, x.std((2, 3), correction=0)], 1)


class SceneBoosting(Boosting):
    """Histogram gradient boosting on cell means, with a tree of every class in each round: one model of all classes, or
    of multi-labels one model of each label."""

    def __init__(self, config: BoostingModel, outputs: int) -> None:
        super().__init__(CellSummary(), config, outputs)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        each = self.leaf_values(self.summary(x))
        out: Tensor = self.baseline + each.reshape(-1, self.config.trees, self.outputs).sum(1)
        return out.to(x.dtype)

    def fit(self, x: Tensor, y: np.ndarray) -> None:
        """Grow the trees on scenes x [N, C, S, S] and y [N], or of multi-labels [N, labels]."""
        rows = self.summary(x).numpy()
        if y.ndim == 1:
            if absent := sorted(set(range(self.outputs)) - set(np.unique(y).tolist())):
                raise DataError(f"train has no row of the classes {absent}", "a model cannot learn them")
            model = self.grow(rows, y)
            # scikit-learn has one tree a round for two classes, and one a class for more
            by_output: list[Sequence[Any]] = list(zip(*model._predictors, strict=True))
            base = np.asarray(model._baseline_prediction).ravel()
            if self.outputs == 2:  # logits of the second class against the first
                by_output, base = [(), by_output[0]], np.array([0.0, base[0]])
        else:
            by_output, base = [], np.zeros(self.outputs)
            for k in range(self.outputs):
                if len(np.unique(y[:, k])) < 2:  # never or always there: predicted from its frequency, without trees
                    mean = (y[:, k].sum() + 0.5) / (len(y) + 1)
                    base[k] = np.log(mean / (1 - mean))
                    by_output.append(())
                    continue
                model = self.grow(rows, y[:, k])
                base[k] = np.asarray(model._baseline_prediction).item()
                by_output.append([tree for (tree,) in model._predictors])
        self.baseline.copy_(torch.from_numpy(base))
        for k, trees in enumerate(by_output):
            for round_, tree in enumerate(trees):
                self.write_tree(round_ * self.outputs + k, tree)


def scene_boosting(config: BoostingModel, spec: dict[str, Any], outputs: int) -> SceneBoosting:
    return SceneBoosting(config, outputs)
