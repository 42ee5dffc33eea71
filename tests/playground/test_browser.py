"""The playground in a real Chromium, over the echo engine, which answers with the question.

A second of a browser takes as much processor time as many other tests; what takes longest, or
guards least, is left to `make test-browser`.
"""

import json
import re

import pytest

from tests.support.browser import POLLING, POOR, Visitor
from tests.support.service import API_KEY

LONG = "x" * 400
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'

XSS = [
    "<script>boom()</script>",
    "<img src=x onerror=boom()>",
    "<svg onload=boom()><animate onbegin=boom() attributeName=x></svg>",
    "<iframe srcdoc='<script>parent.boom()</script>'></iframe>",
    "[a](javascript:boom())",
    "[b](JaVaScRiPt&colon;boom())",
    "[c](data:text/html,<script>boom()</script>)",
    "[d](vbscript:boom())",
    "![e](https://example.org/?stolen)",
    '![f](x"onerror="boom())',
    "<a href='javascript:boom()'>g</a>",
    "<https://example.org/'onclick='boom()>",
    "```html\n<script>boom()</script>\n```",
    '```"onmouseover="boom()\nx\n```',
    "`<img src=x onerror=boom()>`",
    "| <img src=x onerror=boom()> |\n|---|\n| <script>boom()</script> |",
    "<math><mtext><table><mglyph><style><img src=x onerror=boom()>",
    "<form action='https://example.org'><input name=attributes><button>h</button></form>",
    "<style>@import 'https://example.org/x.css'; * { display: none }</style>",
    "<base href='https://example.org/'><link rel=stylesheet href=x>",
    "<meta http-equiv=refresh content='0; url=javascript:boom()'>",
    "<details open ontoggle=boom()><object data=x><embed src=x>",
    "\\<img src=x onerror=boom()\\>&lt;script&gt;boom()&lt;/script&gt;",
]


def test_a_first_visit_asks_for_a_key(visitor: Visitor) -> None:
    """A message waits for the key, a wrong key is told, and the key is in sessionStorage alone."""
    page = visitor.page
    visitor.open()
    assert page.is_visible("#welcome-key")
    visitor.say("hello", wait=False)
    visitor.enter_key("wrong")
    page.wait_for_selector("#key-fault:has-text('does not know this key')")
    visitor.enter_key()
    visitor.wait_for_answers(1)
    assert visitor.answer() == "hello"
    kept = page.evaluate("[JSON.stringify(localStorage), document.cookie]")
    assert API_KEY not in kept[0]
    assert kept[1] == ""
    assert API_KEY in page.evaluate("JSON.stringify(sessionStorage)")
    assert visitor.context.cookies() == []
    assert API_KEY not in page.url


def test_an_answer_streams_with_its_figures(visitor: Visitor) -> None:
    """Text is shown before the answer is complete; its figures follow, and few announcements."""
    page = visitor.page
    visitor.come_with_key()
    page.evaluate(
        "window.told = 0; new MutationObserver(() => window.told++)"
        ".observe(document.getElementById('announcer'), {childList: true, subtree: true})"
    )
    visitor.say(LONG[:60], wait=False)
    page.wait_for_function(
        "() => /^x+$/.test(document.querySelector('.message.assistant .prose').innerText.trim())",
        polling=POLLING,
    )
    assert page.inner_text("#send") == "Stop"
    assert len(visitor.answer()) < 60
    visitor.wait_for_answers(1)
    assert visitor.answer() == LONG[:60]
    figures = page.locator(".figures").inner_text()
    for pattern in (
        r"61 tokens",
        r"[\d.]+ tokens/s",
        r"first after [\d.]+ m?s",
        r"\d+ in prompt, 0 cached",
        r"generated anew",
        r"ended by the model",
        r"req-[0-9a-f]{32}",
    ):
        assert re.search(pattern, figures), pattern
    assert page.evaluate("window.told") <= 4
    assert visitor.history() == [LONG[:60]] * 2


