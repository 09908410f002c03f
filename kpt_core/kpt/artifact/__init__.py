"""Artifacts: an optimised model as a folder of safe weights, a recipe, and inputs to verify it with.

``model.safetensors`` holds the weights, ``recipe.json`` the plan, how the model is built, and the
checksum of every other file, ``verify/`` the inputs of one call with the original's and the optimised
model's outputs, ``receipt.json`` the receipt. Only a model that can be built neither from a
configuration nor by a named factory is stored as a pickle too, and that one needs ``trust=True``.
"""

from __future__ import annotations

from kpt.artifact.folder import ArtifactError
from kpt.artifact.reading import load
from kpt.artifact.writing import save

__all__ = ["ArtifactError", "load", "save"]
