"""The service does what its OpenAPI document says, for examples, boundaries and random requests."""

import asyncio
import importlib
from types import ModuleType

import pytest
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

# The same each time; `make fuzz` takes another each time.
SEED = 1
# Their fields are those of other routes. `make fuzz` tries their boundaries, too.
SPARED = ["/v1/chat", "/v1/completions", "/v1/tokenize"]


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Imports schemathesis, which takes seconds, where it is used: all processes read this file."""
    return importlib.import_module("tests.fuzz.schema")


@pytest.mark.no_cover
def test_the_document_is_kept(schema: ModuleType) -> None:
    """Every example, most boundaries, and some random and chained requests."""
    found = schema.run(40, SEED, spared=SPARED)
    assert not found.failures, "\n\n".join(f"{k}\n{v}" for k, v in found.failures.items())
    assert found.tasks == []
    assert found.cases.keys() == {"examples", "coverage", "fuzzing", "stateful"}
    assert found.cases["coverage"] > 2000


class _Body(BaseModel):
    number: int = Field(ge=0, le=9)


_BODY = {"content": {"application/json": {"schema": _Body.model_json_schema()}}, "required": True}


def _broken() -> FastAPI:
    app = FastAPI()

    @app.post("/crash")
    async def crash(body: _Body) -> Response:
        app.state.task = asyncio.create_task(asyncio.sleep(60))
        return Response(status_code=500)

    @app.post("/take", openapi_extra={"requestBody": _BODY})
    async def take() -> Response:
        return Response(status_code=204)

    return app


def test_what_breaks_the_document_is_found(
    schema: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application that crashes, takes what it forbids, and leaves tasks, is found out."""
    monkeypatch.setattr(schema, "_SETTLE_SECONDS", 0.1)
    findings = schema.run(18, SEED, schema.Watched(_broken()))
    kinds = {what.split(": ")[1] for what in findings.failures}
    assert {"not_a_server_error", "what_the_document_forbids_is_refused"} <= kinds
    assert any("sleep" in name for name in findings.tasks)
