"""The tables of OpenAI's fields in docs/api.md are complete, and each row has a test."""

import re
from typing import Any

import pytest
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from app.api.openai.responses.request import ResponsesRequest
from app.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from app.core.config import PROJECT_ROOT

HINT = "Taken, without effect."
ROUTES: dict[str, tuple[Any, Any]] = {
    "POST /v1/chat/completions": (chat.CompletionCreateParamsStreaming, ChatCompletionRequest),
    "POST /v1/completions": (completion.CompletionCreateParamsStreaming, CompletionRequest),
    "POST /v1/responses": (responses.ResponseCreateParamsStreaming, ResponsesRequest),
}


def rows(route: str, column: int = -1) -> dict[str, str]:
    """The fields of a route's table, and a cell of each; the last one names a test."""
    text = (PROJECT_ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.partition(f"\n`{route}`:\n\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for line in table.splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for field in re.findall("`(.+?)`", cells[0]):
            assert field not in found, field
            found[field] = cells[column].strip("` |")
    return found


@pytest.mark.parametrize("route", ROUTES)
def test_every_field_has_a_row(route: str) -> None:
    """The table of a route has exactly the fields of OpenAI's client and of the route."""
    params, model = ROUTES[route]
    openai = set(params.__annotations__)
    assert len(openai) > 15
    assert set(rows(route)) == openai | set(model.model_fields)


@pytest.mark.parametrize("route", ROUTES)
def test_a_field_is_taken_or_refused(route: str) -> None:
    """Each field is in the request's schema, or refused with its neutral values known."""
    _, model = ROUTES[route]
    assert set(rows(route)) == set(model.model_fields) | set(model.neutral)


@pytest.mark.parametrize("route", ROUTES)
def test_each_field_is_in_its_class(route: str) -> None:
    """A row says whether its field is honoured, a hint or refused, as the request's model does."""
    _, model = ROUTES[route]
    classes = {field: cell.partition(" ")[0] for field, cell in rows(route, 1).items()}
    hints = {f for f, info in model.model_fields.items() if info.description == HINT}
    assert {field for field, kind in classes.items() if kind == "hints"} == hints
    refused = {field for field, kind in classes.items() if kind.startswith("refused")}
    assert refused == set(model.neutral)


@pytest.mark.parametrize("route", ROUTES)
def test_every_row_is_shown_by_a_test(route: str) -> None:
    """The test that a row names exists."""
    tests = "".join(
        path.read_text(encoding="utf-8")
        for path in (PROJECT_ROOT / "tests" / "api").glob("test_openai*.py")
    )
    for field, test in rows(route).items():
        assert f"def {test}(" in tests, (field, test)
