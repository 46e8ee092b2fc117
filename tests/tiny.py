"""Tiny models of every family that transformers builds: 4 layers, 64 wide, 1,024 tokens."""

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = {  # of a configuration's values, those that it has
    "vocab_size": 1024,
    "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length"), 128),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "ssm_state_size", "state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_expert_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "sliding_window", "attention_window_size"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "first_k_dense_replace": 1,
    "conv_L_cache": 3,
}
HALF = {"layer_types": ["mamba", "attention"] * 2}
MLA = {"head_dim": 8, "num_key_value_heads": 4}
SPECIAL = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu".split(), MLA
    ),
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {"vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "granitemoehybrid": HALF,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 96},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mpt": {"expansion_ratio": 2},
    "zaya": {"num_experts_per_tok": 1},
}


def build(kind: str, **more: Any) -> transformers.PreTrainedModel:
    """An untrained causal language model of that family, with these settings besides."""
    config = CONFIG_MAPPING[kind]
    has = config().to_dict()
    values = {name: value for name, value in SMALL.items() if name in has} | SPECIAL.get(kind, {}) | more
    config = config(**values)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in empty.parameters()) < 1e6  # tiny in truth
    torch.manual_seed(0)
    return roughen(transformers.AutoModelForCausalLM.from_config(config))


def roughen(model: torch.nn.Module) -> Any:
    """Uneven norms and large weights, so that a norm missed, doubled or taken from elsewhere shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.mul_(3)
    return model.eval()
