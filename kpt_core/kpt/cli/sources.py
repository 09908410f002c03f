"""From the options of a command to a model and its example inputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpt.cli.output import CommandError, note, usage

if TYPE_CHECKING:
    from kpt.modelfiles import LoadedModel
    from kpt.plugins import Registry


@dataclass(frozen=True)
class Source:
    """A model in eval mode on its device, with example inputs on the same device."""

    loaded: LoadedModel
    inputs: Any
    registry: Registry
    device: str

    @property
    def model(self) -> Any:
        return self.loaded.model


def open_source(
    model: Path,
    *,
    arch: str,
    inputs: Sequence[str],
    device: str,
    trust: bool,
    plugins: list[str] | None,
    dynamic: Any = None,
) -> Source:
    """Load ``model`` and make or load its inputs; errors say which option mends them."""
    require_torch()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries that load models draw bars with tqdm
    import torch

    from kpt.modelfiles import load_model
    from kpt.plugins import registry

    # A factory, or the classes in a pickle, usually live in the folder that the user is in, which a program
    # does not search. It comes last, so that a file called like a module of some library cannot stand in
    # for it, and only where the user allows code to run.
    if (arch or trust) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found = registry(plugins)
    loaded = load_model(model, arch=arch or None, trust=trust, registry=found, notice=note)
    from kpt.cli.inputs import default_inputs, example_inputs

    if inputs:
        examples = example_inputs(inputs)
    elif loaded.example is not None:
        examples = _exported_call(loaded.example)
    else:
        examples = default_inputs(loaded.model, found)
    if device:
        try:
            target = torch.device(device)
            loaded.model.to(target)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
            raise usage(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        if target.type == "meta":
            raise usage(
                "--device meta holds no values, so that nothing can be run or compared there.",
                "Name a device that computes, for instance cpu or cuda:0.",
            )
    tensors = [*loaded.model.parameters(), *loaded.model.buffers()]
    where = str(tensors[0].device) if tensors else (device or "cpu")
    source = Source(loaded, _fitted(loaded, _moved(examples, where)), found, where)
    _check_inputs(source, dynamic)
    return source


def _exported_call(example: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    from kpt.judge.calls import Call

    note("The example inputs are those that the program was exported with.")
    return [Call(*example)]


def _fitted(loaded: LoadedModel, examples: Any) -> Any:
    """``examples``; those by name by position where an exported program takes nothing by name."""
    if loaded.example is None:
        return examples
    import inspect

    from kpt.judge.calls import Call, as_calls

    positional = len(loaded.example[0])
    names = list(inspect.signature(loaded.model.forward).parameters)[:positional]

    def fitted(call: Call) -> Call:
        if call.args or not set(names) <= call.kwargs.keys():
            return call
        rest = {name: value for name, value in call.kwargs.items() if name not in names}
        return Call(tuple(call.kwargs[name] for name in names), rest)

    try:
        return [fitted(call) for call in as_calls(examples)]
    except (TypeError, ValueError):
        return examples  # what is wrong with them is said where all examples are checked


def _check_inputs(source: Source, dynamic: Any) -> None:
    """Raise a usage error where the inputs or dynamic dimensions are not what the forward takes."""
    import inspect

    from kpt.judge.calls import as_calls
    from kpt.judge.draws import InputSpec

    try:
        calls = as_calls(source.inputs)
    except (TypeError, ValueError) as error:
        raise usage(f"--inputs: {error}.") from error
    signature = inspect.signature(source.model.forward)
    try:
        for call in calls:
            signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise usage(
            f"--inputs do not fit {type(source.model).__name__}.forward{signature}: {error}.",
            "Name them as its parameters are: --inputs 'NAME=DTYPE[SHAPE]:VALUES …'.",
        ) from error
    try:
        InputSpec.from_calls(calls, dynamic, source.model.forward)
    except (TypeError, ValueError) as error:
        raise usage(f"--dynamic: {error}.", "Write NAME:AXIS=SYMBOL,… for inputs of the model.") from error


@contextmanager
def blaming_the_inputs(source: Source) -> Iterator[None]:
    """Where the block fails and the model alone fails on its inputs too, say that instead."""
    try:
        yield
    except Exception:
        check_runs(source)
        raise


def check_runs(source: Source) -> None:
    """Raise `CommandError` where the untouched model does not run on its inputs."""
    import torch

    from kpt.judge.calls import as_calls
    from kpt.plugins.isolation import attempt
    from kpt.plugins.status import one_line

    with torch.no_grad():
        alone = attempt(as_calls(source.inputs)[0].clone().on, source.model)
    if alone.error is not None:
        raise model_fails(one_line(alone.error)) from alone.error


def model_fails(reason: str) -> CommandError:
    """The error for inputs that the untouched model itself does not run on."""
    return CommandError(
        "model-fails",
        f"The model itself does not run on these inputs: {reason}.",
        "Check the shapes, dtypes and ranges of --inputs.",
    )


def require_torch() -> None:
    """Raise a clear error where torch is not installed."""
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise CommandError("missing-package", "PyTorch is not installed.", "To mend it: pip install torch")


def _moved(value: Any, device: str) -> Any:
    import torch

    from kpt.judge.calls import Call

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Call):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(entry, device) for entry in value)
    return value
