"""Small random-weight models across the families of transformers, with inputs; knows nothing of kpt.

Each entry builds on any machine without a download and runs eagerly in milliseconds. Weights are random
but not degenerate: scales are not all one, shifts not all zero, running statistics not those of a fresh
module, and matrices large enough that the output depends on the input through every layer. A rewrite that
forgets one of them gives other values.

    model = FAMILIES["llama"].build()
    inputs = FAMILIES["llama"].example_inputs()
    model(**inputs)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from family_inputs import (
    VOCABULARY,
    Inputs,
    ids_only,
    image,
    image_and_text,
    spectrogram,
    text,
    text_to_text,
    waveform,
)

if TYPE_CHECKING:
    import torch

KINDS = ("encoder", "decoder", "encoder-decoder", "vision", "audio", "mixture-of-experts", "state-space")


@dataclass(frozen=True)
class Family:
    """One small configuration: classes of transformers by name, its settings, and what it is called with."""

    name: str
    kind: str
    config_class: str
    model_class: str
    inputs: Inputs
    settings: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model in eval mode; the same ``seed`` gives the same weights."""
        import torch
        import transformers

        config = getattr(transformers, self.config_class)(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model_class)(config).eval()
            _roughen(model)
        return model

    def example_inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Keyword arguments of one call."""
        import torch

        return self.inputs(torch.Generator().manual_seed(seed))


def sample(count: int, seed: int | str) -> list[Family]:
    """``count`` families, of every kind if there is room; the same ``seed`` gives the same ones."""
    draw = random.Random(str(seed))
    by_kind = {kind: [family for family in FAMILIES.values() if family.kind == kind] for kind in KINDS}
    chosen = [draw.choice(by_kind[kind]) for kind in draw.sample(KINDS, len(KINDS))][:count]
    rest = [family for family in FAMILIES.values() if family not in chosen]
    return chosen + draw.sample(rest, max(0, min(count, len(FAMILIES)) - len(chosen)))


def _roughen(model: torch.nn.Module) -> None:
    """Move vectors and statistics away from their initial ones and zeros, and scale small matrices up."""
    import torch

    scaled = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, scaled):
                variance_kept = module.weight[0].numel() ** -0.5
                module.weight.mul_(max(1.0, variance_kept / float(module.weight.std())))
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


_TRANSFORMER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}
_GROUPED: Mapping[str, Any] = {**_TRANSFORMER, "num_key_value_heads": 2}
_SPECIAL: Mapping[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_T5: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    **_SPECIAL,
}
_VIT: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": 64,
    "patch_size": 8,
}
_WAVE: Mapping[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "conv_dim": (64, 64, 64),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
_EXPERTS: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def _table() -> list[Family]:
    encoder = _maker("encoder")
    decoder = _maker("decoder")
    seq2seq = _maker("encoder-decoder")
    vision = _maker("vision")
    audio = _maker("audio")
    moe = _maker("mixture-of-experts")
    ssm = _maker("state-space")
    return [
        encoder("bert", "Bert", "BertModel", text(padded=True), _TRANSFORMER),
        encoder(
            "roberta", "Roberta", "RobertaForSequenceClassification", text(), {**_TRANSFORMER, **_SPECIAL}
        ),
        encoder(
            "distilbert",
            "DistilBert",
            "DistilBertModel",
            text(padded=True),
            {"vocab_size": VOCABULARY, "dim": 128, "n_layers": 3, "n_heads": 4, "hidden_dim": 256},
        ),
        encoder("albert", "Albert", "AlbertModel", text(), {**_TRANSFORMER, "embedding_size": 64}),
        encoder(
            "electra", "Electra", "ElectraModel", text(padded=True), {**_TRANSFORMER, "embedding_size": 64}
        ),
        encoder("mpnet", "MPNet", "MPNetModel", text(padded=True), _TRANSFORMER),
        encoder(
            "deberta-v2",
            "DebertaV2",
            "DebertaV2Model",
            text(),
            {
                **_TRANSFORMER,
                "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"],
                "position_buckets": 32,
                "norm_rel_ebd": "layer_norm",
                "share_att_key": True,
            },
        ),
        encoder(
            "modernbert",
            "ModernBert",
            "ModernBertModel",
            text(),
            {**_TRANSFORMER, "local_attention": 16, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        ),
        encoder(
            "xlm-roberta",
            "XLMRoberta",
            "XLMRobertaForTokenClassification",
            text(padded=True),
            {**_TRANSFORMER, **_SPECIAL},
        ),
        encoder(
            "esm",
            "Esm",
            "EsmModel",
            text(),
            {**_TRANSFORMER, "position_embedding_type": "rotary", "pad_token_id": 0, "mask_token_id": 3},
        ),
        encoder("roformer", "RoFormer", "RoFormerModel", text(), {**_TRANSFORMER, "embedding_size": 128}),
        encoder("convbert", "ConvBert", "ConvBertModel", text(), {**_TRANSFORMER, "embedding_size": 64}),
        encoder(
            "fnet",
            "FNet",
            "FNetModel",
            ids_only(),
            {k: v for k, v in _TRANSFORMER.items() if k != "num_attention_heads"},
        ),
        encoder("megatron-bert", "MegatronBert", "MegatronBertModel", text(), _TRANSFORMER),
        encoder(
            "squeezebert", "SqueezeBert", "SqueezeBertModel", text(), {**_TRANSFORMER, "embedding_size": 128}
        ),
        decoder(
            "gpt2",
            "GPT2",
            "GPT2LMHeadModel",
            text(),
            {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 128},
        ),
        decoder(
            "gpt-neo",
            "GPTNeo",
            "GPTNeoForCausalLM",
            text(),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
                "num_layers": 2,
                "num_heads": 4,
                "window_size": 16,
                "attention_types": [[["global", "local"], 1]],
                "max_position_embeddings": 128,
            },
        ),
        decoder("gpt-neox", "GPTNeoX", "GPTNeoXForCausalLM", text(), _TRANSFORMER),
        decoder(
            "gptj",
            "GPTJ",
            "GPTJForCausalLM",
            text(),
            {
                "vocab_size": VOCABULARY,
                "n_embd": 128,
                "n_layer": 3,
                "n_head": 4,
                "rotary_dim": 16,
                "n_positions": 128,
            },
        ),
        decoder(
            "opt",
            "OPT",
            "OPTForCausalLM",
            text(),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "ffn_dim": 256,
                "max_position_embeddings": 128,
                "word_embed_proj_dim": 128,
            },
        ),
        decoder(
            "bloom",
            "Bloom",
            "BloomForCausalLM",
            text(),
            {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 3, "n_head": 4},
        ),
        decoder("llama", "Llama", "LlamaForCausalLM", text(), _GROUPED),
        decoder("mistral", "Mistral", "MistralForCausalLM", text(), {**_GROUPED, "sliding_window": 16}),
        decoder("qwen2", "Qwen2", "Qwen2ForCausalLM", text(), _GROUPED),
        decoder("qwen3", "Qwen3", "Qwen3ForCausalLM", text(), {**_GROUPED, "head_dim": 32}),
        decoder("gemma", "Gemma", "GemmaForCausalLM", text(), {**_GROUPED, "head_dim": 32}),
        decoder(
            "gemma2",
            "Gemma2",
            "Gemma2ForCausalLM",
            text(),
            {**_GROUPED, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
        ),
        decoder(
            "gemma3",
            "Gemma3Text",
            "Gemma3ForCausalLM",
            text(),
            {**_GROUPED, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32},
        ),
        decoder("phi", "Phi", "PhiForCausalLM", text(), _TRANSFORMER),
        decoder("phi3", "Phi3", "Phi3ForCausalLM", text(), {**_GROUPED, **_SPECIAL}),
        decoder(
            "falcon",
            "Falcon",
            "FalconForCausalLM",
            text(),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_position_embeddings": 128,
            },
        ),
        decoder("stablelm", "StableLm", "StableLmForCausalLM", text(), _GROUPED),
        decoder("olmo2", "Olmo2", "Olmo2ForCausalLM", text(), _GROUPED),
        decoder("cohere", "Cohere", "CohereForCausalLM", text(), {**_GROUPED, **_SPECIAL}),
        decoder("starcoder2", "Starcoder2", "Starcoder2ForCausalLM", text(), _GROUPED),
        decoder(
            "granite",
            "Granite",
            "GraniteForCausalLM",
            text(),
            {
                **_GROUPED,
                "embedding_multiplier": 4.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
                "logits_scaling": 2.0,
            },
        ),
        decoder("glm", "Glm", "GlmForCausalLM", text(), {**_GROUPED, "head_dim": 32, "pad_token_id": 0}),
        decoder("smollm3", "SmolLM3", "SmolLM3ForCausalLM", text(), {**_GROUPED, **_SPECIAL}),
        seq2seq("t5", "T5", "T5ForConditionalGeneration", text_to_text(), _T5),
        seq2seq(
            "flan-t5",
            "T5",
            "T5ForConditionalGeneration",
            text_to_text(),
            {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ),
        seq2seq("bart", "Bart", "BartForConditionalGeneration", text_to_text(), _SEQ2SEQ),
        seq2seq("mbart", "MBart", "MBartForConditionalGeneration", text_to_text(), _SEQ2SEQ),
        seq2seq("pegasus", "Pegasus", "PegasusForConditionalGeneration", text_to_text(), _SEQ2SEQ),
        seq2seq("marian", "Marian", "MarianMTModel", text_to_text(), _SEQ2SEQ),
        seq2seq("m2m-100", "M2M100", "M2M100ForConditionalGeneration", text_to_text(), _SEQ2SEQ),
        vision("vit", "ViT", "ViTForImageClassification", image(), _VIT),
        vision("deit", "DeiT", "DeiTForImageClassification", image(), _VIT),
        vision("dinov2", "Dinov2", "Dinov2Model", image(), {**_VIT, "use_swiglu_ffn": True}),
        vision("beit", "Beit", "BeitModel", image(), {**_VIT, "use_relative_position_bias": True}),
        vision(
            "swin",
            "Swin",
            "SwinForImageClassification",
            image(),
            {
                "image_size": 64,
                "patch_size": 4,
                "embed_dim": 32,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": 4,
            },
        ),
        vision(
            "convnext",
            "ConvNext",
            "ConvNextForImageClassification",
            image(),
            {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
        ),
        vision(
            "resnet",
            "ResNet",
            "ResNetForImageClassification",
            image(),
            {"embedding_size": 32, "hidden_sizes": [64, 128, 256], "depths": [2, 2, 2]},
        ),
        vision(
            "regnet",
            "RegNet",
            "RegNetForImageClassification",
            image(),
            {
                "embedding_size": 32,
                "hidden_sizes": [32, 64, 128, 128],
                "depths": [1, 1, 2, 1],
                "groups_width": 16,
            },
        ),
        vision(
            "mobilenet-v2",
            "MobileNetV2",
            "MobileNetV2ForImageClassification",
            image(),
            {"image_size": 64, "depth_multiplier": 0.5},
        ),
        vision(
            "segformer",
            "Segformer",
            "SegformerForImageClassification",
            image(),
            {"hidden_sizes": [32, 32, 64, 128], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4]},
        ),
        vision(
            "clip",
            "CLIP",
            "CLIPModel",
            image_and_text(64, 16),
            {"text_config": {**_TRANSFORMER, **_SPECIAL}, "vision_config": dict(_VIT), "projection_dim": 64},
        ),
        audio("wav2vec2", "Wav2Vec2", "Wav2Vec2ForCTC", waveform(), _WAVE),
        audio("hubert", "Hubert", "HubertForCTC", waveform(), _WAVE),
        audio(
            "whisper",
            "Whisper",
            "WhisperForConditionalGeneration",
            spectrogram(32, 96, target=16),
            {
                **_SEQ2SEQ,
                "num_mel_bins": 32,
                "max_source_positions": 48,
                "max_target_positions": 64,
                "decoder_start_token_id": 3,
            },
        ),
        audio(
            "audio-spectrogram",
            "AST",
            "ASTForAudioClassification",
            spectrogram(96, 32, name="input_values"),
            {k: v for k, v in _VIT.items() if k not in {"image_size", "patch_size"}}
            | {
                "patch_size": 8,
                "frequency_stride": 8,
                "time_stride": 8,
                "max_length": 96,
                "num_mel_bins": 32,
            },
        ),
        moe(
            "mixtral",
            "Mixtral",
            "MixtralForCausalLM",
            text(),
            {**_GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        moe(
            "qwen3-moe",
            "Qwen3Moe",
            "Qwen3MoeForCausalLM",
            text(),
            {**_GROUPED, **_EXPERTS, "num_hidden_layers": 2, "head_dim": 32},
        ),
        moe(
            "olmoe",
            "Olmoe",
            "OlmoeForCausalLM",
            text(),
            {**_GROUPED, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2},
        ),
        moe(
            "granite-moe",
            "GraniteMoe",
            "GraniteMoeForCausalLM",
            text(),
            {**_GROUPED, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        ssm(
            "mamba",
            "Mamba",
            "MambaForCausalLM",
            ids_only(sequence=24),
            {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        ),
        ssm(
            "mamba2",
            "Mamba2",
            "Mamba2ForCausalLM",
            ids_only(sequence=32),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "state_size": 16,
                "num_heads": 8,
                "head_dim": 16,
                "n_groups": 2,
                "chunk_size": 16,
            },
        ),
        ssm(
            "rwkv",
            "Rwkv",
            "RwkvForCausalLM",
            ids_only(sequence=24),
            {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 64},
        ),
        ssm(
            "recurrent-gemma",
            "RecurrentGemma",
            "RecurrentGemmaForCausalLM",
            ids_only(sequence=24),
            {
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "intermediate_size": 128,
                "lru_width": 64,
                "attention_window_size": 16,
            },
        ),
    ]


def _maker(kind: str) -> Callable[..., Family]:
    def make(name: str, prefix: str, model_class: str, inputs: Inputs, settings: Mapping[str, Any]) -> Family:
        return Family(name, kind, f"{prefix}Config", model_class, inputs, settings)

    return make


FAMILIES: dict[str, Family] = {family.name: family for family in _table()}