def test_escape_stops_and_frees_the_slot(visitor: Visitor) -> None:
    """Esc ends the generation on the service; what was said goes along with the next message."""
    page = visitor.page
    visitor.come_with_key()
    visitor.say(LONG, wait=False)
    page.wait_for_selector("#status-slots:has-text('1 / ')")
    page.wait_for_function(
        "() => document.querySelector('.message.assistant .prose').innerText.includes('x')",
        polling=POLLING,
    )
    page.keyboard.press("Escape")
    visitor.wait_for_answers(1)
    assert 0 < len(visitor.answer()) < len(LONG)
    visitor.service.wait_for_metric("llm_requests_running", 0)
    page.wait_for_selector("#status-slots:has-text('0 / ')")
    assert "stopped by you" in page.locator(".figures").inner_text()
    partial = visitor.answer()
    visitor.say("more")
    assert visitor.history() == [LONG, partial, "more", "more"]


def test_conversations_survive_a_reload(visitor: Visitor) -> None:
    """A reload shows the service's session again; names are local, deletion is the service's."""
    page = visitor.page
    visitor.come_with_key()
    visitor.say("first")
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert visitor.answer() == "first"
    visitor.say("second")
    assert visitor.history() == ["first", "first", "second", "second"]
    page.click("#new")
    visitor.say("other")
    rows = page.locator("#conversations li")
    assert rows.locator(".name").all_inner_texts() == ["other", "first"]
    page.click("#conversations li.current [aria-label='Rename other']")
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    assert rows.locator(".name").all_inner_texts() == ["renamed", "first"]
    page.click("#conversations .name:has-text('first')")
    visitor.wait_for_answers(2)
    before = visitor.service.get("/status").json()["sessions"]["active"]
    page.click("[aria-label='Delete first']")
    page.click("#conversations .sure")
    page.wait_for_selector("#welcome:not([hidden])")
    assert rows.locator(".name").all_inner_texts() == ["renamed"]
    assert visitor.service.get("/status").json()["sessions"]["active"] == before - 1


def test_another_answer_and_another_question_replace_the_old_ones(visitor: Visitor) -> None:
    """What is asked anew, or changed, takes its old place on the service too."""
    page = visitor.page
    visitor.come_with_key()
    visitor.say("one")
    visitor.say("two")
    page.locator("[aria-label='Ask for another answer']").last.click()
    page.wait_for_selector(".message.assistant[aria-busy=true]")
    visitor.wait_for_answers(2)
    assert "generated anew" in page.locator(".figures").last.inner_text()
    assert visitor.history() == ["one", "one", "two", "two"]
    page.locator("[aria-label='Edit and send again']").first.click()
    page.fill(".edit textarea", "three")
    page.press(".edit textarea", "Enter")
    visitor.wait_for_answers(1)
    assert visitor.answer() == "three"
    assert visitor.history() == ["three", "three"]


def test_markup_of_the_model_does_nothing(visitor: Visitor) -> None:
    """No script, handler, address or element of an answer's text takes effect."""
    page = visitor.page
    visitor.come_with_key()
    page.evaluate("() => { window.boomed = 0; window.boom = () => window.boomed++; }")
    visitor.say("\n\n".join(XSS[:2]))
    page.evaluate(
        "async (texts) => { const { render } = await import('./playground/markdown.js');"
        " const host = document.createElement('div'); host.id = 'host';"
        " for (const text of texts) { const one = document.createElement('div');"
        " one.append(render(text)); host.append(one); }"
        " document.getElementById('messages').append(host); }",
        [*XSS, "\n\n".join(XSS)],
    )
    for element in page.query_selector_all("#messages a, #messages pre, #messages code"):
        element.dispatch_event("mouseover")
    found = page.evaluate(
        "[...document.querySelectorAll('#host *, .prose *')].map(e => [e.tagName.toLowerCase(),"
        " [...e.attributes].map(a => a.name), e.getAttribute('href')])"
    )
    assert page.evaluate("window.boomed") == 0
    assert {tag for tag, _, _ in found}.isdisjoint(
        {"script", "img", "iframe", "style", "form", "input", "base", "link", "meta", "object"}
    )
    assert not [name for _, names, _ in found for name in names if name.startswith("on")]
    addresses = [href for _, _, href in found if href]
    assert addresses
    assert all(re.match(r"(https?|mailto):", href) for href in addresses), addresses


