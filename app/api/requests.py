"""Requests of the native routes, and what all generating routes share.

Numbers are numbers: ``"16"``, ``true`` and NaN are refused, unknown fields too.
"""

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from app.core.security import Principal
from app.llm.protocol import ANY_OBJECT, SAMPLING_FIELDS, Grammar, JsonSchemaGrammar, RegexGrammar

Schema = dict[str, Any]
Role = Literal["system", "user", "assistant"]

# Faults of a body that are described; the rest of a longer list would tell nobody anything.
MAX_FAULTS = 64
MAX_STOPS = 4
MAX_STOP_CHARS = 256

_NULL: Schema = {"type": "null"}
_ANNOTATIONS = ("title", "description", "default")

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
VariableName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Variable = bool | int | float | Annotated[str, Field(max_length=1024)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class RequestModel(BaseModel):
    """Base of all request bodies and their parts.

    Attributes:
        neutral: Fields that this service does not have, and their values that ask for nothing;
            ``null`` asks for nothing in any known field.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="wrap")
    @classmethod
    def _validate(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Drop what asks for nothing, and make one fault of very many.

        A body has room for 100,000 faults. To list them, or only the first, takes half a second, in
        which nobody is answered.
        """
        try:
            return validate(cls._without_neutral(data))
        except ValidationError as error:
            if error.error_count() > MAX_FAULTS:
                raise ValueError(f"more than {MAX_FAULTS} faults") from None
            raise

    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name for name, field in cls.model_fields.items()}
        known = names | cls.neutral.keys()
        return {
            name: value
            for name, value in data.items()
            if not (name in known and (value is None or _is_one_of(value, cls.neutral.get(name))))
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> Schema:
        """The schema of what is accepted: null, and the values that ask for nothing, included."""
        schema = handler(core_schema)
        model = handler.resolve_ref_schema(schema)
        fields, required = model["properties"], model.get("required", ())
        for name in fields.keys() - set(required):
            fields[name] = _or_null(fields[name])
        for name, values in cls.neutral.items():
            fields[name] = {"description": "Asks for nothing.", "enum": [None, *values]}
        return schema


def _or_null(schema: Schema) -> Schema:
    """A field's schema that allows null as well; its annotations stay at the top."""
    annotations: Schema = {k: v for k, v in schema.items() if k in _ANNOTATIONS}
    inner = {k: v for k, v in schema.items() if k not in annotations}
    if not inner or _NULL in inner.get("anyOf", ()):
        return schema
    alternatives = inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]
    return {"anyOf": [*alternatives, _NULL], **annotations}


def _is_one_of(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    # 0 is not False here, nor 1 True.
    return any(value == n and type(value) is type(n) for n in neutral or ())


class JsonSchemaFormat(RequestModel):
    """A JSON schema, as OpenAI's clients send it."""

    name: str = Field("", max_length=64)
    description: str = Field("", max_length=8192)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(
        False,
        description="On the OpenAI routes: refuse a schema that cannot be held in full; the native "
        "ones always do.",
    )


class ResponseFormat(RequestModel):
    """What the answer must look like; see docs/api.md, Structured output."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = Field(
        None, min_length=1, max_length=4096, description="The whole answer matches it."
    )
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, min_length=1, max_length=256, description="The answer is one of these."
    )

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        for kind in ("json_schema", "regex", "choice"):
            if (getattr(self, kind) is not None) != (self.type == kind):
                raise ValueError(f"the type {kind}, and no other, has a member {kind}")
        return self

    def grammar(self) -> Grammar | None:
        """The same for the engine."""
        if self.type == "json_object":
            return ANY_OBJECT
        if self.json_schema is not None:
            return JsonSchemaGrammar(json.dumps(self.json_schema.schema_))
        if self.choice is not None:
            return RegexGrammar("|".join(map(_escape_regex, self.choice)))
        return RegexGrammar(self.regex) if self.regex is not None else None


def _escape_regex(text: str) -> str:
    """A regular expression for exactly this text, in every dialect that a grammar may have."""
    return re.sub(r"([\\.^$|?*+()\[\]{}/-])", r"\\\1", text)


class Sampling(RequestModel):
    """How tokens are chosen; shared by all generating routes."""

    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 always takes the likeliest token; default: model.temperature if it is set, "
        "else the model's, else 0.7.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Only the likeliest tokens up to this sum; default: the model's, or 1.",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="Only the k likeliest tokens; 0: all; default: the model's, or 0.",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Only tokens at least this share as likely as the likeliest; default: the "
        "model's, or 0.",
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=2,
        description="Above 1: tokens seen before become less likely; default: the model's, or 1.",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: tokens generated before become less likely."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: the more often generated, the less likely."
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before the first of these; a string, or up to four."
    )
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="Makes a sampled answer repeatable."
    )
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    cache: bool = Field(True, description="false: neither read nor write the response cache.")


class SamplingFields(Sampling):
    """How the answer is generated; shared by all generating routes but /v1/responses."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens to generate; at most, and by default, model.max_tokens.",
    )
    response_format: ResponseFormat | None = Field(
        None, description="What the answer must look like."
    )


