"""What treats tokens apart runs for the tokens of a padded batch that count; all else sees all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import kpt

sys.path.insert(0, str(Path(__file__).parent))

from observing import Only, applied, observe, skips, variants

from kpt.compiling import CapturedForward, CompiledForward, CompiledModule, collect
from kpt_plugin_cpu import packing
from kpt_plugin_cpu.token_graph import TokenGraph
from kpt_plugin_cpu.token_packing import PackTokens

DYNAMIC = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
WIDTH = 24


class Layer(nn.Module):
    """A transformer's layer; ``between`` acts on the hidden states, [B, S, WIDTH], before it."""

    def __init__(self, between=None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)
        self.between = between

    def forward(self, hidden, mask):
        if self.between is not None:
            hidden = self.between(hidden)
        batch, length, _ = hidden.shape
        parts = [part.view(batch, length, 4, -1) for part in self.qkv(self.norm(hidden)).chunk(3, -1)]
        queries, keys, values = (part.transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return hidden + self.narrow(functional.gelu(self.wide(self.norm(hidden))))


class Encoder(nn.Module):
    """Two layers over embedded tokens and positions; the first token's state and all of them."""

    def __init__(self, between=None) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Layer(between) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[:, None, None, :].bool()
        places = torch.arange(input_ids.shape[1]).unsqueeze(0)
        hidden = self.words(input_ids) + self.positions(places)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return {"hidden": hidden, "first": hidden[:, 0]}


def padded(lengths: list[int], width: int | None = None) -> dict[str, torch.Tensor]:
    width = width or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(1, 50, mask.shape) * mask, "attention_mask": mask}


def packed(model: nn.Module, call: dict[str, torch.Tensor]):
    """(the pass, the workspace it is applied to, its undo)."""
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=DYNAMIC))
    return applied(PackTokens, model, offer)


def agree(space: nn.Module, model: nn.Module, call: dict[str, torch.Tensor], **bounds: float) -> None:
    got, expected = space.forward(**call), model(**call)
    kept = call["attention_mask"].bool()
    torch.testing.assert_close(got["hidden"][kept], expected["hidden"][kept], **bounds)
    torch.testing.assert_close(got["first"], expected["first"], **bounds)


def rows_seen(captured: CapturedForward, call: dict[str, torch.Tensor]) -> set[int]:
    """Over how many tokens the linears of one call ran."""
    seen: set[int] = set()
    linear = torch._C._nn.linear

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (functional.linear, linear):
                seen.add(args[0].shape[:-1].numel())
            return function(*args, **(kwargs or {}))

    with Watch():
        captured(**call)
    return seen


@torch.no_grad()
def test_linears_run_for_the_tokens_that_count_and_all_outputs_are_as_before():
    model = Encoder().eval()
    call = padded([9, 2, 4, 1])
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=DYNAMIC))
    assert offer.touches_mask and offer.predicted_gain > 1.3
    behaviour, space, undo = applied(PackTokens, model, offer)
    agree(space, model, call)
    assert behaviour.verify_applied(space) and "operations" in behaviour.effect()
    assert rows_seen(space.forward, call) == {16}
    # other sizes by the same graph; as many tokens as features, as positions, as rows
    for lengths in ([3, 5, 7, 9], [20, 1, 1, 2], [2, 2], [WIDTH, 1], [11, 13], [5, 4, 3, 2, 1]):
        agree(space, model, padded(lengths))
    agree(space, model, padded([3, 4], 7))  # a last column of nothing but padding
    assert space.forward.graphs == 1 and space.forward.misses == 0
    padding = ~call["attention_mask"].bool()
    assert not space.forward(**call)["hidden"][padding].any()
    undo()
    assert "forward" not in space.__dict__


@torch.no_grad()
def test_batches_that_are_not_padded_at_the_end_run_whole():
    model = Encoder().eval()
    behaviour, space, _ = packed(model, padded([9, 2, 4, 1]))
    left = {name: value.flip(1) for name, value in padded([9, 2, 4]).items()}
    holes = padded([9, 4, 4])
    holes["attention_mask"][0, 3] = 0
    for call in (left, holes, padded([6, 6, 6])):
        agree(space, model, call)
        assert rows_seen(space.forward, call) == {call["input_ids"].numel()}
    one = padded([5], 8)
    agree(space, model, one)
    assert not behaviour.dropped or one["attention_mask"].shape[0] == 1


def causal_mean(x):
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


