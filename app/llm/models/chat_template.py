"""A model's chat template, rendered in a limited time.

A template is a program by the model's author. transformers runs it in a sandbox, which keeps it
from the machine but limits neither its time nor the length of its text.
"""

import ctypes
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import jinja2
from jinja2 import meta

from app.utils.errors import ChatTemplateError, ModelLoadError

RENDER_SECONDS: Final = 5.0
"""Longest that a template may take for one prompt; the usual ones take less than a millisecond."""

LOOK_SECONDS: Final = 0.5
"""Time between two calls of :meth:`ChatTemplate.end_overdue` while a template is rendered."""

# Longest template, in characters; those of large models with many tools have 20,000.
_MAX_TEMPLATE = 1_000_000
# Most characters of a prompt: so many times those of its messages, and so many more.
_MAX_GROWTH, _MAX_ADDED = 10, 1_000_000


class _OverdueError(BaseException):
    """Raised in the thread that renders. A template cannot catch it, as it is no Exception."""


def template_library() -> ModuleType:
    """Import the part of transformers that renders chat templates.

    The first import takes most of a second: call this while the model loads.
    """
    return import_module("transformers.utils.chat_template_utils")


class ChatTemplate:
    """A Jinja template, and the special tokens that it may use by name.

    Prompts are rendered one after the other. Whoever renders has :meth:`end_overdue` called
    meanwhile, on another thread, or uses :meth:`watched`.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)
        self._lock = threading.Lock()
        # The thread that renders, and since when.
        self._rendering: tuple[int, float] | None = None

    @property
    def variables(self) -> set[str]:
        """Names that the template reads, those of Jinja left out; none where it is broken."""
        # The library's own tags would be unknown to this parser; they have no variables.
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source)
        parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - parses alone  # nosec B701
        try:
            names = meta.find_undeclared_variables(parser.parse(source))
        except (jinja2.TemplateError, SyntaxError, RecursionError):
            return set()
        return names - parser.globals.keys()

    def render(
        self,
        chat: Sequence[Mapping[str, str]],
        tools: Sequence[Mapping[str, Any]] = (),
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat, which ends where the assistant's turn begins.

        ``values`` are further variables.

        Raises:
            ChatTemplateError: The template rejects the messages, fails, takes too long or makes too
                much of them.
        """
        try:
            text = self._render(chat, tools, values or {})
        except jinja2.TemplateError as error:
            # The template's author wrote the text for callers; what is longer is something else.
            reason = " ".join(str(error).split())[:200]
            raise _error(f"refuses these messages: {reason}") from error
        except _OverdueError:
            # It may have come while the block below was left.
            self._rendering = None
            raise _error(f"takes more than {RENDER_SECONDS:g} s for these messages.") from None
        except Exception as error:
            raise _error(f"fails on these messages ({type(error).__name__}).") from error
        if len(text) > _MAX_ADDED + _MAX_GROWTH * sum(len(m["content"]) for m in chat):
            raise _error(f"makes {len(text)} characters of these messages, which is too much.")
        return text

    def _render(
        self,
        chat: Sequence[Mapping[str, str]],
        tools: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any],
    ) -> str:
        render = template_library().render_jinja_template
        with self._lock:
            self._rendering = threading.get_ident(), time.monotonic()
        try:
            rendered, _ = render(
                [chat],
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=True,
                **self._variables,
                **values,
            )
        finally:
            with self._lock:
                self._rendering = None
        return str(rendered[0])

    def end_overdue(self) -> None:
        """End the rendering that now takes more than :data:`RENDER_SECONDS`, if one does.

        Python interrupts the thread between two of its own instructions. A single long one of them,
        such as a power with a million digits, is not interrupted.
        """
        with self._lock:
            if self._rendering is None:
                return
            thread, since = self._rendering
            if time.monotonic() - since > RENDER_SECONDS:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_OverdueError)
                )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Call :meth:`end_overdue` on a thread while the block runs."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(LOOK_SECONDS):
                self.end_overdue()

        threading.Thread(target=watch, name="template-watch", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def read_chat_template(path: str) -> str:
    """The template that a setting names.

    Raises:
        ModelLoadError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ModelLoadError(
            f"model.chat_template names {path}, which cannot be read: {reason}; set "
            "MODEL__CHAT_TEMPLATE to a file with a Jinja template"
        ) from error


def check_chat_template(source: str, variables: Mapping[str, str], label: str) -> None:
    """Render the plainest chat; a template may refuse that, but it must not break.

    Raises:
        ModelLoadError: It is no template, it never ends, or it fails.
    """
    if len(source) > _MAX_TEMPLATE:
        raise _broken(label, f"It has {len(source)} characters.")
    template = ChatTemplate(source, variables)
    try:
        with template.watched():
            template.render([{"role": "user", "content": "x"}])
    except ChatTemplateError as error:
        cause = error.__cause__
        refused = isinstance(cause, jinja2.TemplateError)
        if not refused or isinstance(cause, jinja2.TemplateSyntaxError):
            raise _broken(label, error.message) from error


def _broken(label: str, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"the chat template of {label} cannot be used: {reason.rstrip('.')}; "
        "correct it, or choose another model"
    )


def _error(what: str) -> ChatTemplateError:
    return ChatTemplateError(f"The model's chat template {what}", param="messages")