class ReasoningFields(RequestModel):
    """How the model reasons before it answers a chat; see docs/api.md, Reasoning."""

    reasoning_effort: Effort | None = Field(
        None,
        description="How much the model reasons, in the words of its chat template; none: not.",
    )
    chat_template_kwargs: dict[VariableName, Variable] = Field(
        {}, max_length=16, description="Variables of the model's chat template."
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, description="Most tokens of reasoning; then the answer begins."
    )


class GenerateRequest(SamplingFields):
    """Body of POST /v1/generate."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Explain quantum computing in simple terms",
                    "max_tokens": 200,
                    "temperature": 0.7,
                }
            ]
        }
    )

    prompt: str = Field(min_length=1, description="At most security.max_prompt_chars characters.")


class Message(RequestModel):
    """One turn of a chat."""

    role: Role
    content: str = Field(min_length=1)
    reasoning: str = Field("", description="Of an earlier answer.")

    @model_validator(mode="after")
    def _answers_alone_have_reasoning(self) -> Self:
        if self.reasoning and self.role != "assistant":
            raise ValueError("only messages of the role assistant have reasoning")
        return self


class ChatRequest(SamplingFields, ReasoningFields):
    """Body of POST /v1/chat."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_tokens": 100,
                    "temperature": 0.7,
                }
            ]
        }
    )

    messages: list[Message] = Field(
        min_length=1,
        max_length=1000,
        description="Only the first may have the role system, and another must follow it.",
    )
    session_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="Keeps the conversation; with it, only the new messages are sent.",
    )

    @model_validator(mode="after")
    def _system_comes_first(self) -> Self:
        if any(m.role == "system" for m in self.messages[1:]):
            raise ValueError("only the first message may have the role system")
        if self.messages[-1].role == "system":
            raise ValueError("a message to answer must follow the one with the role system")
        return self


def job_fields(
    body: SamplingFields, caller: Principal, deadline: float | None, request: Request
) -> dict[str, Any]:
    """The arguments of a :class:`Job` that /v1/generate and /v1/chat share."""
    form = body.response_format
    return {
        **sampling_fields(body, caller, deadline, request),
        "max_tokens": body.max_tokens,
        "grammar": form.grammar() if form else None,
    }


def reasoning_fields(body: ReasoningFields) -> dict[str, Any]:
    """The arguments of a :class:`Job` that the routes of chats share."""
    return {
        "reasoning_effort": body.reasoning_effort,
        "template_values": body.chat_template_kwargs,
        "thinking_budget": body.thinking_token_budget,
    }


def sampling_fields(
    body: Sampling, caller: Principal, deadline: float | None, request: Request
) -> dict[str, Any]:
    """The arguments of a :class:`Job` that all generating routes share."""
    no_cache = "no-cache" in request.headers.get("cache-control", "").lower()
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {
        "sampling": {
            name: value
            for name in SAMPLING_FIELDS
            if (value := getattr(body, name, None)) is not None
        },
        "stop": stop,
        "caller": caller.key_id,
        "cache": body.cache and not no_cache,
        "deadline": deadline,
    }
