"""Text to token ids and back, in the API process.

One thread renders and encodes. Decoding, on the event loop, has a second copy of the tokenizer.

A caller cannot forge a turn: a placeholder replaces each special token that a message spells
(``<|im_end|>``) before the chat template is rendered. The encoder knows these tokens by names that
nobody can guess: the template's are written by them, and a caller's spelling is plain text. So it
is with a token that is not special where the chat template spells it, since some models frame turns
with such tokens. The whole prompt is encoded at once, so that its ids are those of transformers.
"""

import asyncio
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, pairwise
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer

from app.llm.models.byte_level import token_bytes
from app.llm.models.chat_template import LOOK_SECONDS, RENDER_SECONDS, ChatTemplate
from app.llm.models.load_errors import is_failure
from app.llm.models.renamed_tokens import rename_added_tokens
from app.llm.protocol import EngineInfo
from app.llm.reasoning import REASONING_MEMBERS, ModelReasoning, Thinking
from app.llm.spellings import Spellings
from app.llm.tool_calls import CALL_MEMBERS, escaped_around_calls, with_tool_calls
from app.llm.tool_formats import tool_format
from app.llm.tools import Tool
from app.utils.errors import ChatTemplateError, ValidationFailedError

T = TypeVar("T")

# For models that have no chat template.
_DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


class _Answer(NamedTuple):
    """A kept answer: its text from ``start`` to ``end``, and its own tokens' from ``begin``."""

    begin: int
    start: int
    end: int
    token_ids: list[int]


