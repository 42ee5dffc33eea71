"""Text to token ids and back, in the API process.

One thread encodes: the ``tokenizers`` library is not safe to share while its settings change.
Decoding takes microseconds, and uses a second copy of the tokenizer on the event loop.

A caller cannot forge a turn: a placeholder replaces each special token that a message spells
(``<|im_end|>``) before the chat template is rendered, and is encoded as plain characters. So it is
with a token that is not special where the chat template spells it, since some models frame turns
with such tokens.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from app.llm.models.byte_level import BYTE_OF
from app.llm.models.chat_template import LOOK_SECONDS, RENDER_SECONDS, ChatTemplate
from app.llm.models.load_errors import is_failure
from app.llm.protocol import EngineInfo
from app.llm.tools import Tool, tool_format
from app.utils.errors import ChatTemplateError, ValidationFailedError

T = TypeVar("T")

# For models that have no chat template.
_DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

# SentencePiece vocabularies have such a token for each byte, for characters that they lack.
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class PromptTokenizer:
    """Renders and encodes prompts for one model.

    ``decoder`` is the copy of the tokenizer for the event loop. ``template_tokens`` are the
    spellings of the special tokens that frame turns in the chat template. ``frames_turns`` is false
    where plain text does, which a message can imitate.
    """

    def __init__(self, info: EngineInfo) -> None:
        self._encoder = Tokenizer.from_str(info.tokenizer_json)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.decoder = Tokenizer.from_str(info.tokenizer_json)
        template = info.chat_template or _DEFAULT_CHAT_TEMPLATE
        self._template = ChatTemplate(template, info.special_tokens)
        self.tool_format = tool_format(template)
        added = self._encoder.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        # The other special tokens, such as <s>, may be meant in an answer.
        self.template_tokens = tuple(t for t in special if t in template)
        self.special_token_ids = frozenset(special.values())
        # White space and signs are no frame of a turn: Gemma has tokens for runs of line breaks.
        plain = {
            token.content: token_id
            for token_id, token in added.items()
            if not token.special
            and token.content in template
            and any(map(str.isalnum, token.content))
        }
        # The encoder tells special tokens from text that spells them, and no others.
        self._encoder.add_special_tokens([_as_special(added[i]) for i in plain.values()])
        self._framing = {**special, **plain}
        self._special_spelling = _any_of(map(re.escape, special))
        self._spelling = _any_of(map(re.escape, self._framing))
        # A caller cannot write a placeholder, because nobody can guess the nonce in it.
        self._nonce = secrets.token_hex(8)
        self._placeholder = re.compile(f"\ue000{self._nonce}:(\\d+)\ue001")
        self._chat_mark = f"\ue000{self._nonce}!\ue001"
        self._exact = re.compile(f"\ue000{self._nonce}#(?P<exact>[\\d,]+)\ue001")
        boundaries = _any_of(_as_matched(added[i]) for i in self._framing.values())
        self._boundary = re.compile(f"{self._exact.pattern}|{boundaries.pattern}")
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._is_byte_level = b'"ByteLevel"' in self.decoder.decoder.__getstate__()
        self._takes_system = self._probe_system_role()
        self.frames_turns = self._probe_frames()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Call one of the methods below on the encoder's thread.

        Raises:
            ChatTemplateError: The model's template does not end, so that others can be served.
            ValidationFailedError: The model's tokenizer fails.
        """
        loop = asyncio.get_running_loop()
        work = self._thread.submit(function, *args)

        def watch() -> None:
            # The work goes on where its caller has left, so this does not end with the caller.
            if not work.done():
                self._template.end_overdue()
                loop.call_later(LOOK_SECONDS, watch)

        watching = loop.call_later(RENDER_SECONDS, watch)
        try:
            return await asyncio.wrap_future(work)
        finally:
            if work.done():
                watching.cancel()

    def close(self) -> None:
        """End the encoder's thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()) -> str:
        """What :meth:`render_chat` returns, marked so that :meth:`encode` knows what it is."""
        return self._chat_mark + self.render_chat(messages, tools)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt: of bare text, or of what :meth:`chat_prompt` returned."""
        if prompt.startswith(self._chat_mark):
            return self.encode_rendered(prompt.removeprefix(self._chat_mark))
        return self.encode_text(prompt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Token ids of a chat's prompt; see :meth:`render_chat`."""
        return self.encode_rendered(self.render_chat(messages, tools))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()) -> str:
        """The prompt for a chat, which ends where the assistant's turn begins.

        Each message has ``role`` and ``content``. An earlier answer may have ``token_ids``, which
        are then used in place of encoding its content.

        Returns:
            Text for :meth:`encode_rendered`, with placeholders for spellings of special tokens.

        Raises:
            ChatTemplateError: The model's template rejects the messages, or fails on them.
        """
        messages = self.tool_format.for_template(messages, tools)
        if not self._takes_system:
            messages = _fold_system(messages)
        # A template may look for such a token in an answer, as for the end of its reasoning.
        plain = [
            self._escape(
                m["content"],
                self._special_spelling if m["role"] == "assistant" else self._spelling,
            )
            for m in messages
        ]
        told = tools if self.tool_format.in_template else ()
        definitions = [self._escape_within(tool.definition()) for tool in told]
        rendered = self._render(messages, plain, definitions)
        exact = [
            self._write_exact(m["token_ids"]) if m.get("token_ids") else text
            for m, text in zip(messages, plain, strict=True)
        ]
        if exact == plain:
            return rendered
        with_tokens = self._render(messages, exact, definitions)
        # Where the template reads or changes an answer's text, its tokens would be wrong.
        texts = dict(zip(exact, plain, strict=True))
        unchanged = self._exact.sub(lambda match: texts[match.group()], with_tokens) == rendered
        return with_tokens if unchanged else rendered

    def _probe_frames(self) -> bool:
        """Whether a turn begins with a token that no text of a caller can become."""
        turns = [{"role": role} for role in ("user", "assistant", "user")]
        try:
            with self._template.watched():
                rendered = self._render(turns, ["\ue000", "\ue001", "\ue000"])
        except ChatTemplateError:
            return True
        answer = rendered.partition("\ue000")[2].partition("\ue000")[0].split("\ue001")
        return all(self._spelling.search(frame) for frame in answer)

    def _probe_system_role(self) -> bool:
        """Whether the template accepts a system message; those of Gemma 1 and 2 do not."""
        turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        try:
            with self._template.watched():
                self._render(turns, ["x", "x"])
        except ChatTemplateError:
            return False
        return True

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        contents: Sequence[str],
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        pairs = zip(messages, contents, strict=True)
        chat = [{"role": m["role"], "content": content} for m, content in pairs]
        return self._template.render(chat, tools)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that only pads the embeddings."""
        if (added := self._added.get(token_id)) is not None:
            return added.encode()
        token = self.decoder.id_to_token(token_id) or ""
        if self._is_byte_level:
            return bytes(BYTE_OF[c] for c in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace("\u2581", " ").encode()

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a bare prompt: plain text, with the special tokens that the model adds."""
        return self._encode(text, specials_are_text=True, add_special_tokens=True)

    def encode_rendered(self, rendered: str) -> list[int]:
        """Token ids of a prompt from :meth:`render_chat`; its special tokens are the template's."""
        if self._nonce not in rendered:
            return self._encode(rendered)
        ids: list[int] = []
        position = 0
        for match in self._boundary.finditer(rendered):
            ids += self._encode_restored(rendered[position : match.start()])
            if match["exact"]:
                ids += map(int, match["exact"].split(","))
            else:
                found = match.group()
                ids.append(self._framing[found if found in self._framing else found.strip()])
            position = match.end()
        return ids + self._encode_restored(rendered[position:])

    def _encode_restored(self, text: str) -> list[int]:
        restored = self._placeholder.sub(lambda m: self._added[int(m[1])], text)
        return self._encode(restored, specials_are_text=True) if restored else []

    def _encode(
        self, text: str, *, specials_are_text: bool = False, add_special_tokens: bool = False
    ) -> list[int]:
        self._encoder.encode_special_tokens = specials_are_text
        try:
            ids: list[int] = self._encoder.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            if not is_failure(error):
                raise
            raise ValidationFailedError(
                "The model's tokenizer fails on this prompt; another text may succeed."
            ) from error
        return ids

    def _write_exact(self, token_ids: Sequence[int]) -> str:
        return f"\ue000{self._nonce}#{','.join(map(str, token_ids))}\ue001"

    def _escape(self, content: str, spelling: re.Pattern[str]) -> str:
        return spelling.sub(
            lambda m: f"\ue000{self._nonce}:{self._framing[m.group()]}\ue001", content
        )

    def _escape_within(self, value: Any) -> Any:
        """A JSON value with every string in it escaped, names of members included."""
        if isinstance(value, str):
            return self._escape(value, self._spelling)
        if isinstance(value, Mapping):
            return {self._escape_within(k): self._escape_within(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._escape_within(v) for v in value]
        return value


def _fold_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put the system message in front of the first user message, for templates without one."""
    if messages[0]["role"] != "system":
        return list(messages)
    text, rest = messages[0]["content"], list(messages[1:])
    if rest and rest[0]["role"] == "user":
        text = f"{text}\n\n{rest.pop(0)['content']}"
    return [{"role": "user", "content": text}, *rest]


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    # Longest first, so that a token is found before the tokens that it contains.
    return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or "(?!)")


def _as_matched(token: AddedToken) -> str:
    """A pattern of a token and the white space that it takes with it."""
    before, after = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{before}{re.escape(token.content)}{after}"


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )
