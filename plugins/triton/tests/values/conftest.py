"""These tests run kernels: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    absent = pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1")
    for item in items:
        if str(item.path).startswith(here) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)
