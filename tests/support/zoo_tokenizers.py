"""Small tokenizers of the kinds that well-known models have, made on the spot.

Their vocabularies are tiny; their normalizers, pre-tokenizers, added tokens and decoders are those
of the kind. Each is made from the special tokens that a model's chat template uses.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_CORPUS = (
    "The capital of France is Paris. What is the weather there, in the city? It is 21 degrees.",
    'def add(first, second):\n    return first + second\n\n{"name": "get", "city": "Paris"}',
    "You are a helpful assistant.\n\nAnswer in one word. user assistant system tool function",
    "  Thanks!  \n Und wie heißt du? Ich heiße Paul, und du?\n\n\nThe end of the story is here.",
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace("{1,3}", "")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

Build = Callable[[Sequence[str]], Tokenizer]
"""Makes a tokenizer with these special tokens, the first of which begins a text."""


@cache
def _trained(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level BPE, or of SentencePiece's."""
    tokenizer = Tokenizer(models.BPE())
    alphabet: list[str] = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    # SentencePiece joins no line break to a word.
    texts = _CORPUS if kind == "bytes" else "\n".join(_CORPUS).split("\n")
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    vocabulary: dict[str, int] = model["vocab"]
    if kind == "pieces":
        merges += [("▁", "▁"), ("▁▁", "▁▁"), ("\n", "\n")]
        for piece in ("▁▁", "▁▁▁▁", "\n", "\n\n", "<", "|", "/", ">", "_"):
            vocabulary.setdefault(piece, len(vocabulary))
    return vocabulary, merges


def _specials(tokenizer: Tokenizer, tokens: Sequence[str], **options: bool) -> Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, **options) for t in tokens]
    )
    return tokenizer


def _byte_level(
    tokens: Sequence[str], before: Any, normalizer: Any = None, *, ignore_merges: bool = False
) -> Tokenizer:
    vocabulary, merges = _trained("bytes")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    return _specials(tokenizer, tokens)


def _split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's own splitting: OLMo, Granite, SmolLM."""
    return _byte_level(tokens, pre_tokenizers.ByteLevel(add_prefix_space=False))


def prefixed(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE that puts a blank before each text between special tokens."""
    return _byte_level(tokens, pre_tokenizers.ByteLevel(add_prefix_space=True))


def falcon(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE that splits signs and groups of three digits off."""
    parts = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    return _byte_level(tokens, pre_tokenizers.Sequence(parts))


def llama3(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE as Llama 3 has it; whole words of the vocabulary are taken first."""
    tokenizer = _byte_level(tokens, _split_by(_LLAMA3), ignore_merges=True)
    begin = tokens[0], tokenizer.token_to_id(tokens[0])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[0]} $A", special_tokens=[begin]
    )
    return tokenizer


def qwen(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE as Qwen has it; tags of calls and thoughts are added, and not special."""
    tokenizer = _byte_level(tokens, _split_by(_QWEN), normalizers.NFC())
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return tokenizer


def deepseek(tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE whose turns are framed by added tokens that are not special."""
    tokenizer = _byte_level(tokens[:2], _split_by(_LLAMA3))
    framing = [AddedToken(t, special=False, normalized=False) for t in (*tokens[2:], "</think>")]
    tokenizer.add_tokens(framing)
    return tokenizer


def _pieces(tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE with a token for each byte; ``tokens`` are in its vocabulary."""
    learned, merges = _trained("pieces")
    vocabulary: dict[str, int] = {}
    for token in ("<unk>", *tokens, *_BYTES, *learned):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*strip, decoders.Strip(" ", 1, 0)])
    return _specials(tokenizer, ("<unk>", *tokens))


def llama2(tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE, legacy: each text between special tokens gets a blank."""
    tokenizer = _pieces(tokens)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def llama2_normalized(tokens: Sequence[str]) -> Tokenizer:
    """The same with special tokens that are looked for in normalized text, as Vicuna's were."""
    tokenizer = llama2(())
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in tokens])
    return tokenizer


def llama2_new(tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE, not legacy: a blank at the very beginning alone."""
    tokenizer = _pieces(tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def mistral(tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE with a blank before each text, put there when words are split."""
    tokenizer = _pieces(tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return tokenizer


def gemma(tokens: Sequence[str]) -> Tokenizer:
    """SentencePiece BPE without blanks of its own, and with tokens for runs of line breaks."""
    tokenizer = _pieces(tokens)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    runs = [AddedToken("\n" * n, special=False, normalized=False) for n in (1, 2, 3)]
    tokenizer.add_tokens([*runs, AddedToken("▁▁", special=False, normalized=False)])
    return tokenizer


def phi3(tokens: Sequence[str]) -> Tokenizer:
    """Llama 2's, with tokens behind the vocabulary that take the white space after them."""
    return _specials(llama2(tokens[:2]), tokens[2:], rstrip=True)


def stripping(tokens: Sequence[str]) -> Tokenizer:
    """Llama 2's not legacy, with tokens that take the white space on both sides."""
    return _specials(llama2_new(tokens[:2]), tokens[2:], lstrip=True, rstrip=True)


@cache
def _trained_unigram() -> list[tuple[str, float]]:
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, unk_token="<unk>")
    pieces.train_from_iterator(_CORPUS, trainer)
    vocabulary = json.loads(pieces.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocabulary if piece != "<unk>"]


def unigram(tokens: Sequence[str]) -> Tokenizer:
    """Unigram as T5 has it, whose vocabulary holds the special tokens as pieces."""
    learned = _trained_unigram()
    signs = [(sign, -9.0) for sign in "<|/>_\n[]" if sign not in dict(learned)]
    vocabulary = [("<unk>", 0.0), *((t, 0.0) for t in tokens), *learned, *signs]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _specials(tokenizer, ("<unk>", *tokens))