def shifted(x):
    return torch.cat([x[:, :1], x[:, :-1]], 1)


def by_row(x):
    return x + x[:, :1].tanh()


def flattened(x):
    return functional.relu(x.reshape(-1, WIDTH)).view(x.shape) + x


def heads_apart(x):
    return x.unflatten(-1, (3, -1)).softmax(-1).flatten(-2)


def pooled(x, mask):
    """The mean over what counts, as sentence encoders take it."""
    kept = mask.unsqueeze(-1).expand(x.size()).to(x.dtype)
    return (x * kept * 2.0 + 0.0).sum(1, keepdim=True) / (2.0 * kept.sum(1, keepdim=True))


class Pools(Encoder):
    """A mean over what counts, in between and at the end; a mask up to the first word of a kind."""

    def forward(self, input_ids, attention_mask):
        early = (input_ids != 7).long().cumprod(1)
        bias = (1.0 - attention_mask.float()) * -1e9
        hidden = self.words(input_ids) * early.unsqueeze(-1)
        for layer in self.layers:
            hidden = layer(hidden + pooled(hidden, attention_mask), bias[:, None, None, :])
        hidden = hidden * attention_mask.float()[..., None]
        return {"hidden": hidden, "first": pooled(hidden, attention_mask)[:, 0]}


@torch.no_grad()
def test_what_a_mask_makes_of_padding_is_what_its_users_get():
    model = Pools().eval()
    behaviour, space, _ = packed(model, padded([9, 2, 4, 1]))
    for lengths in ([9, 2, 4, 1], [3, 7], [WIDTH, 2, 3]):
        call = padded(lengths)
        call["input_ids"][0, 0] = 7
        agree(space, model, call)
    assert behaviour.verify_applied(space) and behaviour.graphs.packed > 20


@torch.no_grad()
def test_what_is_wrong_in_one_row_shows_in_no_other():
    model = Encoder().eval()
    model.words.weight[49] = float("inf")
    _, space, _ = packed(model, padded([9, 2, 4, 1]))
    call = padded([9, 2, 4, 1])
    call["input_ids"].clamp_(max=48)
    call["input_ids"][0, 0] = 49
    got, expected = space.forward(**call)["hidden"], model(**call)["hidden"]
    kept = call["attention_mask"].bool()
    assert expected[0].isnan().any() and not expected[1:][kept[1:]].isnan().any()
    torch.testing.assert_close(got[kept], expected[kept], equal_nan=True)


class Pair(Encoder):
    """Queries and documents, each with lengths of its own."""

    def forward(self, input_ids, attention_mask, document, document_mask=None):
        other = attention_mask if document_mask is None else document_mask
        return {
            "query": super().forward(input_ids, attention_mask)["hidden"],
            "document": super().forward(document, other)["hidden"] if document_mask is not None
            else self.words(document),
        }  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inputs_with_lengths_of_their_own_are_not_taken_for_the_masks(masked, dynamic):
    query, document = padded([9, 2, 4, 1]), padded([1, 9, 3, 5])
    call = {**query, "document": document["input_ids"]}
    if masked:
        call["document_mask"] = document["attention_mask"]
    shapes = {name: {0: "batch", 1: "sequence"} for name in call} if dynamic else None
    (reason,) = skips(PackTokens(), observe(Pair().eval(), call, dynamic_shapes=shapes))
    assert "document" in reason or "another mask" in reason, reason


def test_a_batch_as_large_as_its_length_is_left_alone():
    model, call = Encoder().eval(), padded([4, 2, 3, 1])
    (offer,) = variants(PackTokens(), observe(model, call))
    behaviour, space, _ = applied(PackTokens, model, offer)
    with torch.no_grad():
        agree(space, model, call)
    with pytest.raises(RuntimeError, match="no batch and length of its own"):
        behaviour.verify_applied(space)


def in_place(x):
    made = x + 1.0
    doubled = made * 2.0
    return made.add_(doubled)


@pytest.mark.parametrize("between", [causal_mean, shifted, by_row, flattened, heads_apart, in_place])
@torch.no_grad()
def test_what_mixes_positions_or_sees_tokens_otherwise_gets_what_it_expects(between):
    model = Encoder(between).eval()
    behaviour, space, _ = packed(model, padded([9, 2, 4, 1]))
    for lengths in ([9, 2, 4, 1], [3, 7], [WIDTH, 2, 3]):
        agree(space, model, padded(lengths))
    assert behaviour.verify_applied(space)


