"""Writes a tiny Llama or Qwen model as a GGUF file, which OpenVINO runs."""

import json
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.tiny_gguf import add_tokenizer, gguf_name

KINDS: Final = ("llama", "qwen2", "qwen3")
"""The architectures that OpenVINO reads from GGUF files."""


def write(folder: Path) -> Path:
    """Write the model in ``folder`` as a GGUF file beside it, and round its own weights likewise.

    Matrices have 16 bits in the file, because OpenVINO reads none of 32.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, heads = config["model_type"], config["num_attention_heads"]
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        narrow = weight.astype(np.float16) if weight.ndim > 1 else weight
        weights[name] = narrow.astype(np.float32)
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF pairs neighbours for rotary positions, transformers pairs two halves.
            halves = narrow.reshape(-1, 2, size // 2, narrow.shape[-1])
            narrow = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(narrow.shape))
        writer.add_tensor(gguf_name(name), narrow)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return path
