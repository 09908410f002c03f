"""Declared dynamic dimensions: 200 random lengths, no compilation after warm-up, nothing wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import kpt

transformers = pytest.importorskip("transformers")
pytest.importorskip("kpt_plugin_cpu")


def small_encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=256, num_attention_heads=4, num_hidden_layers=2, vocab_size=500
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def call(batch: int, length: int, *, ragged: bool, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 500, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if ragged and length > 1:
        for row in range(1, batch):
            keep = int(torch.randint(1, length + 1, (1,), generator=generator))
            mask[row, keep:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_two_hundred_lengths_run_what_was_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    model, untouched = small_encoder(), small_encoder()
    names = {0: "batch", 1: "sequence"}
    kpt.optimize(
        model,
        call(3, 24, ragged=True, seed=1),
        level="exact",
        dynamic_shapes={"input_ids": names, "attention_mask": names},
        budget=150.0,
    )
    receipt = kpt.report(model)
    assert receipt.optimized, receipt
    assert any(entry.phase == "compile" for entry in receipt.accepted), receipt
    from kpt.transaction.dispatch import plan_of

    compiled = plan_of(model).committed.applied.compiled
    graphs = sum(item.graphs for item in compiled)
    draw = random.Random(0)
    with torch.no_grad():
        for number in range(200):
            given = call(draw.randint(1, 6), draw.randint(1, 90), ragged=number % 2 == 0, seed=number)
            mine, true = model(**given)[0], untouched(**given)[0]
            assert mine.shape == true.shape
            kept = given["attention_mask"].bool()
            torch.testing.assert_close(mine[kept], true[kept], rtol=1e-3, atol=1e-4)
            if number % 20 == 0:  # a padded row says the same as the row alone
                row = given["attention_mask"][-1].bool()
                alone = untouched(input_ids=given["input_ids"][-1:, row])[0]
                torch.testing.assert_close(mine[-1:, row], alone, rtol=1e-3, atol=1e-4)
    counts = kpt.report(model).calls
    assert sum(item.graphs for item in compiled) == graphs, "something was compiled after warm-up"
    assert counts["optimized"] + counts["fallback"] == 200
    assert counts["optimized"] >= 190, counts
