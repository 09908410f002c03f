"""Passes that give dropout a rate."""

from __future__ import annotations

from torch import nn

from kpt.specs import Variant


class Rate:
    """Gives dropout another rate, in training only, so that values without dropout are right."""

    rate = 0.1

    def propose(self, observation, hardware):
        yield Variant("rate", predicted_gain=2.0)

    def apply(self, model, variant):
        drop = model.drop
        original = drop.forward
        drop.forward = lambda x: nn.functional.dropout(x, type(self).rate, True) if drop.p else original(x)

        def undo():
            del drop.forward

        return undo

    def verify_applied(self, model):
        return True


class Thrice(Rate):
    rate = 0.3
