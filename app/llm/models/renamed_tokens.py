"""A tokenizer that knows some of its added tokens by other names."""

from collections.abc import Mapping
from typing import Any

import msgspec
from tokenizers import Tokenizer


def rename_added_tokens(
    tokenizer_json: str, names: Mapping[str, str]
) -> tuple[Tokenizer, dict[int, int]]:
    """Rename added tokens, so that a text which spells their own names is plain text.

    Returns the tokenizer without truncation and padding; and, by the id that it gives an added
    token, the id that the token has in the model.
    """
    parts = msgspec.json.decode(tokenizer_json, type=dict[str, msgspec.Raw])
    added: list[dict[str, Any]] = msgspec.json.decode(parts["added_tokens"])
    ids = {names.get(token["content"], token["content"]): token["id"] for token in added}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    parts["added_tokens"] = _raw(added)
    model = msgspec.json.decode(parts["model"], type=dict[str, msgspec.Raw])
    if "merges" not in model:
        # Without merges, a text that spells a whole entry of the vocabulary becomes that token.
        _rename_vocabulary(model, names)
        parts["model"] = _raw(model)
    tokenizer = Tokenizer.from_str(msgspec.json.encode(parts).decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A token that the vocabulary has under its own name gets an id at the end.
    given = tokenizer.get_added_tokens_decoder().items()
    return tokenizer, {token_id: ids[token.content] for token_id, token in given}


def _rename_vocabulary(model: dict[str, msgspec.Raw], names: Mapping[str, str]) -> None:
    vocabulary = msgspec.json.decode(model["vocab"])
    if isinstance(vocabulary, dict):
        model["vocab"] = _raw({names.get(token, token): i for token, i in vocabulary.items()})
    else:
        model["vocab"] = _raw([[names.get(token, token), score] for token, score in vocabulary])
    unknown = msgspec.json.decode(model.get("unk_token", b"null"))
    if unknown in names:
        model["unk_token"] = _raw(names[unknown])


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
