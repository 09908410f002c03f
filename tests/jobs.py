"""What tests run in processes of their own: ``python jobs.py NAME FOLDER`` prints one JSON object."""

from __future__ import annotations

import datetime
import faulthandler
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import kpt
import mixed_models
from fingerprints import bits
from slow_models import DerivedScale, DirectScale, Net, net, plugin

STEPS = 32


def _steps(model: torch.nn.Module, rank: int, shape: tuple[int, int] = (32, 16)) -> list[str]:
    """The losses of some training steps, as exact hexadecimal numbers."""
    generator = torch.Generator().manual_seed(100 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = model(torch.randn(shape, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def _join(rank: int, folder: str) -> None:
    faulthandler.dump_traceback_later(200)  # where a rank waits in vain, its job's errors say where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )


def _leave(rank: int, folder: str, found: dict[str, Any]) -> None:
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _rank(rank: int, folder: str) -> None:
    _join(rank, folder)
    example = torch.randn(32, 16)
    plugins = [plugin(DirectScale)]
    parallel = torch.nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {"eager": _steps(parallel(net(training=True)), rank)}

    wrapped = parallel(net(training=True))
    kpt.optimize(wrapped, example, plugins=plugins, budget=20.0, cache=False)
    found["after"] = _steps(wrapped, rank)
    receipt = kpt.report(wrapped)
    found["receipt"] = [receipt.optimized, receipt.mode, receipt.reason, receipt.calls, receipt.searched]

    model: Net = net(training=True)
    kpt.optimize(model, example, plugins=plugins, budget=20.0, cache=False)
    found["before"] = _steps(parallel(model), rank)
    found["fast before"] = kpt.report(model).calls

    only_here = net(training=True)
    if rank == 1:  # a plan that this rank cannot apply
        only_here.slow = torch.nn.Identity()
    kpt.optimize(only_here, example, plugins=plugins, budget=20.0, cache=False)
    found["disagreement"] = [kpt.report(only_here).optimized, kpt.report(only_here).reason]

    unsuitable = net(training=True)
    if rank == 1:  # observing it fails, while rank 0 could go on
        unsuitable.first.register_forward_hook(lambda module, args, output: 1 / 0)
    try:
        kpt.optimize(unsuitable, example, plugins=plugins, budget=20.0, cache=False)
        found["refused"] = [kpt.report(unsuitable).optimized, kpt.report(unsuitable).reason]
    except ZeroDivisionError as error:
        found["refused"] = [False, str(error)]

    examples = "no tensor" if rank == 1 else example
    try:
        kpt.optimize(net(training=True), examples, plugins=plugins, budget=20.0, cache=False)
        found["bad examples"] = "returned"
    except (TypeError, ValueError):
        found["bad examples"] = "raised"

    nothing = net(training=True)
    kpt.optimize(nothing, example, plugins=[plugin()], budget=20.0, cache=False)
    found["nothing"] = [kpt.report(nothing).optimized, kpt.report(nothing).reason]

    def metric(model: torch.nn.Module) -> float:
        raise ArithmeticError("the metric of rank 0 fails")

    failing = net(training=True)
    try:
        accuracy = kpt.Accuracy(metric)
        kpt.optimize(failing, example, plugins=plugins, budget=20.0, cache=False, accuracy=accuracy)
        found["rank 0 raises"] = [kpt.report(failing).optimized, kpt.report(failing).reason]
    except ArithmeticError as error:
        found["rank 0 raises"] = [False, str(error)]
    _leave(rank, folder, found)


def _long() -> mixed_models.Mixed:
    return mixed_models.mixed(training=True, rounds=400)


def _mixed_rank(rank: int, folder: str) -> None:
    """A compiled, a precision and a kernel variant in one plan, in the wrapper and below it."""
    _join(rank, folder)
    shape = (64, 64)
    plugins = mixed_models.plugins(mixed_models.CompiledByInductor, training=True)
    options = {"plugins": plugins, "budget": 120.0, "cache": False}
    parallel = torch.nn.parallel.DistributedDataParallel
    found: dict[str, Any] = {"eager": _steps(parallel(_long()), rank, shape)}

    wrapped = parallel(_long())
    kpt.optimize(wrapped, torch.randn(shape), **options)
    found["after"] = {"losses": _steps(wrapped, rank, shape), **_state(wrapped, wrapped.module)}

    model = _long()
    kpt.optimize(model, torch.randn(shape), **options)
    found["before"] = {"losses": _steps(parallel(model), rank, shape), **_state(model, model)}
    _leave(rank, folder, found)


def _state(optimized: torch.nn.Module, model: torch.nn.Module) -> dict[str, Any]:
    """What was committed, what the calls ran, and a digest of the weights."""
    receipt = kpt.report(optimized)
    digest = hashlib.sha256(b"".join(map(bits, model.parameters())))
    return {
        "phases": sorted(mixed_models.phases(optimized)),
        "why": [receipt.reason, [entry.reason for entry in receipt.rejected], receipt.notes],
        "calls": receipt.calls,
        "weights": digest.hexdigest(),
    }


def _spawn(target: Any, folder: str) -> list[Any]:
    torch.multiprocessing.spawn(target, args=(folder,), nprocs=2, join=True)
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]


def distributed(folder: str) -> list[Any]:
    return _spawn(_rank, folder)


def distributed_mixed(folder: str) -> list[Any]:
    return _spawn(_mixed_rank, folder)


def deterministic(folder: str) -> dict[str, Any]:
    """Train and evaluate a little under deterministic algorithms; a digest of every bit."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    digest = hashlib.sha256()
    accepted = []
    for training in (False, True):
        model = net(training=training)
        torch.manual_seed(1)
        example = torch.randn(32, 16)
        kpt.optimize(model, example, plugins=[plugin(DirectScale, DerivedScale)], budget=20.0, cache=False)
        accepted.append([entry.name for entry in kpt.report(model).accepted])
        digest.update(",".join(_steps(model, 0)).encode() if training else bits(model(example)))
        for tensor in model.state_dict().values():
            digest.update(bits(tensor))
    return {"digest": digest.hexdigest(), "accepted": accepted}


def deterministic_mixed(folder: str) -> dict[str, Any]:
    """The same with a compiled, a precision and a kernel variant, and with the cache on."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    digest = hashlib.sha256()
    found: dict[str, Any] = {"recipe": [], "searched": [], "phases": [], "calls": []}
    for training in (False, True):
        model = mixed_models.mixed(training, rounds=200)
        torch.manual_seed(1)
        example = torch.randn(64, 64)
        plugins = mixed_models.plugins(mixed_models.CompiledByInductor, training=training)
        kpt.optimize(model, example, plugins=plugins, budget=120.0)
        if training:
            digest.update(",".join(_steps(model, 0, (64, 64))).encode())
        else:
            with torch.no_grad():
                digest.update(bits(model(example)))
        for tensor in model.state_dict().values():
            digest.update(bits(tensor))
        receipt = kpt.report(model)
        found["recipe"].append(receipt.recipe)
        found["searched"].append(receipt.searched)
        found["phases"].append(sorted(mixed_models.phases(model)))
        found["calls"].append(receipt.calls["optimized"])
    return {"digest": digest.hexdigest(), **found}


def cached(folder: str) -> dict[str, Any]:
    """Optimise with the cache on."""
    torch.set_num_threads(1)
    model = net()
    torch.manual_seed(1)
    kpt.optimize(model, torch.randn(32, 16), plugins=[plugin(DirectScale)], budget=20.0)
    receipt = kpt.report(model)
    return {"searched": receipt.searched, "recipe": receipt.recipe, "optimized": receipt.optimized}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
