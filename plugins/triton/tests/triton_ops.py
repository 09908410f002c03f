"""What the tests of recognition share: the plugin's ops without a GPU, and how a module is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import kpt_plugin_triton.plugin as plugin
from kpt import ops
from kpt.judge.calls import Call


class Registry:
    """The ops of the plugin, and no kernels."""

    def specs(self, hook: str) -> list[Any]:
        return [SimpleNamespace(spec=spec) for spec in plugin.kpt_ops()] if hook == "kpt_ops" else []


REGISTRY = Registry()


def found(model: nn.Module, *args: Any, **kwargs: Any) -> ops.Recognition:
    return ops.recognise(model.eval(), [Call(args, kwargs)], registry=REGISTRY)


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.fx.GraphModule, Any]:
    """The graph that dynamo captures, with its inputs."""
    grabbed: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        grabbed.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model.eval(), backend=backend, fullgraph=True)(*args, **kwargs)
    assert len(grabbed) == 1
    return grabbed[0]  # type: ignore[no-any-return]


def found_in_graph(op: str, model: nn.Module, *args: Any, **kwargs: Any) -> ops.Recognition:
    gm, _ = captured(model, *args, **kwargs)
    return ops.recognise_graph(gm, registry=REGISTRY, only={op})
