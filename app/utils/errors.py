"""Every error this service can answer with, and the errors that stop its start.

Each class carries its own HTTP status, code and headers, so that the one exception handler in
``app/api/errors.py`` has nothing to decide. Messages are for the caller: they never repeat the
caller's input and, for a 5xx, tell nothing about the service's inside.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base of all errors that become an HTTP answer in the one error shape.

    Attributes:
        status: HTTP status code.
        code: Machine-readable reason, stable across releases.
        type: OpenAI's coarse class of the error.
        message: One sentence for the caller.
        param: The request field at fault, if one is.
        headers: Extra response headers, such as ``Retry-After``.
        details: Extra members of the error object, such as ``prompt_tokens``.
    """

    status: int = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    default_message: ClassVar[str] = "The service failed to answer this request."

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, int] | None = None,
    ) -> None:
        self.message = message or self.default_message
        self.param = param
        self.headers = dict(headers or {})
        self.details = dict(details or {})
        super().__init__(self.message)


class InternalError(ServiceError):
    """Anything unforeseen; the log has the traceback, the caller has the request id."""


class InvalidRequestError(ServiceError):
    """Base of the errors the caller can mend by changing the request."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"
    default_message = "The request is not valid."


class MalformedHTTPError(InvalidRequestError):
    """What came is not HTTP/1.1, or is more than one kind of request at once."""

    code = "malformed_http"
    default_message = "This is not a well-formed HTTP/1.1 request."


class RequestTimeoutError(InvalidRequestError):
    """The head or the body of a request did not come in time."""

    status = 408
    code = "request_timeout"
    default_message = "The request did not arrive in time."


class HeadersTooLargeError(InvalidRequestError):
    """The request line and the headers are larger than any request needs."""

    status = 431
    code = "headers_too_large"
    default_message = "The request line and headers are too large."


class InvalidJSONError(InvalidRequestError):
    """The body is not JSON: malformed, not UTF-8, a lone surrogate, NaN or an infinity."""

    code = "invalid_json"
    default_message = "The request body is not valid JSON."


class ValidationFailedError(InvalidRequestError):
    """A field is missing, unknown, of the wrong type or out of range."""

    status = 422
    code = "validation_error"


class PromptTooLongError(InvalidRequestError):
    """More characters than ``security.max_prompt_chars``."""

    status = 422
    code = "prompt_too_long"


class UnsupportedParameterError(InvalidRequestError):
    """A field that the running engine cannot honour; refused rather than ignored."""

    code = "unsupported_parameter"


class InvalidGrammarError(InvalidRequestError):
    """A schema or regular expression for the answer that cannot be honoured in full."""

    code = "invalid_grammar"


class ContextLengthExceededError(InvalidRequestError):
    """Prompt tokens plus ``max_tokens`` exceed what the model can attend to."""

    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: together they "
            f"exceed the model's context of {context_length} tokens.",
            param="max_tokens" if prompt_tokens < context_length else None,
            details={"prompt_tokens": prompt_tokens, "context_length": context_length},
        )


class ChatTemplateError(InvalidRequestError):
    """The model's chat template refuses the messages, such as two user turns in a row."""

    code = "chat_template_error"


class PiiDetectedError(InvalidRequestError):
    """Personal data in a prompt, where ``pii.input`` is reject; its kinds are told, not itself."""

    code = "pii_detected"


class NotFoundError(InvalidRequestError):
    """No such route, or no such object for this caller."""

    status = 404
    code = "not_found"
    default_message = "There is nothing at this address."


class MethodNotAllowedError(InvalidRequestError):
    """The route exists, the method does not."""

    status = 405
    code = "method_not_allowed"
    default_message = "This address does not answer that method."


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    default_message = "That model is not served here; GET /v1/models tells which is."

    def __init__(self) -> None:
        super().__init__(param="model")


class SessionNotFoundError(NotFoundError):
    """The caller has no conversation of this name."""

    code = "session_not_found"
    default_message = "There is no such session."


class SessionBusyError(InvalidRequestError):
    """Another turn of the conversation is under way."""

    status = 409
    code = "session_busy"
    default_message = "Another request of this session is being answered."

    def __init__(self) -> None:
        super().__init__(param="session_id")


class IdempotencyKeyInUseError(InvalidRequestError):
    """The request of this idempotency key is being answered just now."""

    status = 409
    code = "idempotency_key_in_use"
    default_message = "The first request with this Idempotency-Key is still being answered."

    def __init__(self) -> None:
        super().__init__(param="Idempotency-Key")


