"""A stand-in for google/gemma-2-2b-it: its shapes, random weights, the bundled model's tokenizer.

Its answers are noise. It measures speed, memory and starts of a model that needs a licence. The
files have 10 GB and take 3 minutes and 12 GB of memory, once: safetensors in bfloat16, and GGUF
files of the same weights for llama-server.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from app.llm.models import bundled

_VOCABULARY = 256_000
_KINDS = {"q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
_TEMPLATE = (
    "{% for m in messages if m.role != 'system' %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make(folder: Path, layers: int = 26) -> None:
    """Write the safetensors to ``model`` in a new folder, and the GGUF files beside them."""
    source = bundled.fetch()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = _TEMPLATE
    config = Gemma2Config(
        vocab_size=_VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        # A token without a spelling must never be the likeliest.
        model.model.embed_tokens.weight[len(tokenizer) :] = 0
    made = folder.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made / "model")
    tokenizer.save_pretrained(made / "model")
    for kind in _KINDS:
        _write_gguf(made / f"{kind}.gguf", model, gguf.GGUFReader(source), kind)
    made.rename(folder)


def _write_gguf(path: Path, model: Any, source: Any, kind: str) -> None:
    config = model.config
    name, number = _KINDS[kind]
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_file_type(number)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_chat_template(_TEMPLATE)
    _copy_tokenizer(source, writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        tensor = names.get_name(key, try_suffixes=(".weight",))
        if tensor is None:
            # The output layer, which is the embedding.
            continue
        if value.ndim == 1:
            # llama.cpp multiplies by the weight, Gemma by the weight plus one.
            writer.add_tensor(tensor, (value.float() + 1).numpy())
            continue
        quantized = types.Q8_0 if tensor == "token_embd.weight" else types[name]
        data = gguf.quants.quantize(value.float().numpy(), quantized)
        writer.add_tensor(tensor, data, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(source: Any, writer: Any) -> None:
    for field in source.fields.values():
        _, _, name = field.name.rpartition(".")
        if not field.name.startswith("tokenizer.") or name == "chat_template":
            continue
        value, kinds = field.contents(), field.types
        if name == "tokens":
            value += [f"<unused{i}>" for i in range(len(value), _VOCABULARY)]
        elif name in {"scores", "token_type"}:
            filler: float = 5 if name == "token_type" else 0.0
            value += [filler] * (_VOCABULARY - len(value))
        is_list = kinds[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, kinds[0], sub_type=kinds[-1] if is_list else None)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
