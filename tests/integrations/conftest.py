"""Tiny models of several transformers architectures, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_attn.integrations.huggingface import add_alpha, register

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 29}
GROUPED = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
IMAGE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 29}
IMAGE |= {"image_size": 15, "patch_size": 5, "num_channels": 2}
ENCODER_DECODER = {"vocab_size": 37, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
ENCODER_DECODER |= {"encoder_attention_heads": 3, "decoder_attention_heads": 2}
ENCODER_DECODER |= {"encoder_ffn_dim": 29, "decoder_ffn_dim": 31, "decoder_start_token_id": 2}
RELATIVE = {"vocab_size": 37, "d_model": 24, "d_kv": 7, "d_ff": 29, "num_layers": 2, "num_heads": 3}
RELATIVE |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SIZES),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 11}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**SIZES, "num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 0},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 37, "n_embd": 24, "n_layer": 2, "n_head": 3, "scale_attn_by_inverse_layer_idx": True},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 29}
        | {"word_embed_proj_dim": 24},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.3},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "intermediate_size": 28, "sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "intermediate_size": 28, "num_local_experts": 3}),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {**GROUPED, "num_hidden_layers": 3, "head_dim": 8}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 7,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "image_token_index": 37,
            "text_config": {**SIZES, "vocab_size": 37, "num_hidden_layers": 3, "num_key_value_heads": 3}
            | {"cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {"hidden_size": 8, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
            | {"intermediate_size": 11, "vision_output_dim": 16, "image_size": 8, "patch_size": 4}
            | {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]},
        },
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "sliding_window": 5}),
    "t5": ("T5ForConditionalGeneration", "T5Config", RELATIVE),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**ENCODER_DECODER, "pad_token_id": 0}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**ENCODER_DECODER, "num_mel_bins": 7, "max_source_positions": 11, "max_target_positions": 23}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
    ),
    # The next three models do not support transformers' "sdpa". Their modules have no `is_causal`, or `is_causal` is
    # False even in a causal decoder. So only the mask shows whether attention is causal.
    "pegasus_x": ("PegasusXForConditionalGeneration", "PegasusXConfig", {**ENCODER_DECODER, "block_size": 8}),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {**ENCODER_DECODER, "pad_token_id": 0, "num_experts": 3, "router_jitter_noise": 0.0},
    ),
    "splinter": ("SplinterModel", "SplinterConfig", {**SIZES, "question_token_id": 1}),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def build() -> Callable[..., Any]:
    """``build("bert", "entmax", <config keys>)``: a model in eval mode, with equal weights for every implementation."""

    def build(name: str, implementation: str, **changes: Any) -> Any:
        model, config, arguments = CONFIGS[name]
        torch.manual_seed(3)
        built = getattr(transformers, model)._from_config(
            getattr(transformers, config)(**{**arguments, **changes}), attn_implementation=implementation
        )
        with torch.no_grad():
            for key, parameter in built.named_parameters():
                # Standard deviation 0.3: with the usual 0.02, attention weights would be nearly equal, and none zero.
                if parameter.dim() > 1 and "position" not in key:
                    parameter.normal_(0.0, 0.3)
                elif key.endswith(("sinks", "attn_gate", "mlp_gate", "gate_attn", "gate_ffn")):
                    parameter.normal_(0.0, 1.0)
        return built.eval()

    return build


@pytest.fixture
def batch() -> Callable[[str], dict[str, torch.Tensor]]:
    """The inputs of a model: two sequences, the second padded at the end; images and sounds have no padding."""

    def batch(name: str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        target = torch.randint(3, 37, (2, 7), generator=generator)
        if name in ("vit", "clip"):
            return {"pixel_values": torch.randn(2, 2, 15, 15, generator=generator)}
        if name == "whisper":
            return {"input_features": torch.randn(2, 7, 22, generator=generator), "decoder_input_ids": target}
        inputs = {
            "input_ids": torch.randint(3, 37, (2, 11), generator=generator),
            "attention_mask": torch.ones(2, 11, dtype=torch.long),
        }
        inputs["attention_mask"][1, -4:] = 0
        return inputs | ({"decoder_input_ids": target} if name in ("t5", "bart", "pegasus_x", "nllb_moe") else {})

    return batch


@pytest.fixture
def with_alpha() -> Callable[..., Any]:
    """``with_alpha(model, <arguments of add_alpha>)`` adds α with random parameters, which can be past a bound."""

    def with_alpha(model: Any, **arguments: Any) -> Any:
        for alpha in add_alpha(model, **arguments).values():
            with torch.no_grad():
                alpha.raw_alpha.uniform_(0.9, 2.1)
        return model

    return with_alpha
