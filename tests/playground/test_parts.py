"""The panel, the other tabs, narrow screens and /docs, in a real Chromium over the echo engine."""

import contextlib
import io
import json
import sys
from typing import Any

import pytest

from app.llm.protocol import ANY_OBJECT
from tests.support.browser import Visitor
from tests.support.curl import run_curl
from tests.support.service import API_KEY

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SERIOUS = ("serious", "critical")


def faults(visitor: Visitor) -> list[str]:
    """What axe-core finds of serious faults in the page as it is."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    found = axe.Axe().run(visitor.page).response["violations"]
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found
        if fault["impact"] in SERIOUS
        for node in fault["nodes"]
    ]


def fill_panel(visitor: Visitor) -> None:
    """Give every field of the panel a value."""
    page = visitor.page
    for name, value in {
        "system": 'Be brief; it\'s "wise".',
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "30",
        "seed": "7",
        "stop": "END\nSTOP",
    }.items():
        page.fill(f"#{name}", value)
    page.fill("#tools", json.dumps([TOOL]))


@pytest.mark.full_size
def test_the_snippets_are_the_request(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command and the program send what the page sends, and run as they are shown."""
    page = visitor.page
    visitor.come_with_key()
    fill_panel(visitor)
    page.fill("#message", 'it\'s "quoted" \\ and\nbroken')
    monkeypatch.setenv("API_KEY", API_KEY)
    page.click("#view-curl")
    command = page.inner_text("#snippet")
    page.click("#as-python")
    program = page.inner_text("#snippet")
    page.click("#snippet-close")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.press("#message", "Enter")
    visitor.wait_for_answers(1)
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": 'Be brief; it\'s "wise".'}
    assert body["stop"] == ["END", "STOP"]
    assert command.split("-d '")[1].rstrip("'").replace("'\\''", "'") == json.dumps(body, indent=2)
    session = sent.value.headers["x-session-id"]
    assert f"X-Session-ID: {session}" in command
    printed = run_curl(visitor.service, command).body
    events = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("data: {")]
    pieces = [c["delta"].get("content", "") for event in events for c in event["choices"]]
    assert "".join(pieces) == visitor.answer()
    out = io.StringIO()
    monkeypatch.setitem(sys.modules, "openai", pytest.importorskip("openai"))
    with contextlib.redirect_stdout(out):
        exec(compile(program, "program", "exec"), {})  # noqa: S102 - it is what is tested
    assert out.getvalue() == visitor.answer()


def test_a_mistake_in_a_schema_is_shown_where_it_is(visitor: Visitor) -> None:
    """JSON that is wrong is marked by line and column; a schema that is refused by its reason."""
    page = visitor.page
    visitor.come_with_key()
    page.select_option("#format", "json_schema")
    for text, line, column in [
        ('{\n  "type": [1,]\n}', 2, 14),
        ('{"a" 1}', 1, 6),
        ('{\n"a": tru\n}', 2, 6),
        ('{"a": "\\x"}', 1, 8),
        ('{"a": 1}}', 1, 9),
        ('{"a": 01}', 1, 7),
        ('{"a', 1, 2),
        ("[1 2]", 1, 4),
    ]:
        page.fill("#schema", text)
        where = page.inner_text("#schema-error")
        assert where.startswith(f"Line {line}, column {column}: "), (text, where)
        assert page.inner_text(".line-numbers .at-fault") == str(line)
    page.click("#schema-error button")
    assert page.evaluate("document.activeElement.id") == "schema"
    page.fill("#schema", json.dumps({"type": "object", "not": {}}))
    assert page.is_hidden("#schema-error")
    visitor.say("x")
    told = page.inner_text(".fault-note")
    assert page.inner_text("#schema-error") in told
    schema = '{\n  "type": "object",\n  "properties": {\n    "city": {"type": "strng"}\n  }\n}'
    page.fill("#schema", schema)
    fault = f"The JSON schema cannot be used: {ANY_OBJECT.where}.properties.city: it says why."
    error = {"message": fault, "code": "invalid_grammar", "param": "response_format"}
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": error})
    )
    visitor.say("x", answers=1)
    assert page.inner_text("#schema-error").startswith(f"Line 4, column 13: {fault}")
    assert page.inner_text(".line-numbers .at-fault") == "4"