class Masked(Encoder):
    """One mask, made of the ids, is multiplied with the hidden states, and keeps padding from attention."""

    def forward(self, input_ids, attention_mask):
        kept = (input_ids > 0) & attention_mask.bool()
        hidden = self.words(input_ids) * kept.unsqueeze(-1).float()
        for layer in self.layers:
            hidden = layer(hidden * kept.unsqueeze(-1), kept[:, None, None, :])
        return {"hidden": hidden, "first": hidden[:, 0], "kept": kept}


@pytest.mark.parametrize("dynamic", [DYNAMIC, None])
@torch.no_grad()
def test_masks_are_computed_for_padding_too(dynamic):
    model, call = Masked().eval(), padded([9, 2, 4, 1])
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=dynamic))
    behaviour, space, _ = applied(PackTokens, model, offer)
    for lengths in ([9, 2, 4, 1], [1, 9, 9, 3]):
        call = padded(lengths)
        agree(space, model, call)
        assert torch.equal(space.forward(**call)["kept"], call["attention_mask"].bool())
    assert behaviour.verify_applied(space) and rows_seen(space.forward, call) == {22}


class Flagged(Encoder):
    """As torch's own encoders have it: True where a position is padding."""

    def forward(self, input_ids, src_key_padding_mask):
        return super().forward(input_ids, ~src_key_padding_mask)


@torch.no_grad()
def test_masks_may_mark_what_is_padding():
    model, given = Flagged().eval(), padded([9, 2, 4, 1])
    call = {"input_ids": given["input_ids"], "src_key_padding_mask": given["attention_mask"] == 0}
    (offer,) = variants(PackTokens(), observe(model, call))
    behaviour, space, _ = applied(PackTokens, model, offer)
    got, expected = space.forward(**call)["hidden"], model(**call)["hidden"]
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(got[kept], expected[kept])
    assert not got[~kept].any() and behaviour.verify_applied(space)
    assert rows_seen(space.forward, call) == {16}


class Stack(nn.Module):
    """torch's encoder, whose layers are one operation each when they are captured."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, src_key_padding_mask):
        return self.layers(self.words(input_ids), src_key_padding_mask=src_key_padding_mask)


@torch.no_grad()
def test_layers_that_are_one_operation_are_taken_apart_first():
    model, given = Stack().eval(), padded([9, 2, 4, 1])
    call = {"input_ids": given["input_ids"], "src_key_padding_mask": given["attention_mask"] == 0}
    dynamic = {name: {0: "batch", 1: "sequence"} for name in call}
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=dynamic))
    behaviour, space, _ = applied(PackTokens, model, offer)
    kept = given["attention_mask"].bool()
    torch.testing.assert_close(space.forward(**call)[kept], model(**call)[kept])
    assert behaviour.verify_applied(space) and behaviour.graphs.packed > 10


class Writes(Encoder):
    """Layers' outputs are written to once a linear has seen them, through a view of other axes."""

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids)
        wide = self.layers[0].wide(hidden)
        heads = hidden.unflatten(-1, (4, -1)).transpose(1, 2)
        heads.mul_(2.0)
        hidden = hidden + self.layers[0].narrow(wide + self.layers[0].wide(hidden))
        return {"hidden": hidden, "first": hidden[:, 0]}


@torch.no_grad()
def test_what_is_written_to_in_place_is_not_packed():
    model = Writes().eval()
    behaviour, space, _ = packed(model, padded([9, 2, 4, 1]))
    agree(space, model, padded([9, 2, 4, 1]))
    agree(space, model, padded([3, 12]))
    assert behaviour.graphs.packed == 2  # the sum of the wide states, and what makes it narrow


@pytest.mark.parametrize("compiler", [None, "eager", "inductor"])
@torch.no_grad()
def test_a_compiler_that_comes_after_compiles_the_packed_graph(compiler):
    model = Encoder().eval()
    call = padded([9, 2, 4, 1])
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=DYNAMIC))
    with collect() as made:
        behaviour, space, undo = applied(PackTokens, model, offer)
        if compiler:
            compiled = CompiledModule(space, backend=compiler, dynamic_dims=DYNAMIC)
        agree(space, model, call, rtol=1e-4, atol=1e-5)
        agree(space, model, padded([3, 11, 2]), rtol=1e-4, atol=1e-5)
    assert behaviour.graphs.packed > 20
    assert len(made) == 1 and made[0].graphs == 1
    if compiler:
        assert made[0] is compiled
        compiled.dispose()
        assert isinstance(space.forward, CapturedForward)
        agree(space, model, call)  # an idle one calls the original
    undo()
    agree(space, model, call)


