"""Which models and tensors no plan can serve, and what their users are told."""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from kpt.transaction import workspace
from kpt.transaction.hooks import computed, global_hooks, is_own
from kpt.transaction.reading import reading_of

if TYPE_CHECKING:
    from kpt.judge.calls import Call
    from kpt.transaction.execution import Runner

_log = logging.getLogger("kpt")


class Unsuitable(Exception):
    """The model cannot be optimised as it is; the message becomes the receipt's reason."""


def unreachable(model: torch.nn.Module) -> str | None:
    """Why calls of ``model`` would never reach a forward that is set on it, or None."""
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is a scripted module, which has no Python forward to change"
    if getattr(model, "_compiled_call_impl", None) is not None:
        return (
            "model.compile() was called, so that calls run what torch.compile made of the model and no other "
            "forward; set model._compiled_call_impl = None first to have it optimised instead"
        )
    if isinstance(inspect.getattr_static(type(model), "forward", None), property):
        return f"the forward of {type(model).__name__} is a property, which no other forward gets past"
    if getattr(model.forward, "__func__", None) is torch.nn.Module.forward:
        return f"{type(model).__name__} has no forward for kpt to replace; rename its __call__ to forward"
    return None


def _hidden(model: torch.nn.Module) -> str | None:
    """What a method of the model's own leaves out of its parts: nobody would hear of writes to that."""
    parts = _parts(model)
    held: dict[str, dict[int, str]] = {"modules": {id(module): path for path, module in parts.items()}}
    for kind in ("parameters", "buffers"):
        held[kind] = {
            id(tensor): f"{path}.{name}".lstrip(".")
            for path, module in parts.items()
            for name, tensor in getattr(module, f"_{kind}").items()
            if tensor is not None
        }
    for kind, names in held.items():
        told = {id(part) for part in getattr(model, kind)()}
        told &= {id(part) for _, part in getattr(model, f"named_{kind}")()}
        left_out = [name for part, name in names.items() if part not in told]
        if left_out:
            return (
                f"{type(model).__name__} has {kind}() or named_{kind}() of its own, which leaves out "
                f"{left_out[0]}, so that changes of it would go unnoticed; give that method another name"
            )
    return None


def _parts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every module by its path, whatever the model's own methods tell."""
    found, seen, pending = {"": model}, {id(model)}, [("", model)]
    while pending:
        path, module = pending.pop()
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                below = f"{path}.{name}".lstrip(".")
                seen.add(id(child))
                found[below] = child
                pending.append((below, child))
    return found


