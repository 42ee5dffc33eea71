"""Random answers of a grammar, by llguidance with the echo engine's vocabulary."""

import torch

from app.llm.engine.echo import build_tokenizer
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import Grammar

_TOKENIZER = build_tokenizer()
_END = _TOKENIZER.encode("<|im_end|>").ids[0]
_MOST_TOKENS = 400


def grammar_compiler() -> GrammarCompiler:
    """The compiler of grammars for that vocabulary."""
    return GrammarCompiler(_TOKENIZER.to_str(), _TOKENIZER.get_vocab_size(), [_END])


def random_answer(
    compiler: GrammarCompiler, grammar: Grammar, seed: int, closing: str = '"}],', more: float = 0.3
) -> str | None:
    """A random text of a grammar; ``None`` where it does not end soon.

    The characters of ``closing`` are likelier than others, by ``more`` of a logit.
    """
    chance, mask = torch.Generator().manual_seed(seed), compiler.compile(grammar)
    likelier = [_TOKENIZER.encode(character).ids[0] for character in closing]
    ids: list[int] = []
    while _END not in ids and len(ids) < _MOST_TOKENS:
        logits = torch.rand(_TOKENIZER.get_vocab_size(), generator=chance)
        logits[likelier] += more
        logits[_END] += 1
        mask.apply(logits)
        ids.append(int(logits.argmax()))
        mask.accept(ids[-1:])
        assert mask.error is None
    return _TOKENIZER.decode(ids[:-1]) if _END in ids else None
