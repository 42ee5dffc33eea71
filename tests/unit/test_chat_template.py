"""Broken or hostile chat templates end in an error of their request, or of the load."""

from pathlib import Path

import pytest

from app.llm.engine.echo import EchoBackend
from app.llm.models import chat_template
from app.llm.models.chat_template import ChatTemplate, check_chat_template, read_chat_template
from app.llm.protocol import EngineInfo
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import ChatTemplateError, ModelLoadError

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FAULTS = {
    "{{ 1 // 0 }}": "ZeroDivisionError",
    "{{ 1 + messages[0]['content'] }}": "TypeError",
    "{{ 'x' * 10**13 }}": "MemoryError",
    "{% for i in range(10**9) %}{% endfor %}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ strftime_now(1) }}": "TypeError",
    "{% if 1 %}" * 200 + "{% endif %}" * 200: "IndentationError",
    "{{ missing.member }}": "'missing' is undefined",
    "{{ ''.__class__.mro() }}": "unsafe",
    "{% for %}": "Expected an expression",
    "{{ 'x' * 2000000 }}": "2000000 characters",
}
REFUSED_AT_LOAD = [
    template for template in FAULTS if "missing" not in template and "mro" not in template
]


def chat(text: str) -> list[dict[str, str]]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]


@pytest.fixture
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering may take a tenth of a second; the endless template takes an hour."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.1)
    monkeypatch.setattr("app.llm.tokenizer.RENDER_SECONDS", 0.1)


@pytest.mark.parametrize("template", FAULTS)
def test_whatever_a_template_raises_is_an_error_of_the_request(template: str) -> None:
    """The request gets a 400 that names the fault, and never a 500."""
    with pytest.raises(ChatTemplateError, match=FAULTS[template]) as caught:
        ChatTemplate(template, {}).render(chat("hi"))
    assert caught.value.status == 400
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("template", REFUSED_AT_LOAD)
def test_a_template_that_is_broken_is_refused_at_load(template: str) -> None:
    """A template that fails on the plainest chat does not load, and the line has the reason."""
    with pytest.raises(ModelLoadError, match=FAULTS[template]) as caught:
        check_chat_template(template, {}, "tiny")
    line = str(caught.value)
    assert line.startswith("the chat template of tiny cannot be used: ")
    assert "\n" not in line
    assert len(line) < 400


def test_a_template_may_refuse_the_plainest_chat() -> None:
    """A template that raises an exception of its own, or wants more variables, loads."""
    for template in ("{{ raise_exception('a system message first') }}", "{{ documents[0].text }}"):
        check_chat_template(template, {}, "tiny")


def test_a_template_of_absurd_length_is_refused() -> None:
    """A template of a million characters is not compiled."""
    with pytest.raises(ModelLoadError, match="It has 1000001 characters"):
        check_chat_template("x" * 1_000_001, {}, "tiny")


@pytest.mark.usefixtures("_short_limit")
def test_a_template_that_never_ends_is_refused_at_load() -> None:
    """The line says that the template takes too long."""
    with pytest.raises(ModelLoadError, match=r"takes more than 0\.1 s for these messages"):
        check_chat_template(ENDLESS, {}, "tiny")


@pytest.mark.usefixtures("_short_limit")
async def test_a_template_that_never_ends_for_one_chat_ends_its_request_alone() -> None:
    """The request gets a 400, and the encoder's thread serves the next one."""
    template = f"{{% if 'loop' in messages[-1]['content'] %}}{ENDLESS}{{% endif %}}ok"
    info = EchoBackend().info
    fields = {name: getattr(info, name) for name in info.__struct_fields__}
    tokenizer = PromptTokenizer(EngineInfo(**{**fields, "chat_template": template}))
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match="takes more than") as caught:
            await tokenizer.run(tokenizer.render_chat, chat("loop"))
        assert caught.value.status == 400
        assert await tokenizer.run(tokenizer.render_chat, chat("hi")) == "ok"
    tokenizer.close()


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that is missing, or no UTF-8, ends the start with its name and the reason."""
    path = tmp_path / "own.jinja"
    with pytest.raises(ModelLoadError, match=r"own\.jinja, which cannot be read: No such file"):
        read_chat_template(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"own\.jinja, which cannot be read: it is not UTF-8"):
        read_chat_template(str(path))