def test_errors_say_what_to_do(visitor: Visitor) -> None:
    """A spent budget counts down from Retry-After; a forgotten key is asked for again."""
    page = visitor.page
    visitor.come_with_key(POOR)
    visitor.say("a")
    visitor.say("b")
    note = page.locator(".fault-note")
    assert "has used its tokens for today" in note.inner_text()
    assert re.search(r"You can ask again in \d+ (hours|minutes|s)", note.inner_text())
    assert note.locator("button", has_text="Ask again").is_disabled()
    page.evaluate("sessionStorage.setItem('playground.key', 'gone')")
    visitor.say("c", wait=False)
    page.wait_for_selector(".fault-note:has-text('does not know this key')")
    note.locator("button", has_text="Enter a key").click()
    visitor.enter_key()
    page.wait_for_selector("#key-dialog", state="hidden")
    visitor.wait_for_answers(2)
    assert visitor.answer() == "c"


@pytest.mark.full_size
def test_what_loads_is_shown(visitor: Visitor) -> None:
    """While the model loads a bar says what is done, by its share where the message has one."""
    page = visitor.page
    status = visitor.service.get("/status").json()
    status["engine"] |= {"state": "loading", "message": "downloading model.safetensors: 42 %"}
    page.route("**/status", lambda route: route.fulfill(json=status))
    visitor.open()
    page.wait_for_selector("#loading:not([hidden])")
    assert page.inner_text("#loading-text") == "Downloading model.safetensors: 42 %"
    assert page.eval_on_selector("#loading-bar", "bar => bar.value") == 42
    page.unroute("**/status")
    page.wait_for_selector("#state[data-state=ready]")
    assert page.is_hidden("#loading")


@pytest.mark.full_size
def test_reasoning_is_folded_away(visitor: Visitor) -> None:
    """Reasoning in a stream is shown on demand, and is no part of the answer."""
    deltas = [{"reasoning_content": "Let me see."}, {"content": "42"}]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    body = "".join(f"data: {data}\n\n" for data in [*map(json.dumps, events), "[DONE]"])
    visitor.come_with_key()
    visitor.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, headers={"Content-Type": "text/event-stream"}),
    )
    visitor.say("a question")
    assert visitor.answer() == "42"
    assert visitor.page.is_hidden(".thought")
    visitor.page.click(".reasoning summary")
    assert visitor.page.inner_text(".thought") == "Let me see."


@pytest.mark.full_size
def test_a_call_is_answered_in_a_form(visitor: Visitor) -> None:
    """A call of a tool has a form for its result, and the conversation goes on with that."""
    page = visitor.page
    visitor.come_with_key()
    page.fill("#tools", json.dumps(TOOLS))
    visitor.say(CALL)
    assert 'weather(city: "Oslo")' in page.inner_text(".call")
    page.fill(".call-form textarea", "12 degrees")
    page.click(".call-form button[type=submit]")
    page.wait_for_selector(".message.tool")
    visitor.wait_for_answers(2)
    assert visitor.history()[:3] == [CALL, CALL, "12 degrees"]
    page.reload()
    page.wait_for_selector(".message.tool")
    assert page.locator(".call").first.is_visible()
    page.click("#new")
    visitor.say(f"{CALL}\n{CALL}")
    assert visitor.history()[1] not in (CALL, f"{CALL}\n{CALL}")
    page.reload()
    page.wait_for_selector(".call")
    assert page.locator(".call").count() == 1
    assert page.inner_text(".message.assistant .prose") == ""
