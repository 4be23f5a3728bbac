"""CycleGAN: from one domain to another and back, from pictures that come in no pairs (Zhu et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dist_train.data_shards.loader import MicroBatch
from dist_train.errors import UserError
from dist_train.networks import Networks
from dist_train.objectives import Objective, Turn
from dist_train.objectives.adversarial import LOSSES

Translate = Callable[[Tensor], Tensor]


def cycle_loss(
    to_b: Translate, to_a: Translate, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """mean |to_a(to_b(a)) - a| + mean |to_b(to_a(b)) - b| (eq. 2): 0 where one is the other's inverse.

    Returns it, to_b(a) and to_a(b).
    """
    fake_b, fake_a = to_b(a), to_a(b)
    cycle = (to_a(fake_b) - a).abs().mean() + (to_b(fake_a) - b).abs().mean()
    return cycle, fake_b, fake_a


def pooled(pool: Tensor | None, fake: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What the discriminator sees of the fakes (B, ...), and the pool (P, ...) that remembers `size` earlier ones.

    Each is changed, with probability 1/2, for one that the pool drew, and stays there in its place (Shrivastava et al.
    2017, arXiv:1612.07828, section 2.3). The first fakes fill the pool, over and over: its shape is that of all steps.
    """
    if pool is None:
        repeats = -(-size // len(fake))
        return fake, fake.repeat(repeats, *[1] * (fake.ndim - 1))[:size]
    place = torch.randperm(size, device=fake.device)[: len(fake)]  # (B,)
    swap = torch.rand(len(fake), *[1] * (fake.ndim - 1), device=fake.device) < 0.5
    old = pool[place]
    return torch.where(swap, old, fake), pool.index_copy(0, place, torch.where(swap, fake, old))


class CycleGAN(Objective):
    """Two translators are one player, two discriminators the other; least squares (section 4) on every patch.

    Two streams of data, `a` and `b`, in orders of their own: `to_b(a.image) -> image (B, C, S, S)`, `to_a` back,
    `of_a` and `of_b` score patches. Each micro-batch's slot has an image pool of its own. An evaluation takes image i
    of both, which are a pair where the domains show the same things, and tells how far apart they are: L1 in [0, 1].

    Args:
        cycle: weight of the cycle loss. The translators' squares are halved like the discriminators'; the paper's are
            not, so 10 here weighs what 20 does there.
        identity: weight of |to_b(b) - b| + |to_a(a) - a|, as a share of `cycle`.
        pool: how many earlier fakes a slot remembers for each discriminator; 0 for none.
    """

    players = ("translators", "discriminators")
    scale = "signed"

    def __init__(self, cycle: float = 10.0, identity: float = 0.0, pool: int = 16) -> None:
        if cycle < 0 or identity < 0:
            raise UserError(f"cycle and identity are 0 or more, got {cycle} and {identity}")
        if pool < 0:
            raise UserError(f"pool: got {pool}, expected 0 (none) or more")
        self.cycle, self.identity, self.pool = cycle, identity, pool
        self._of_both, self._of_fake = LOSSES["least_squares"]

    def turns(self, step: int) -> list[Turn]:
        return [Turn("translators", 0), Turn("discriminators", 1)]

    def loss(
        self, turn: Turn, networks: Networks, micro: MicroBatch, scalars: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        a, b = micro["a.image"], micro["b.image"]
        if turn.player == "translators":
            return self._translators(networks, a, b)
        with torch.no_grad():
            fake_b, fake_a = networks.to_b(a), networks.to_a(b)
        loss = self._of_both(networks.of_a(a), networks.of_a(self._seen(micro, "a", fake_a)))
        loss = loss + self._of_both(networks.of_b(b), networks.of_b(self._seen(micro, "b", fake_b)))
        return loss, {"loss": loss.detach()}

    def _translators(
        self, networks: Networks, a: Tensor, b: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        cycle, fake_b, fake_a = cycle_loss(networks.to_b, networks.to_a, a, b)
        fool = self._of_fake(networks.of_b(fake_b)) + self._of_fake(networks.of_a(fake_a))
        loss = fool + self.cycle * cycle
        if self.identity:
            same = (networks.to_b(b) - b).abs().mean() + (networks.to_a(a) - a).abs().mean()
            loss = loss + self.cycle * self.identity * same
        return loss, {"loss": loss.detach(), "cycle": cycle.detach()}

    def _seen(self, micro: MicroBatch, domain: str, fake: Tensor) -> Tensor:
        """The fakes that a discriminator sees, out of its pool."""
        if not self.pool:
            return fake
        if len(fake) > self.pool:
            raise UserError(
                f"objective.pool: got {self.pool}, expected 0, or data.micro_batch ({len(fake)}) or more"
            )
        seen, micro.memory[f"pool.{domain}"] = pooled(
            micro.memory.get(f"pool.{domain}"), fake, self.pool
        )
        return seen

    def evaluate(self, networks: Networks, micro: MicroBatch) -> dict[str, Tensor]:
        a, b = micro["a.image"], micro["b.image"]
        to_b, to_a = networks.to_b(a), networks.to_a(b)
        pairs = {"identity_l1": (a, b), "paired_l1": (to_b, b), "paired_l1_back": (to_a, a)}
        apart = {name: (x - y).abs().flatten(1).mean(1) / 2 for name, (x, y) in pairs.items()}
        return apart | {"to_b": to_b, "to_a": to_a}
