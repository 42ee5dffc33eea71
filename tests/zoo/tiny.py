"""Makes a tiny random model of any architecture that transformers knows, as a folder of files."""

import json
import re
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support import tiny_model

CONTEXT_LENGTH: Final = 512
WINDOW: Final = 64
"""Size of sliding windows and attention chunks, and number of keys that an indexer selects."""

# The first pattern that the whole name matches gives the value.
_SIZES: Final = [
    (r"vocab_size(_per_layer_input)?|decoder_vocab_size|unpadded_vocab_size", 266),
    (r"(max|original_max|n)_(position_embeddings|positions)", CONTEXT_LENGTH),
    (r"n_ctx|max_seq_len|model_max_length|context_length|max_(source|target)_positions", 512),
    (r"(_?sliding_|attention_)?window(_size)?|sliding_window_size|local_attention", WINDOW),
    (r"attention_chunk_size|index_topk|attention_window_size|keep_window_size", WINDOW),
    (r"(hidden|d|n|input_embedding|embedding)_(size|model|embd)|d_model|dim|emb_dim", 64),
    (r"embedding_dim|word_embed_proj_dim|output_embedding_size|lru_width", 64),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|_ff|dff|d_inner)(_mlp)?", 64),
    (r"(intermediate_size|ffn_hidden_size|ffn|feed_forward)_(mlp|size)|n_inner", 64),
    (r"(swa_)?num_(key_value|kv)_heads|num_query_groups|n_kv_heads", 2),
    (r"(swa_|encoder_|decoder_)?(num_)?(attention_)?heads|n_heads?|attention_heads", 4),
    (r"num_(encoder_|decoder_)?attention_heads|index_n_heads|num_heads", 4),
    (r"(swa_|global_|linear_)?head_dim|d_head|dim_head|kv_channels|attention_head_(dim|size)", 16),
    (r"(v|qk_nope|qk_rope|index)_head_dim|rotary_dim|linear_(key|value)_head_dim", 16),
    (r"qk_head_dim", 32),
    (r"(kv|q|o)_lora_rank|hidden_size_per_layer_input|.*_embed_dim|laurel_rank", 16),
    (r"linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|moe_(topk|k)", 2),
    (r"n_group|topk_group|num_expert_group|o_groups", 1),
    (r"mamba_(n|num)_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (r"(mamba_)?d_state|(ssm_)?state_size|mamba_d_state", 16),
    (r"(mamba_)?(n_groups|ngroups)", 1),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 1),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start)_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r".*_token_id|.*_token_index", 3),
]


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": kind,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 128,
        **more,
    }


# What the sizes above leave wrong: members of the configuration of this ``model_type``.
_EXTRAS: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 32},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 32},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"index_block_size": 16, "index_topk_blocks": 2},
    # It looks up the position after the last one.
    "prophetnet": {"max_position_embeddings": CONTEXT_LENGTH + 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 300,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 8,
        "hash_seed": 0,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "bert-decoder": ("bert", {"is_decoder": True}),
    "llama-dynamic": ("llama", {"rope_parameters": _rope("dynamic", factor=4.0)}),
    "llama-llama3": (
        "llama",
        {"rope_parameters": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)},
    ),
    "llama-yarn": ("llama", {"rope_parameters": _rope("yarn", factor=4.0)}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": _rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8),
            "original_max_position_embeddings": 128,
        },
    ),
}
"""Models that differ from their type's default in a way that a batch may get wrong."""

# Members that are computed where they are not set, but not by every type.
_IF_UNSET: Final = {
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "sliding_window": WINDOW,
}
_LAYERS: Final = re.compile(
    r"(num_|n_|encoder_|decoder_)?(hidden_|encoder_|decoder_)?layers?|num_blocks"
)


def make(kind: str, folder: Path) -> None:
    """Write a model of a type of ``AutoModelForCausalLM``, or a variant; the same each time.

    Raises:
        Exception: Whatever transformers raises for a type that this cannot build.
    """
    name, changes = VARIANTS.get(kind, (kind, {}))
    config = tiny_config(CONFIG_MAPPING[name], changes)
    config.dtype = "float32"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    _spread(model)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model.generation_config = type(model.generation_config)(**ends)
    tiny_model.make_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    # The model keeps only its part of a configuration with vision or sound.
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def tiny_config(kind: Any, more: dict[str, Any] | None = None) -> Any:
    """A configuration with few and small layers, at least one of each kind that the type has."""
    default = kind()
    values = default.to_dict()
    layers = next((v for k, v in values.items() if _LAYERS.fullmatch(k) and type(v) is int), 0)
    lists = {k: v for k, v in values.items() if isinstance(v, list) and 1 < len(v) == layers}
    chosen = _one_of_each([*zip(*lists.values(), strict=True)]) if lists else [0, 1]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        size = next((n for pattern, n in _SIZES if re.fullmatch(pattern, name)), None)
        if name in lists:
            changes[name] = [size if size and type(value[i]) is int else value[i] for i in chosen]
        elif _LAYERS.fullmatch(name) and type(value) is int:
            changes[name] = len(chosen)
        elif size is not None and type(value) is int:
            changes[name] = size
        elif name in _IF_UNSET and value is None:
            changes[name] = _IF_UNSET[name]
    if "kv_lora_rank" in values:
        # Each head has a key of its own, made from the one that is cached.
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            changes[name] = tiny_config(type(part)).to_dict()
    return kind(**changes | _EXTRAS.get(kind.model_type, {}) | (more or {}))


def _one_of_each(layers: list[Any]) -> list[int]:
    """Indices of the first layer of each kind, in order, and of at least two layers."""
    kinds = [json.dumps(layer) for layer in layers]
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:6]
    return first if len(first) > 1 else [0, 1]


def _spread(model: Any) -> None:
    """Give the weights such sizes that each token of an answer depends on the tokens before it."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                scale = 0.05 if id(weight) in embeddings else 2.0 / weight.shape[-1] ** 0.5
                weight.copy_(scale * torch.randn_like(weight))
