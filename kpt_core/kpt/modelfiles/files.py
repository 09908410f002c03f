"""Single files: safetensors, state dicts, pickles and exported programs."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpt.modelfiles import pickles
from kpt.modelfiles.base import LoadedModel, ModelFileError, Notice, unreadable
from kpt.modelfiles.weights import module_in, weights_in, with_weights
from kpt.plugins.isolation import attempt
from kpt.plugins.status import one_line


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors in a safetensors file, by name. Raises `ModelFileError`."""
    if find_spec("safetensors") is None:
        raise ModelFileError(
            "missing-package", "Reading safetensors needs a package.", "pip install safetensors"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def from_torch_file(path: Path, arch: str | None, trust: bool, tell: Notice) -> LoadedModel:
    """The model in a file that torch wrote: a state dict, a pickled module or an exported program.

    Raises `ModelFileError`; with ``trust`` off it does so before anything in the file runs.
    """
    import torch

    facts = pickles.inspect(path)
    if any(member.endswith("models/model.json") for member in facts.members):
        _require_trust(path, facts, trust, tell, "an exported program")
        outcome = attempt(torch.export.load, str(path))
        if outcome.error is not None:
            raise unreadable(path, outcome.error) from outcome.error
        return _exported(path, outcome.value, facts.sha256)
    if any("/code/" in member for member in facts.members):
        raise ModelFileError(
            "torchscript",
            f"{path} is a TorchScript archive, which has no modules to optimise.",
            "Save the state dict of the original model and pass --arch module:factory.",
        )
    if not facts.readable or (facts.members and not _has_data(facts)):
        reason = facts.fault or "it is an archive without data.pkl"
        raise ModelFileError(
            "truncated", f"{path} is damaged or no model file: {reason}.", "Download or save it again."
        )
    outcome = attempt(torch.load, path, map_location="cpu", weights_only=True)
    if isinstance(outcome.error, pickle.UnpicklingError):
        _require_trust(path, facts, trust, tell, "a pickle that is more than weights", outcome.error)
        outcome = attempt(torch.load, path, map_location="cpu", weights_only=False)
        if outcome.error is not None:
            raise ModelFileError(
                "pickle-failed",
                f"{path} raised {one_line(outcome.error)} while it was unpickled.",
                "It needs the modules that define its classes: run this in their folder, or install them. "
                "Classes of a script (__main__) are found nowhere: save the state dict and pass --arch.",
            ) from outcome.error
    elif outcome.error is not None:
        raise unreadable(path, outcome.error) from outcome.error
    content: Any = outcome.value
    module = module_in(path, content, tell)
    if module is not None:
        return LoadedModel(module.eval(), "pickle", path, facts.sha256)
    return with_weights(path, "state-dict", weights_in(path, content, tell), arch, tell, facts.sha256)


def _exported(path: Path, program: Any, digest: str) -> LoadedModel:
    """The module of an exported program, with the call that it was exported with.

    Its ``eval`` raises, since no flag changes a graph; the flags are set here, for whoever reads them.
    """
    module = program.module()
    for part in module.modules():
        part.training = False
    build = {"folder": str(path.absolute())}  # of a graph there is no other source
    return LoadedModel(module, "exported", path, digest, build, program.example_inputs)


def _has_data(facts: pickles.PickleFacts) -> bool:
    return any(member.rpartition("/")[2] == "data.pkl" for member in facts.members)


def _require_trust(
    path: Path,
    facts: pickles.PickleFacts,
    trust: bool,
    tell: Notice,
    what: str,
    cause: BaseException | None = None,
) -> None:
    named = ", ".join(facts.globals) or "none"
    if trust:
        tell(f"{path} is {what} and is executed while it is loaded, as --trust-model allows.")
        tell(f"  sha256  {facts.sha256}")
        tell(f"  globals {named}")
        return
    raise ModelFileError(
        "untrusted",
        f"{path} is {what}: loading it runs its code. sha256 {facts.sha256}; globals: {named}.",
        "Pass --trust-model if you trust where it comes from, or save model.state_dict() and pass "
        "--arch module:factory.",
    ) from cause
