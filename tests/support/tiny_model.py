"""A tiny Llama with random weights: real files that load in well under a second."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 64
INTERMEDIATE = 128
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
CONTEXT_LENGTH = 512

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("o", "n"), ("Ġ", "a")]
VOCABULARY = 3 + 256 + len(MERGES)
"""Special tokens, one token for each byte, merges."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}


def make_tiny_model(directory: Path) -> Path:
    """Write a model folder as a hub repository holds it, the same bytes each time.

    It is written without torch, so that tests which only serve or move the files do not import it.

    Returns:
        ``directory``, which is created.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", CONFIG)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    save_file(tiny_weights(), directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START,
            "eos_token": END,
            "pad_token": PAD,
            "model_max_length": CONTEXT_LENGTH,
            "clean_up_tokenization_spaces": False,
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory


def tiny_weights() -> dict[str, np.ndarray]:
    """The random weights, by the names transformers gives them."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        # Values that are exact in 16 bits, so that every file format has the same weights.
        return random.normal(0.0, 0.2, (rows, columns)).astype(np.float16).astype(np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    key_value = KEY_VALUE_HEADS * HIDDEN // HEADS
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": matrix(key_value, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": matrix(key_value, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
            f"{prefix}.input_layernorm.weight": ones,
            f"{prefix}.post_attention_layernorm.weight": ones,
        }
    weights["model.norm.weight"] = ones
    weights["lm_head.weight"] = matrix(VOCABULARY, HIDDEN)
    return weights


def split_weights(directory: Path) -> list[str]:
    """Split a tiny model's weights into two files and an index; return the files' names."""
    (directory / "model.safetensors").unlink()
    weights = sorted(tiny_weights().items())
    half = len(weights) // 2
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map: dict[str, str] = {}
    for name, part in zip(names, (weights[:half], weights[half:]), strict=True):
        save_file(dict(part), directory / name, metadata={"format": "pt"})
        weight_map |= {tensor: name for tensor, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    return names


def _tokenizer() -> Tokenizer:
    """Byte-level BPE with a handful of merges: any text encodes, in about one token a byte."""
    specials = [PAD, START, END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [left + right for left, right in MERGES]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    return tokenizer


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