class PromptTokenizer:
    """Renders and encodes prompts for one model.

    ``decoder`` is the copy of the tokenizer for the event loop. ``template_tokens`` are the
    spellings of the special tokens that frame turns in the chat template. ``frames_turns`` is false
    where plain text does, which a message can imitate. ``reasoning`` is what the template says of
    reasoning, and ``call_marks`` are texts of special tokens in calls of tools, by their ids.
    ``token_bytes`` returns the bytes of one token.
    """

    def __init__(self, info: EngineInfo) -> None:
        self.decoder = Tokenizer.from_str(info.tokenizer_json)
        template = info.chat_template or _DEFAULT_CHAT_TEMPLATE
        self._template = ChatTemplate(template, info.special_tokens)
        added = self.decoder.get_added_tokens_decoder()
        self._spellings = spellings = Spellings(added, template)
        self._write = spellings.mark
        self.tool_format = tool_format(template).with_tokens(spellings.named)
        special = spellings.special
        # The other special tokens, such as <s>, may be meant in an answer.
        self.template_tokens = tuple(t for t in special if t in template)
        self.special_token_ids = frozenset(special.values())
        # Decoding leaves out special tokens.
        self.call_marks = {i: t for t, i in special.items() if self.tool_format.spells(t)}
        self.reasoning = ModelReasoning(
            template,
            {t.content: (i, t.special) for i, t in added.items()},
            self._template.variables - info.special_tokens.keys(),
        )
        self._chat_mark = self._write("!")
        self._message_mark = spellings.marked(r"#(\d+)")
        self._kept = re.compile(spellings.mark(r"@([\d,]+)") + "(?s:(.*?))" + self._write("/"))
        self._written_name = spellings.marked(r"=\d+")
        self._some_normalized = any(added[i].normalized for i in spellings.framing.values())
        names = spellings.names
        self._name_of = {i: names[text] for text, i in spellings.framing.items()}
        self._encoder, self._model_ids = rename_added_tokens(info.tokenizer_json, names)
        # The text before this token is encoded as if it ended there.
        self._cut = self._write("|")
        self._encoder.add_special_tokens([AddedToken(self._cut, normalized=False)])
        bos = self.decoder.token_to_id(info.special_tokens.get("bos_token", ""))
        self._beginning = [] if bos is None else [bos]
        self.token_bytes = token_bytes(self.decoder)
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

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """What :meth:`render_chat` returns, marked so that :meth:`encode` knows what it is."""
        return self._chat_mark + self.render_chat(messages, tools, values)

    def thinking(self, prompt: str, **asked: Any) -> Thinking | None:
        """See :meth:`ModelReasoning.thinking`; a bare prompt's answer has no reasoning."""
        if self.reasoning.form is None or not prompt.startswith(self._chat_mark):
            return None
        return self.reasoning.thinking(prompt, **asked)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt: of bare text, or of what :meth:`chat_prompt` returned."""
        if prompt.startswith(self._chat_mark):
            return self.encode_rendered(prompt.removeprefix(self._chat_mark))
        return self.encode_text(prompt)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat, which ends where the assistant's turn begins.

        Each message has ``role`` and ``content``. An earlier answer may have ``token_ids``, which
        are then used in place of encoding its content, and ``reasoning_content``. ``values`` are
        further variables of the template, see :meth:`ModelReasoning.values`.

        Returns:
            Text for :meth:`encode_rendered`, with placeholders for spellings of special tokens.

        Raises:
            ChatTemplateError: The model's template rejects the messages, or fails on them.
        """
        messages = self.tool_format.for_template(messages, tools)
        if self.tool_format.calls_in_template:
            messages = with_tool_calls(messages, self.tool_format)
        if not self._takes_system:
            messages = _fold_system(messages)
        plain = [self._escape(m["role"], m["content"]) for m in messages]
        told = tools if self.tool_format.in_template else ()
        definitions = [self._spellings.escape_within(tool.definition()) for tool in told]
        values = self._spellings.escape_within(values)
        rendered = self._render(messages, plain, definitions, values)
        kept = {str(i): m["token_ids"] for i, m in enumerate(messages) if m.get("token_ids")}
        if not kept:
            return rendered
        marked = [self._write(f"#{i}") if str(i) in kept else t for i, t in enumerate(plain)]
        first, *parts = self._message_mark.split(
            self._render(messages, marked, definitions, values)
        )
        if not rendered.startswith(first):
            return rendered
        written, position = [first], len(first)
        for index, literal in zip(parts[::2], parts[1::2], strict=True):
            # A template may trim an answer. Where it reads or changes it, its tokens are wrong.
            for answer in (plain[int(index)], plain[int(index)].strip()):
                end = position + len(answer)
                if rendered.startswith(answer, position) and rendered.startswith(literal, end):
                    break
            else:
                break
            ids = ",".join(map(str, kept[index]))
            written += [self._write(f"@{ids}"), answer, self._write("/"), literal]
            position = end + len(literal)
        return "".join(written) + rendered[position:]

    def _escape(self, role: str, content: str) -> str:
        """A message's text in which only the marks of calls are special tokens."""
        # A template may look for such a token in an answer, as for the end of its reasoning.
        escape = partial(self._spellings.escape, is_answer=role == "assistant")
        if role != "assistant" or not self.call_marks or self.tool_format.calls_in_template:
            return escape(content)
        return escaped_around_calls(content, self.tool_format, escape)

    def _probe_frames(self) -> bool:
        """Whether a turn begins with a token that no text of a caller can become."""
        turns = [{"role": role} for role in ("user", "assistant", "user")]
        try:
            with self._template.watched():
                rendered = self._render(turns, ["\ue000", "\ue001", "\ue000"])
        except ChatTemplateError:
            return True
        answer = rendered.partition("\ue000")[2].partition("\ue000")[0].split("\ue001")
        return all(self._spellings.pattern.search(frame) for frame in answer)

    def _probe_system_role(self) -> bool:
        """Whether the template writes a system message: Gemma 2's refuses it, Phi-3's drops it."""
        turns = [{"role": role} for role in ("system", "user")]
        try:
            with self._template.watched():
                return "\ue000" in self._render(turns, ["\ue000", "\ue001"])
        except ChatTemplateError:
            return False

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        contents: Sequence[str],
        tools: Sequence[dict[str, Any]] = (),
        values: Mapping[str, Any] | None = None,
    ) -> str:
        chat: list[dict[str, Any]] = []
        for message, content in zip(messages, contents, strict=True):
            chat.append({"role": message["role"], "content": content})
            if reasoning := message.get("reasoning_content"):
                chat[-1] |= dict.fromkeys(REASONING_MEMBERS, self._spellings.escape(reasoning))
            for name in message.keys() & CALL_MEMBERS:
                chat[-1][name] = self._spellings.escape_within(message[name])
        return self._template.render(chat, tools, values)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token; a part of a character is U+FFFD."""
        return [self.token_bytes(i).decode(errors="replace") for i in token_ids]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a bare prompt: plain text, with the special tokens that the model adds.

        An empty text is the model's token for the beginning of a text, if it has one.
        """
        encoding = self._encode(text, add_special_tokens=True)
        # The tokens that the model adds have the model's ids.
        ids = [
            token if is_added else self._model_ids.get(token, token)
            for token, is_added in zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        ]
        return ids or self._beginning

    def encode_rendered(self, rendered: str, as_text: frozenset[int] = frozenset()) -> list[int]:
        """Token ids of a prompt from :meth:`render_chat`; its special tokens are the template's.

        The spellings of special tokens whose numbers are in ``as_text`` are text.
        """
        number = count()

        def named(text: str) -> str:
            # The encoder gets the template's tokens by their names.
            spellings = self._spellings
            text = spellings.pattern.sub(
                lambda m: m[0] if next(number) in as_text else spellings.names[m[0]], text
            )
            return spellings.restore(text)

        first, *parts = self._kept.split(rendered)
        text = named(first)
        answers: list[_Answer] = []
        for written, answer, after in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            ids = [int(token) for token in written.split(",")]
            start = len(text)
            text += named(answer)
            if (begin := self._begin(ids, text, start)) is not None:
                answers.append(_Answer(begin, start, len(text), ids))
            text += named(after)
        encoding = self._encode(text)
        if missed := self._missed(text, encoding):
            numbers = [i for i in range(next(number)) if i not in as_text]
            return self.encode_rendered(rendered, as_text | {numbers[i] for i in missed})
        ids = self._ids(encoding.ids)
        offsets = encoding.offsets if answers else []
        unusual = [a for a in answers if _tokens_of(a, ids, offsets) != a.token_ids]
        return self._encode_kept(text, unusual) if unusual else ids

    def _missed(self, text: str, encoding: Encoding) -> list[int]:
        """The names in a text that the encoder did not find, by their numbers.

        A token that is looked for in normalized text may need a blank before it, as in Vicuna's.
        """
        if not self._some_normalized:
            return []
        found = [
            offsets
            for token, offsets in zip(encoding.ids, encoding.offsets, strict=True)
            if self._model_ids.get(token) in self._name_of
        ]
        missed: list[int] = []
        for i, name in enumerate(self._written_name.finditer(text)):
            start, end = found[i - len(missed)] if i - len(missed) < len(found) else (0, 0)
            if not start <= name.start() < name.end() <= end:
                missed.append(i)
        return missed

    def _encode_kept(self, text: str, answers: Sequence[_Answer]) -> list[int]:
        """Token ids of a text in which these answers have their own."""
        bounds = [0, *(a.begin for a in answers), len(text)]
        encoding = self._encode(self._cut.join(text[i:j] for i, j in pairwise(bounds)))
        starts, ends = zip(*encoding.offsets, strict=True)
        ids: list[int] = []
        whole: list[_Answer] = []
        position = 0
        for number, answer in enumerate(answers):
            cut = answer.begin + number * len(self._cut)
            end = answer.end + (number + 1) * len(self._cut)
            ids += self._ids(encoding.ids[position : bisect_left(starts, cut)])
            ids += answer.token_ids
            position = bisect_left(starts, end)
            if ends[position - 1] <= end:
                whole.append(answer)
        if len(whole) < len(answers):
            # A token joins the others' ends to the text behind them.
            return self._encode_kept(text, whole)
        return ids + self._ids(encoding.ids[position:])

    def _begin(self, token_ids: Sequence[int], text: str, start: int) -> int | None:
        """Where an answer's tokens begin in a text that ends with the answer from ``start``.

        SentencePiece writes the blank before a word into the word's token, and the answer's text
        begins without it: the blank is the template's, or is in the tokens alone.
        """
        spelled = b"".join(
            self._name_of[i].encode() if i in self._name_of else self.token_bytes(i)
            for i in token_ids
        ).decode(errors="replace")
        for said in (spelled, spelled.removeprefix(" ")):
            if text.endswith(said) and len(text) - len(said) <= start < len(text):
                return len(text) - len(said)
        return None

    def _ids(self, encoded: Sequence[int]) -> list[int]:
        return [self._model_ids.get(token, token) for token in encoded]

    def _encode(self, text: str, *, add_special_tokens: bool = False) -> Encoding:
        try:
            return self._encoder.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            if not is_failure(error):
                raise
            raise ValidationFailedError(
                "The model's tokenizer fails on this prompt; another text may succeed."
            ) from error


def _fold_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Put the system message in front of the first user message, for templates without one."""
    if messages[0]["role"] != "system":
        return list(messages)
    text, rest = messages[0]["content"], list(messages[1:])
    if rest and rest[0]["role"] == "user":
        text = f"{text}\n\n{rest.pop(0)['content']}"
    return [{"role": "user", "content": text}, *rest]


def _tokens_of(
    answer: _Answer, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> Sequence[int]:
    """The tokens of a prompt that hold a part of an answer's text."""
    first = bisect_right(offsets, answer.start, key=itemgetter(1))
    return ids[first : bisect_left(offsets, answer.end, key=itemgetter(0))]
