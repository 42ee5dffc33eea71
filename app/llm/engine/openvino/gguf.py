"""What OpenVINO's reader of GGUF files ignores: such a file would give wrong answers."""

import re

from app.llm.models.gguf_header import GgufHeader

_LAYER = re.compile(r"blk\.\d+\.(.+)")


def why_not_read(header: GgufHeader) -> str | None:
    """The part of a GGUF file that the library would ignore or misread; ``None`` if there is none.

    The header must have the numbers that :func:`~app.llm.models.description.gguf_shape` needs.
    """
    architecture = str(header.metadata["general.architecture"])

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    def number(name: str, default: int = 0) -> int:
        return int(header.metadata.get(key(name)) or default)

    heads = number("attention.head_count")
    head_size = number("attention.key_length", number("embedding_length") // heads)
    expected = _shapes(
        architecture,
        embedding=number("embedding_length"),
        query=heads * head_size,
        shared=number("attention.head_count_kv", heads) * head_size,
        head=head_size,
        inner=number("feed_forward_length"),
        vocabulary=header.shapes["token_embd.weight"][0],
    )
    if not expected:
        return f"its reader has no architecture {architecture}"
    for name, shape in header.shapes.items():
        layer = _LAYER.fullmatch(name)
        wanted = expected.get(f"blk.{layer[1]}" if layer else name)
        if wanted is None:
            return f"its reader ignores {name}"
        if shape != wanted:
            return f"{name} has the shape {shape}, and the file's sizes give {wanted}"
    scaling = header.metadata.get(key("rope.scaling.type"), "linear")
    if scaling != "none" and header.metadata.get(key("rope.scaling.factor")):
        return f"its reader ignores {key('rope.scaling.factor')}"
    if 0 < number("attention.sliding_window") < number("context_length"):
        return f"its reader ignores {key('attention.sliding_window')}"
    if number("rope.dimension_count", head_size) != head_size:
        return f"its reader ignores {key('rope.dimension_count')}"
    return None


def _shapes(
    architecture: str,
    *,
    embedding: int,
    query: int,
    shared: int,
    head: int,
    inner: int,
    vocabulary: int,
) -> dict[str, tuple[int, ...]]:
    """The tensors that the library reads, with their shapes; ``blk.`` is a layer."""
    own: dict[str, dict[str, tuple[int, ...]]] = {
        "llama": {},
        "qwen2": {
            "blk.attn_q.bias": (query,),
            "blk.attn_k.bias": (shared,),
            "blk.attn_v.bias": (shared,),
        },
        "qwen3": {"blk.attn_q_norm.weight": (head,), "blk.attn_k_norm.weight": (head,)},
    }
    if architecture not in own:
        return {}
    return own[architecture] | {
        "token_embd.weight": (vocabulary, embedding),
        "output.weight": (vocabulary, embedding),
        "output_norm.weight": (embedding,),
        "blk.attn_norm.weight": (embedding,),
        "blk.attn_q.weight": (query, embedding),
        "blk.attn_k.weight": (shared, embedding),
        "blk.attn_v.weight": (shared, embedding),
        "blk.attn_output.weight": (embedding, query),
        "blk.ffn_norm.weight": (embedding,),
        "blk.ffn_gate.weight": (inner, embedding),
        "blk.ffn_up.weight": (inner, embedding),
        "blk.ffn_down.weight": (embedding, inner),
    }
