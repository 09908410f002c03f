"""transformers, imported with an error that says what to do, and its classes by name."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from kpt.specs import AdapterError


def transformers() -> Any:
    """The library. Raises `AdapterError` where it is not installed."""
    if find_spec("transformers") is None:
        raise AdapterError(
            "missing-package",
            "Hugging Face models need the package transformers.",
            "pip install transformers",
        )
    import transformers

    return transformers


def class_called(name: object, base: str) -> Any:
    """The class that transformers exports as ``name`` if it is a subclass of its ``base``, else None.

    Names come from files of anybody's: nothing else that transformers exports is returned.
    """
    library = transformers()
    found = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, getattr(library, base)) else None
