"""The tiny model of tests.support.tiny_model as a GGUF file, with the same weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from tests.support import tiny_model

_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_tiny_gguf(
    path: Path,
    *,
    half: bool = True,
    context: int = tiny_model.CONTEXT_LENGTH,
    template: str = tiny_model.CHAT_TEMPLATE,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    sentencepiece: bool = False,
    packed: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write the tiny model as one GGUF file.

    Args:
        path: Where to.
        context: The context length in tokens.
        half: Matrices of 16-bit floats, else of 32 bits.
        template: The chat template.
        keys: More metadata: whole numbers, floats, texts or lists of them.
        tensors: More tensors, or others, by their names in the file.
        sentencepiece: The vocabulary has pieces with scores, and no merges.
        packed: The type of the matrices, instead of floats.

    Returns:
        ``path``; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    kind = f"MOSTLY_{packed.name}" if packed else "MOSTLY_F16" if half else "ALL_F32"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_context_length(context)
    writer.add_embedding_length(tiny_model.HIDDEN)
    writer.add_block_count(tiny_model.LAYERS)
    writer.add_feed_forward_length(tiny_model.INTERMEDIATE)
    writer.add_head_count(tiny_model.HEADS)
    writer.add_head_count_kv(tiny_model.KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(tiny_model.HIDDEN // tiny_model.HEADS)
    writer.add_vocab_size(tiny_model.VOCABULARY)
    (_add_pieces if sentencepiece else add_tokenizer)(writer)
    for key, value in (keys or {}).items():
        _ADD[type(value)](writer, key, value)
    writer.add_chat_template(template)
    weights = {gguf_name(n): in_gguf_order(n, w) for n, w in tiny_model.tiny_weights().items()}
    for name, weight in (weights | dict(tensors or {})).items():
        # These weights are exact in 16 bits; vectors stay at 32, as in llama.cpp.
        narrow = half and weight.ndim > 1
        if packed is not None and weight.ndim > 1:
            blocks = gguf.quants.quantize(weight, packed)
            writer.add_tensor(name, blocks, raw_dtype=packed)
        else:
            writer.add_tensor(name, weight.astype(np.float16 if narrow else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ADD = {
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Add the tiny model's vocabulary."""
    specials = [tiny_model.PAD, tiny_model.START, tiny_model.END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*specials, *alphabet, *(left + right for left, right in tiny_model.MERGES)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control] * len(specials) + [normal] * (len(tokens) - len(specials)))
    writer.add_token_merges([f"{left} {right}" for left, right in tiny_model.MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)


def _add_pieces(writer: gguf.GGUFWriter) -> None:
    kinds = gguf.TokenType
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [
        (piece, kinds.NORMAL) for piece in ("\u2581", "t", "h", "e", "th", "the", "\u2581the")
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces])
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file, by its name in transformers."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{_TENSORS[part]}.{kind}"
    return f"{_TENSORS[stem]}.{kind}"


def in_gguf_order(name: str, weight: np.ndarray) -> np.ndarray:
    """Reorder rows for rotary positions: GGUF pairs neighbours, transformers pairs two halves."""
    heads = {"q_proj": tiny_model.HEADS, "k_proj": tiny_model.KEY_VALUE_HEADS}
    for projection, count in heads.items():
        if f".{projection}." in name:
            halves = weight.reshape(count, 2, -1, *weight.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return weight
