"""Model folders: ``config.json`` beside weights, as ``save_pretrained`` writes them.

Nothing is downloaded, and nothing in the folder is executed unless the user trusts it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kpt.specs import AdapterError
from kpt_plugin_huggingface.library import class_called, transformers

CONFIG = "config.json"
#: Weights as pickles, and the safetensors that transformers takes instead where there are any.
_PICKLES = {"pytorch_model*.bin": "model*.safetensors", "adapter_model*.bin": "adapter_model*.safetensors"}
#: Settings that may name a kernel on the hub ("kernels-community/…"), which is code.
_KERNELS = ("attn_implementation", "_attn_implementation")
_SHOWN = 8


def configuration(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` says, or None where the folder has none or it is of another library.

    Raises `AdapterError` where the file is damaged.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError("truncated", f"{file} is not JSON: {error}.", "Download it again.") from error
    known = isinstance(facts, dict) and any(
        key in facts for key in ("model_type", "architectures", "auto_map")
    )
    return facts if known else None


def executes(folder: str) -> tuple[str, ...]:
    """Names of files in ``folder`` that loading it would execute, and kernels that it would fetch."""
    path = Path(folder)
    facts = configuration(path)
    if facts is None:
        return ()
    found: list[str] = []
    if facts.get("auto_map"):
        code = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.py"))
        found += code or [f"code from elsewhere ({facts['auto_map']})"]
    for pattern, safe in _PICKLES.items():
        if not any(path.glob(safe)):
            found += sorted(file.name for file in path.glob(pattern))
    found += [f"a kernel from the hub ({facts[key]})" for key in _KERNELS if "/" in str(facts.get(key) or "")]
    return tuple(found)


def load(folder: str, *, trust: bool) -> Any:
    """The model in ``folder`` in eval mode, or None where it is none of transformers'.

    It is of the class that the configuration names first, with its head, and in the dtype of the file.
    Raises `AdapterError`.
    """
    path = Path(folder)
    facts = configuration(path)
    if facts is None:
        return None
    library = transformers()
    loader = _loader(facts, library)
    try:
        model, info = loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=trust,
            use_safetensors=None if trust else True,
            ignore_mismatched_sizes=True,  # its own error names none of them; they are refused below
            output_loading_info=True,
        )
    except Exception as error:  # the library raises anything, from OSError to KeyError
        first = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        raise AdapterError(
            "truncated",
            f"transformers {library.__version__} cannot load {folder}: {type(error).__name__}: {first}.",
            "Check that the folder holds all weight files, and that this version knows the model.",
        ) from error
    # transformers fills what is missing or of another size with random numbers and goes on; nobody wants
    # that optimised. What the model has no place for it names on stderr.
    sizes = [
        f"{name} is {tuple(stored)}, the model has {tuple(built)}"
        for name, stored, built in sorted(info.get("mismatched_keys") or ())
    ]
    if sizes:
        raise AdapterError(
            "wrong-shapes",
            f"The weights in {folder} are not those that its {CONFIG} describes: {_some(sizes)}.",
            "Download both files again.",
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise AdapterError(
            "missing-keys", f"The weights in {folder} lack {_some(missing)}.", "Download it again."
        )
    return model.eval()


def _loader(facts: dict[str, Any], library: Any) -> Any:
    """The class that the configuration names, or the one that chooses among the folder's own."""
    own = facts.get("auto_map") or {}
    if not own:
        named = (facts.get("architectures") or [None])[0]
        return class_called(named, "PreTrainedModel") or library.AutoModel
    names = sorted((name for name in own if name.startswith("AutoModel")), key=len)
    return getattr(library, names[0], library.AutoModel) if names else library.AutoModel


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