@torch.no_grad()
def test_further_inputs_are_made_anew_for_each_call_of_one_shape():
    """Two masks of one shape: code that is looked up by shapes alone would use the first one's tokens."""
    model = Encoder().eval()
    _, space, _ = packed(model, padded([9, 2, 4, 1]))
    for lengths in ([9, 2, 4, 1], [1, 4, 2, 9], [4, 9, 1, 2]):
        agree(space, model, padded(lengths))
    assert isinstance(space.forward, CompiledForward)
    assert space.forward.lookup((), padded([9, 2, 4, 1])) is None


@pytest.mark.parametrize("axes", [(), (1,), (0,)])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_sizes_may_be_fixed(axes, rows):
    """The number of tokens that count varies all the same; one length is that of the features."""
    model = Encoder().eval()
    width = WIDTH if 1 not in axes else 9
    dynamic = {name: dict.fromkeys(axes) for name in DYNAMIC} if axes else None
    if dynamic:
        dynamic = {name: {axis: str(axis) for axis in axes} for name in DYNAMIC}
    call = padded([5, 2, 4][:rows], width)
    (offer,) = variants(PackTokens(), observe(model, call, dynamic_shapes=dynamic))
    behaviour, space, _ = applied(PackTokens, model, offer)
    for lengths in ([5, 2, 4], [9, 1, 1], [9, 9, 9], [2, 3, 3]):
        agree(space, model, padded(lengths[:rows], width))
    if 1 in axes:
        agree(space, model, padded([7, 11, 3][:rows]))
    assert behaviour.verify_applied(space) and behaviour.graphs.packed > 15
    assert rows_seen(space.forward, call) == {sum([5, 2, 4][:rows])}
    assert space.forward.graphs == 1


def test_examples_without_padding_do_not_stand_in_the_way():
    calls = [padded([7]), padded([9, 2, 4, 1]), padded([5, 5])]
    (offer,) = variants(PackTokens(), observe(Encoder().eval(), calls, dynamic_shapes=DYNAMIC))
    assert offer.params["like"] == ["input_ids"]


def test_offers_name_what_is_missing():
    model = Encoder().eval()
    full = observe(model, padded([9, 9]), dynamic_shapes=DYNAMIC)
    assert "0% of the positions are padding" in skips(PackTokens(), full)[0]


class Leaks(Encoder):
    """A mean over all positions, padding among them."""

    def forward(self, input_ids, attention_mask):
        found = super().forward(input_ids, attention_mask)
        return {"pooled": found["hidden"].mean(1)}


def test_a_model_whose_output_depends_on_padding_is_left_as_it_was():
    model = Leaks().eval()
    before = model(**padded([9, 2, 4, 1]))["pooled"].shape
    calls = [padded([30, 2, 4, 1, 3, 5, 20, 7]) for _ in range(3)]
    found = kpt.optimize(
        model, calls, plugins=[Only("pack-tokens")], dynamic_shapes=DYNAMIC, cache=False, budget=30.0
    )
    receipt = kpt.report(found)
    assert not receipt.optimized and "forward" not in vars(found)
    (entry,) = [each for each in receipt.rejected if each.name.startswith("pack-tokens")]
    assert entry.rule == "value", entry.reason
    assert before == found(**padded([9, 2, 4, 1]))["pooled"].shape


def test_a_graph_without_a_mark_is_not_touched():
    graph = torch.fx.symbolic_trace(nn.Linear(4, 4))
    code = graph.code
    passed = TokenGraph()
    assert passed(graph, []).code == code and passed.packed == 0


def test_tokens_are_left_out_before_batches_are_split(monkeypatch):
    """However little a call is taken to cost whatever its size: that is an estimate from a noisy moment."""
    monkeypatch.setattr(packing, "fixed_seconds", lambda *_: 1e-9)
    call = padded([64, 3, 5, 9, 20, 40, 7, 4])
    observation = observe(Encoder().eval(), call, dynamic_shapes=DYNAMIC)
    (split,) = variants(packing.PackPadding(), observation)
    (tokens,) = variants(PackTokens(), observation)
    assert 1.0 < split.predicted_gain < tokens.predicted_gain
