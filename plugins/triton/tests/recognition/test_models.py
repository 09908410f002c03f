"""Models of transformers that hold what the plugin's recognisers look for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from triton_ops import REGISTRY, captured, found

from kpt import ops

transformers = pytest.importorskip("transformers")


def bert(kind: str, **options: object) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=99,
        **options,
    )
    return transformers.AutoModel.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_the_residual_norms_and_embeddings_of_bert_and_its_kin(kind: str) -> None:
    more = {"embedding_size": 32} if kind == "electra" else {}
    recognition = found(bert(kind, **more), torch.randint(3, 99, (2, 7)))
    norms = {site.path for site in recognition.of("add_layer_norm")}
    assert norms == {f"encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.output", "output")}
    assert [site.path for site in recognition.of("embedding_sum_norm")] == ["embeddings"]
    activations = {site.path for site in recognition.of("bias_activation")}
    assert {f"encoder.layer.{i}.intermediate" for i in (0, 1)} <= activations
    # dropout makes them something else in training
    assert {site.modes for site in recognition.of("add_layer_norm")} == {("inference",)}


def test_the_group_norm_of_wav2vec2() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    recognition = found(transformers.Wav2Vec2Model(config), torch.randn(1, 400))
    assert [site.path for site in recognition.of("group_norm")] == [
        "feature_extractor.conv_layers.0.layer_norm"
    ]


class OnlyTheLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(ids, labels=labels, use_cache=False).loss  # type: ignore[no-any-return]


class LossAndLogits(OnlyTheLoss):
    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        out = self.model(ids, labels=labels, use_cache=False)
        return out.loss, out.logits


def qwen() -> nn.Module:
    config = transformers.Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        intermediate_size=64,
        vocab_size=101,
    )
    return transformers.Qwen3ForCausalLM(config)  # type: ignore[no-any-return]


def test_the_heads_and_the_loss_of_qwen3() -> None:
    ids = torch.randint(0, 101, (2, 9))
    gm, _ = captured(OnlyTheLoss(qwen()), ids, ids)
    wanted = {"qk_norm_rope", "linear_cross_entropy"}
    recognition = ops.recognise_graph(gm, registry=REGISTRY, only=wanted)
    assert len(recognition.of("qk_norm_rope")) == 2
    (loss,) = recognition.of("linear_cross_entropy")
    assert loss.binding.arguments["hidden"] == "x.flatten(0, -2)"
    gm, _ = captured(LossAndLogits(qwen()), ids, ids)
    assert not ops.recognise_graph(gm, registry=REGISTRY, only={"linear_cross_entropy"}).sites
