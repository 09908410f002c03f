"""Declared dynamic dimensions: 200 random lengths, no compilation after warm-up, nothing wrong."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import kpt
import slow_models
from fingerprints import optimized
from kpt.compiling import CompiledForward
from kpt.specs import PassSpec, Variant

transformers = pytest.importorskip("transformers")
pytest.importorskip("kpt_plugin_cpu")


def small_encoder(width: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=500,
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
    import few_variants

    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    model, untouched = small_encoder(), small_encoder()
    names = {0: "batch", 1: "sequence"}
    kpt.optimize(
        model,
        call(3, 24, ragged=True, seed=1),
        level="exact",
        dynamic_shapes={"input_ids": names, "attention_mask": names},
        plugins=[few_variants.CompilerAndMasks()],
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


class CompiledOnce(slow_models.WholeByInductor):
    """The whole forward in one dynamic graph, of which a batch of one is no part."""

    def apply(self, model: torch.nn.Module, variant: Variant) -> Callable[[], None]:
        dims = {"x": {0: "batch"}}
        self.compiled = model.forward = CompiledForward(model.forward, backend="inductor", dynamic_dims=dims)
        return lambda: model.__dict__.pop("forward", None)


@torch.no_grad()
@pytest.mark.parametrize("drawn", [1, 5])
def test_a_batch_of_one_is_prepared_for_whatever_sizes_are_drawn(drawn, monkeypatch):
    """All sizes that are drawn may be one, and all may be others."""
    monkeypatch.setattr("kpt.judge.draws.drawn_sizes", lambda *_: [{"batch": drawn}])
    model = slow_models.net()
    options = {
        "dynamic_shapes": {"x": {0: "batch"}},
        "plugins": [slow_models.plugin(CompiledOnce)],
        "budget": 60.0,
    }
    optimized(model, torch.randn(32, 16), **options)
    for size in (1, 3, 7, 32):
        model(torch.randn(size, 16))
    assert kpt.report(model).calls["optimized"] == 4, kpt.report(model).calls


class PackingAlone:
    """The cpu plugin's pass for padded batches, and nothing beside it."""

    @kpt.hookimpl
    def kpt_passes(self) -> Iterator[PassSpec]:
        yield PassSpec("pack-padding", "shapes", "kpt_plugin_cpu.packing:PackPadding")


def mostly_padding(batch: int, length: int, longest: int, seed: int) -> dict[str, torch.Tensor]:
    """One row as long as the longest, all others short; all may be padded further, up to ``length``."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(0, 500, (batch, length), generator=generator), torch.zeros(batch, length)
    mask[0, :longest] = 1
    for row in range(1, batch):
        mask[row, : int(torch.randint(1, longest // 4, (1,), generator=generator))] = 1
    return {"input_ids": ids, "attention_mask": mask.long()}


def test_outputs_of_rows_at_their_own_lengths_have_the_declared_sizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each group of rows gives outputs of another length: they come back as long as the inputs were."""
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("kpt_plugin_cpu.packing.fixed_seconds", lambda *_: 0.0)  # else short ones stay whole
    model, untouched = small_encoder(512), small_encoder(512)
    names = {0: "batch", 1: "sequence"}
    kpt.optimize(
        model,
        mostly_padding(12, 160, 160, seed=1),
        dynamic_shapes={"input_ids": names, "attention_mask": names},
        plugins=[PackingAlone()],
        budget=60.0,
    )
    receipt = kpt.report(model)
    assert [entry.name for entry in receipt.accepted] == ["pack-padding:by length"], receipt
    from kpt.transaction.dispatch import plan_of

    ((_, packing),) = plan_of(model).committed.applied.behaviours
    packing.split = packing.whole = 0
    draw = random.Random(0)
    with torch.no_grad():
        for number in range(30):
            longest = draw.randint(8, 160)
            given = mostly_padding(draw.randint(2, 12), longest + draw.randint(0, 9), longest, seed=number)
            mine, true = model(**given)[0], untouched(**given)[0]
            kept = given["attention_mask"].bool()
            assert mine.shape == true.shape == (*kept.shape, 512)
            torch.testing.assert_close(mine[kept], true[kept], rtol=1e-3, atol=1e-4)
            row = int(kept.sum(1).argmin())  # the shortest says the same as it does alone
            alone = untouched(input_ids=given["input_ids"][row : row + 1, kept[row]])[0]
            torch.testing.assert_close(mine[row : row + 1, kept[row]], alone, rtol=1e-3, atol=1e-4)
    assert packing.split >= 28 and packing.split + packing.whole == 30
    assert kpt.report(model).calls["optimized"] == 30
