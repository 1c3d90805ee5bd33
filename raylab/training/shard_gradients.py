"""Loss and gradient of each shard: shards one by one, or several in one pass, to the same bits.

A network whose weights all belong to layers of models/shard_pass.py and models/gru.py takes passes on a CPU; all others
take shards one by one. How many shards a pass has follows from the workers, so a pass must not change the bits of a
shard. Two rules ensure it. Only shards of a multiple of VECTOR rows share a pass: torch computes the last elements of
an array, which do not fill a vector, with other instructions. And because libraries of matrix products promise nothing,
the first CHECKS passes of each shape are computed both ways: if one bit differs, this process takes shards of that
shape one by one from then on. Other workers may decide differently, because both ways have the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from raylab.models.gru import Gru
from raylab.models.shard_pass import LayerNorm, Linear, ShardPass, enter_pass
from raylab.training.shard_graphs import Losses, ShardGraphs, can_record, compute_pass

ALIGNMENT = 16  # elements: 64 bytes, as torch aligns tensors
VECTOR = 32  # elements: two AVX-512 registers, the longest step of torch's loops
CHECKS = 8  # the rarest differences seen so far showed in each of them (docs/log.md)
PASS_BYTES = 2**28  # of gradients in one pass, and of those of single shards that are kept


@dataclass(frozen=True)
class ShardInputs:
    """Inputs of consecutive shards that have the same number of rows, on the device that computes: x [shards * B, ...],
    y [shards * B, ...]."""

    shards: range
    x: Tensor
    y: Tensor

    def split(self) -> list["ShardInputs"]:
        """Return the inputs of each shard in memory of its own, because bits may depend on the alignment."""
        if len(self.shards) == 1:
            return [self]
        count = len(self.shards)
        return [
            ShardInputs(range(shard, shard + 1), x.clone(), y.clone())
            for shard, x, y in zip(self.shards, self.x.chunk(count), self.y.chunk(count), strict=True)
        ]


def can_take_passes(model: nn.Module, device: str, bf16: bool) -> bool:
    """Return whether all weights of `model` belong to layers that can be a part of a ShardPass."""
    owners = [type(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    return device == "cpu" and not bf16 and set(owners) <= {Linear, LayerNorm, Gru}


class ShardGradients:
    """Computes the loss and the gradient [P] of each shard with respect to `weights`, P elements in total. Without
    `repeats_bits`, shards of any size share a pass, and their bits may depend on it."""

    def __init__(
        self,
        model: nn.Module,
        weights: list[nn.Parameter],
        seed: int,
        device: str,
        bf16: bool,
        repeats_bits: bool = True,
    ) -> None:
        self.weights, self.seed, self.device = weights, seed, device
        self.takes_passes = can_take_passes(model, device, bf16)
        self.repeats_bits, self.vector = repeats_bits, VECTOR if repeats_bits else 1
        self.graphs = ShardGraphs(weights) if can_record(model, device) else None
        self.size = sum(w.numel() for w in weights)
        # of the gradients of passes and of single shards, because new memory costs time
        self.memory: dict[range, tuple[Tensor, dict[int, Tensor]]] = {}
        self.rows: dict[int, Tensor] = {}
        self.checks: dict[
            tuple[object, ...], int
        ] = {}  # passed so far by shape of the pass; CHECKS + 1 after a failure

    def group_shards(self, shards: list[np.ndarray], own: range) -> list[range]:
        """Return the shards of each pass: consecutive ones of `own` with the same number of rows."""
        longest = max(1, PASS_BYTES // (4 * self.size)) if self.takes_passes else 1
        groups: list[range] = []
        for shard in own:
            rows = len(shards[shard])
            joins = groups and len(groups[-1]) < longest and rows == len(shards[shard - 1]) and rows % self.vector == 0
            if joins:
                groups[-1] = range(groups[-1].start, shard + 1)
            else:
                groups.append(range(shard, shard + 1))
        return groups

    def compute(
        self, inputs: ShardInputs, step: int, count: int, losses: Losses
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (shard, sum of its losses, gradient of that sum / count). A gradient may be changed, and is valid until
        the next step, without `repeats_bits` until the next call; it is zero for weights that are frozen or do not
        affect the loss."""
        if len(inputs.shards) > 1 and (not self.repeats_bits or self._has_same_bits(inputs, step, count, losses)):
            yield from self._compute_pass(inputs, step, count, losses)
        else:
            yield from self._compute_alone(inputs, step, count, losses)

    def _has_same_bits(self, inputs: ShardInputs, step: int, count: int, losses: Losses) -> bool:
        """Whether a pass over several shards computes the bits of passes over each, as far as the checks can tell."""
        shape = (len(inputs.shards), inputs.x.shape, *(w.requires_grad for w in self.weights))
        done = self.checks.get(shape, 0)
        if done < CHECKS:
            alone = self._compute_alone(inputs, step, count, losses)
            together = self._compute_pass(inputs, step, count, losses)
            is_equal = all(
                torch.equal(loss, other_loss) and torch.equal(gradient, other)
                for (_, loss, gradient), (_, other_loss, other) in zip(alone, together, strict=True)
            )
            self.checks[shape] = done + 1 if is_equal else CHECKS + 1
        return self.checks[shape] <= CHECKS

    def _compute_alone(
        self, inputs: ShardInputs, step: int, count: int, losses: Losses
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        for each in inputs.split():
            if self.takes_passes:
                yield from self._compute_pass(each, step, count, losses)
                continue
            shard = each.shards[0]
            seed = partial(self._seed, shard_seed(self.seed, step, shard))
            if self.graphs is not None:
                yield shard, *self.graphs.compute(shard, each.x, each.y, count, losses, seed)
            else:
                seed()
                yield shard, *compute_pass(each.x, each.y, count, losses, self.weights, self._row(shard))

    def _row(self, shard: int) -> Tensor | None:
        """Return memory for the gradient [P] of a single shard; None, for new memory, where PASS_BYTES are kept: a rank
        may have hundreds of shards."""
        if shard not in self.rows and len(self.rows) < PASS_BYTES // (4 * self.size):
            self.rows[shard] = torch.empty(self.size, device=self.device)
        return self.rows.get(shard)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed does it for all devices, at 0.6 ms a call
        if self.device != "cpu":
            torch.cuda.manual_seed(seed)

    def _compute_pass(
        self, inputs: ShardInputs, step: int, count: int, losses: Losses
    ) -> list[tuple[int, Tensor, Tensor]]:
        seeds = [shard_seed(self.seed, step, shard) for shard in inputs.shards]
        torch.default_generator.manual_seed(seeds[0])  # for layers that know nothing of passes
        rows, slots = self._slots(inputs.shards)
        trainable = [w for w in self.weights if w.requires_grad]
        shards = ShardPass(
            [torch.Generator().manual_seed(seed) for seed in seeds], {id(w): slots[id(w)] for w in trainable}
        )
        with enter_pass(shards):
            each = losses(inputs.x, inputs.y)
        others = torch.autograd.grad(each.sum() / count, trainable, allow_unused=True)
        assert all(gradient is None for gradient in others), "a weight is used outside its layer"
        for key in slots.keys() - shards.written:
            slots[key].zero_()
        return list(zip(inputs.shards, [part.sum() for part in each.detach().chunk(len(seeds))], rows, strict=True))

    def _slots(self, shards: range) -> tuple[Tensor, dict[int, Tensor]]:
        """Return memory for gradients [shards, P], and in it the place [shards, *shape] of each weight, by id."""
        place = shards if self.repeats_bits else range(len(shards))  # so many rows would need memory for all of them
        if place in self.memory:
            return self.memory[place]
        aligned = -(-self.size // ALIGNMENT) * ALIGNMENT  # bits of thin products depend on where their results lie
        rows, slots, at = torch.empty(len(shards), aligned)[:, : self.size], {}, 0
        for w in self.weights:
            slots[id(w)] = rows[:, at : at + w.numel()].view(len(shards), *w.shape)
            at += w.numel()
        if len(shards) > 1:
            self.memory[place] = rows, slots
        return rows, slots


def shard_seed(seed: int, step: int, shard: int) -> int:
    """Return the seed of dropout and other random layers, so that results do not depend on the rank."""
    return int(np.random.SeedSequence([seed, step, shard]).generate_state(1, np.uint64)[0] >> 1)
