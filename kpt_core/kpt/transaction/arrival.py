"""How the calls of one observation arrive while plans are timed, as its objective asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kpt.judge.load import ONE_BY_ONE, Load

if TYPE_CHECKING:
    from kpt.transaction.observe import Observation

#: Calls that a thread makes before the device is waited for: enough that the last wait weighs little.
_QUEUED = 8
#: Calls of each caller on a CPU, where every call is done when it returns.
_CALLS = 2


def load_of(observation: Observation) -> Load:
    """One call at a time, or for the objective "throughput" as many as keep the device busy.

    On an accelerator one thread queues calls. On a CPU several threads call at once: as many as keep the
    cores busy with torch's number of threads, and at least two. Training steps, which write to the same
    gradients, and calls under autocast or a default device, which are a thread's own, come from one thread.
    """
    if observation.objective != "throughput":
        return ONE_BY_ONE
    autocast, *_, devices = observation.ambient or ((), ())
    if observation.device_type != "cpu" or observation.training or autocast or devices != ():
        return Load(1, _QUEUED)
    cores = observation.hardware.compute_units or torch.get_num_threads()
    return Load(max(2, cores // torch.get_num_threads()), _CALLS)
