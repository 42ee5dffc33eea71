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
    size, mask = _TOKENIZER.get_vocab_size(), compiler.compile(grammar)
    # All at once, as most of the time would go into calls for a few numbers each.
    chances = torch.rand((_MOST_TOKENS, size), generator=torch.Generator().manual_seed(seed))
    chances[:, [_TOKENIZER.encode(character).ids[0] for character in closing]] += more
    chances[:, _END] += 1
    ids: list[int] = []
    for chance in chances:
        mask.apply(chance)
        ids.append(int(chance.argmax()))
        mask.accept(ids[-1:])
        assert mask.error is None
        if ids[-1] == _END:
            break
    return _TOKENIZER.decode(ids[:-1]) if ids[-1] == _END else None