def refuse_unsuitable(model: torch.nn.Module) -> None:
    """Refuse what cannot be copied or must not be bypassed.

    Raises:
        Unsuitable: with the reason.
    """
    reason = unreachable(model)
    if reason is not None:
        raise Unsuitable(reason)
    if names := computed(model):
        raise Unsuitable(
            f"a hook of the model itself computes its {min(names)} before the forward, where no plan would "
            "see it; optimise a module that holds this one, as torch.nn.Sequential(model)"
        )
    if global_hooks():
        raise Unsuitable(
            "a global module hook is registered (torch.nn.modules.module.register_module_...), which an "
            "optimised forward would bypass; remove it first"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise Unsuitable(
                f"{name} gets its shape from the first call (a lazy module); call the model once, and "
                "optimise it then"
            )
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            moves = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
            if moves and attribute in reading_of(type(module)).in_calls:
                path = f"{name}.{attribute}" if name else attribute
                raise Unsuitable(
                    f"{path} is a {type(value).__name__}, which calls move on and nothing winds back; keep "
                    "what calls count in a buffer, or draw from a torch.Generator"
                )
        if module is model:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsuitable(
                f"{name} is a scripted module, which has no Python forward to change; "
                "script it after kpt.optimize, or give its Python module"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise Unsuitable(
                f"compile() was called on {name}, so that its calls run what torch.compile made of it and no "
                f"other forward; set its _compiled_call_impl = None first to have it optimised instead"
            )
        for hooks in workspace.CALLED_HOOKS:
            for hook in (getattr(module, hooks, None) or {}).values():
                if is_own(model, hook):
                    continue
                raise Unsuitable(
                    f"{name} has a hook ({hooks.strip('_')}), which an optimised forward would bypass; "
                    "remove it, or optimise the modules inside"
                )
    if "fsdp" in type(model).__module__.lower() or any("FSDP" in type(m).__name__ for m in model.modules()):
        raise Unsuitable("the model is sharded (FSDP); optimise it before it is wrapped")
    kinds = {type(t) for t in (*model.parameters(), *model.buffers())}
    foreign = kinds - {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
    if foreign:
        raise Unsuitable(
            f"parameters are {', '.join(sorted(k.__name__ for k in foreign))}; plain tensors are expected"
        )
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        raise Unsuitable("parameters are on the meta device; load weights first")
    hidden = _hidden(model)
    if hidden is not None:
        raise Unsuitable(hidden)


def foreign_kind(tensor: torch.Tensor) -> str:
    """What makes ``tensor`` other than a plain one, or an empty string."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return type(tensor).__name__
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantised"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").strip("_")


def refuse_bypassed(runner: Runner, plain: torch.nn.Module, call: Call) -> None:
    """Refuse a model whose class answers calls without its forward, where a plan would stand.

    Raises:
        Unsuitable: with the reason.
    """
    if type(plain).__call__ is torch.nn.Module.__call__:
        return
    own, forward, heard = plain.__dict__.get("forward"), plain.forward, []

    def listening(*args: Any, **kwargs: Any) -> Any:
        heard.append(True)
        return forward(*args, **kwargs)

    plain.__dict__["forward"] = listening
    given = call.clone()
    try:
        with runner.buffers_kept(), torch.no_grad():
            plain(*given.args, **given.kwargs)
    except Exception as error:  # noqa: BLE001 - calls take other arguments than the forward
        _log.debug("Calls of the model take something else than its forward: %s", error)
        return
    finally:
        if own is None:
            del plain.__dict__["forward"]
        else:
            plain.__dict__["forward"] = own
    if not heard:
        raise Unsuitable(
            f"{type(plain).__name__} has a __call__ of its own that does not run the forward, so that no "
            "call would reach a plan; optimise the modules inside"
        )


def _runs_with_gradients(runner: Runner, plain: torch.nn.Module, call: Call) -> bool:
    given = call.clone()
    try:
        with runner.buffers_kept(), torch.enable_grad():
            plain.forward(*given.args, **given.kwargs)
    except Exception:  # noqa: BLE001 - the forward itself fails, which the first error says
        return False
    return True


def explain_failure(
    model: torch.nn.Module, runner: Runner, plain: torch.nn.Module, call: Call, error: Exception
) -> None:
    """Return if ``error`` is the user's, the example being one that the model cannot run.

    Raises:
        Unsuitable: the model may well run it, and only what a run does beside the forward cannot.
    """
    told = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if model._forward_pre_hooks:
        raise Unsuitable(
            f"the forward does not take the example itself ({told}), and the model has a forward pre-hook, "
            "which may change what it is called with; optimise without examples, so that a call of the "
            "forward is observed, or optimise the modules inside"
        ) from error
    if isinstance(error, torch.OutOfMemoryError):
        return
    if not runner.training:
        if torch.is_grad_enabled() and _runs_with_gradients(runner, plain, call):
            raise Unsuitable(
                "the forward runs only where gradients are recorded, as one that takes a gradient itself "
                f"({told}), and inference is optimised without; put `with torch.enable_grad():` around what "
                "it differentiates, or optimise the modules inside"
            ) from error
        return
    try:
        with torch.enable_grad():
            plain.forward(*call.clone().args, **call.clone().kwargs)
    except Exception:  # noqa: BLE001 - the forward itself fails, which the first error says
        return
    raise Unsuitable(
        f"the model is in training mode, and no gradient can be taken through its outputs ({told}); "
        "call model.eval() to optimise it for inference"
    ) from error