class IdempotencyKeyReusedError(InvalidRequestError):
    """The idempotency key stands for a request with another route, body or session."""

    status = 422
    code = "idempotency_key_reused"
    default_message = "This Idempotency-Key belongs to another request; a new one needs a new key."

    def __init__(self) -> None:
        super().__init__(param="Idempotency-Key")


class BodyTooLargeError(InvalidRequestError):
    """The body exceeds ``security.max_body_bytes``."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        # The rest of the body is not read, so the connection cannot carry another request.
        super().__init__(
            f"The request body is larger than {limit} bytes.", headers={"Connection": "close"}
        )


class InvalidAPIKeyError(ServiceError):
    """No key, or one this service does not know; which of the two is not told."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"
    default_message = (
        "A valid API key is needed, in the X-API-Key header or as Authorization: Bearer."
    )

    def __init__(self) -> None:
        super().__init__(headers={"WWW-Authenticate": 'Bearer realm="llm-service"'})


class InsufficientScopeError(ServiceError):
    """A valid key that is not for this."""

    status = 403
    code = "insufficient_scope"
    type = "permission_error"

    def __init__(self, scope: str) -> None:
        # RFC 6750 names the scope in the challenge.
        challenge = f'Bearer realm="llm-service", error="insufficient_scope", scope="{scope}"'
        super().__init__(
            f"This API key does not have the scope {scope}.",
            headers={"WWW-Authenticate": challenge},
        )


class RetryableError(ServiceError):
    """Base of the refusals that pass with time; always says when to come back."""

    def __init__(self, message: str | None = None, *, retry_after: float = 1.0) -> None:
        # RFC 9110 allows whole seconds only; rounding down would invite a caller too early.
        self.retry_after = max(1, int(-(-retry_after // 1)))
        super().__init__(message, headers={"Retry-After": str(self.retry_after)})


class RateLimitExceededError(RetryableError):
    """The caller's token bucket is empty."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    default_message = "Too many requests; see Retry-After."


class TokenBudgetExceededError(RetryableError):
    """The key has used the tokens of its day, ``daily_tokens``."""

    status = 429
    code = "token_budget_exceeded"
    type = "rate_limit_error"
    default_message = "This API key has used its tokens of the day; see Retry-After."


class OverloadedError(RetryableError):
    """No place is free for this caller, or its request waited too long for its turn."""

    status = 503
    code = "overloaded"
    default_message = "The service is at capacity; see Retry-After."


class TooManyConnectionsError(RetryableError):
    """Every connection is taken, or every one that an address may have."""

    status = 503
    code = "too_many_connections"
    default_message = "There are too many connections; see Retry-After."


class ModelLoadingError(RetryableError):
    """The model is still being loaded."""

    status = 503
    code = "model_loading"
    default_message = "The model is still loading; see Retry-After."


class DrainingError(RetryableError):
    """The service is shutting down and takes no new work."""

    status = 503
    code = "draining"
    default_message = "The service is shutting down."


class EngineUnavailableError(RetryableError):
    """The engine process died; it is being started again."""

    status = 503
    code = "engine_unavailable"
    default_message = "The engine stopped unexpectedly and is being restarted."


class DeadlineExceededError(ServiceError):
    """``engine.request_timeout_seconds``, or the caller's own limit, passed before the end."""

    status = 504
    code = "deadline_exceeded"
    default_message = "The answer was not complete within the time allowed."


GENERATION_ERRORS: tuple[type[ServiceError], ...] = (
    InvalidJSONError,
    UnsupportedParameterError,
    InvalidGrammarError,
    ContextLengthExceededError,
    ChatTemplateError,
    PiiDetectedError,
    InvalidAPIKeyError,
    BodyTooLargeError,
    ValidationFailedError,
    PromptTooLongError,
    RateLimitExceededError,
    TokenBudgetExceededError,
    InternalError,
    OverloadedError,
    ModelLoadingError,
    DrainingError,
    EngineUnavailableError,
    DeadlineExceededError,
)
"""What a generating route may answer, for the OpenAPI document."""


class StartupError(Exception):
    """The service cannot start; the message is one line that says what to do about it."""


class ConfigurationError(StartupError):
    """config.yml, .env or the environment holds something that cannot work."""


class ModelLoadError(StartupError):
    """The model cannot be loaded: missing, gated, corrupt, unsupported or refused."""