@pytest.mark.full_size
def test_bare_prompts_and_tokens(visitor: Visitor) -> None:
    """Generate continues a prompt; Tokens shows each token with its id, and the count."""
    page = visitor.page
    visitor.come_with_key()
    page.click("#tab-generate")
    page.fill("#prompt", "once")
    page.click("#generate")
    page.wait_for_selector("#generated .figures")
    assert page.inner_text(".continuation") == "onceonce"
    page.press("#tab-generate", "ArrowRight")
    page.fill("#token-text", "a é\n")
    page.wait_for_selector(".token")
    page.check("#token-ids")
    assert page.locator(".token").all_inner_texts() == [
        f"{shown}{number}"
        for shown, number in zip("a·\ufffd\ufffd↵", (64, 220, 127, 102, 198), strict=True)
    ]
    assert page.inner_text("#token-count").startswith("5 tokens of 4 characters; the context holds")


@pytest.mark.full_size
def test_keys_of_the_keyboard(visitor: Visitor) -> None:
    """Shift+Enter breaks the line and Enter sends; an open dialog keeps Esc to itself."""
    page = visitor.page
    visitor.come_with_key()
    page.focus("#message")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    visitor.wait_for_answers(1)
    assert page.inner_text(".bubble") == "one\ntwo"
    page.click("#key-button")
    page.keyboard.press("Escape")
    assert page.is_hidden("#key-dialog")


def test_a_conversation_has_no_serious_fault(visitor: Visitor) -> None:
    """axe-core finds no serious fault in a conversation; the next test looks at everything."""
    visitor.come_with_key()
    visitor.say("`a`")
    assert faults(visitor) == []


@pytest.mark.full_size
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way(visitor: Visitor, scheme: Any) -> None:
    """axe-core finds no serious fault in any tab, with an answer, an error and the dialogs."""
    page = visitor.page
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    visitor.open()
    found = faults(visitor)
    visitor.come_with_key()
    page.select_option("#format", "json_schema")
    page.fill("#schema", "{,}")
    page.fill("#tools", json.dumps([TOOL]))
    visitor.say("an error")
    found += faults(visitor)
    page.select_option("#format", "text")
    visitor.say("# A\n\n| a |\n|---|\n| `b` [c](https://example.org) |\n\n```\nd\n```\n", answers=1)
    found += faults(visitor)
    visitor.say('<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>')
    found += faults(visitor)
    for open_dialog, close in (("#view-curl", "#snippet-close"), ("#key-button", "#key-cancel")):
        page.click(open_dialog)
        found += faults(visitor)
        page.click(close)
    page.click("#tab-generate")
    found += faults(visitor)
    page.click("#tab-tokens")
    page.fill("#token-text", "some text")
    page.wait_for_selector(".token")
    page.check("#token-ids")
    assert found + faults(visitor) == []


@pytest.mark.full_size
@pytest.mark.parametrize("width", [320, 600, 1000, 2560])
def test_no_width_scrolls_sideways(visitor: Visitor, width: int) -> None:
    """From 320 px on the page fits its width, and what is beside the conversation is reached."""
    page = visitor.page
    page.set_viewport_size({"width": width, "height": 640})
    visitor.come_with_key()
    visitor.say("w" * 60 + "\n\n```\n" + "c" * 90 + "\n```")
    for tab in ("generate", "tokens", "chat"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name, inside in (("sidebar", "#new"), ("panel", "#seed")):
        if page.is_visible(f"#{name}-button"):
            page.click(f"#{name}-button")
        page.wait_for_selector(inside, state="visible")
        page.keyboard.press("Escape")


@pytest.mark.full_size
def test_the_documentation_needs_no_internet(visitor: Visitor) -> None:
    """/docs shows every route with files of this service alone, under the same policy."""
    page = visitor.page
    visitor.open("/docs")
    page.wait_for_selector(".opblock")
    document = visitor.service.get("/openapi.json").json()
    operations = sum(len(methods) for methods in document["paths"].values())
    assert page.locator(".opblock").count() == operations
    page.click("#operations-health-livez_livez_get .opblock-summary-control")
    page.click("#operations-health-livez_livez_get .try-out button")
    page.click("#operations-health-livez_livez_get .execute")
    page.wait_for_selector(".live-responses-table :text('alive')")
