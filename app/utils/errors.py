"""Every error that the service can answer with, and the errors that stop its start.

Each class carries its HTTP status, code and headers. Messages are for the caller: they never repeat
the caller's input, and those of a 5xx tell nothing about the inside of the service.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base of all errors that become an HTTP response in the common error shape.

    Attributes:
        code: Machine-readable reason; it does not change between releases.
        type: OpenAI's class of the error.
        param: The request field that caused the error, if one did.
        headers: Extra response headers, such as ``Retry-After``.
        details: Extra members of the error object, such as ``prompt_tokens``.
    """

    status: int = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    default_message: ClassVar[str] = "The service failed to answer this request."
    param: str | None = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        details: dict[str, int] | None = None,
    ) -> None:
        self.message = message or self.default_message
        self.param = param or self.param
        self.headers = dict(headers or {})
        self.details = dict(details or {})
        super().__init__(self.message)


class InternalError(ServiceError):
    """An unexpected error; the log has its traceback, with the request id that the caller gets."""


class InvalidRequestError(ServiceError):
    """Base of the errors that the caller can fix by changing the request."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"
    default_message = "The request is not valid."


class MalformedHTTPError(InvalidRequestError):
    """The bytes are not an HTTP/1.1 request, or can be read as different requests."""

    code = "malformed_http"
    default_message = "This is not a well-formed HTTP/1.1 request."


class RequestTimeoutError(InvalidRequestError):
    """The head or the body of a request did not arrive in time."""

    status = 408
    code = "request_timeout"
    default_message = "The request did not arrive in time."


class HeadersTooLargeError(InvalidRequestError):
    """The request line and the headers exceed the size limit."""

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
    """A field that the running engine does not support; rejected rather than ignored."""

    code = "unsupported_parameter"


class InvalidGrammarError(InvalidRequestError):
    """A schema or regular expression for the answer that cannot be enforced completely."""

    code = "invalid_grammar"


class ContextLengthExceededError(InvalidRequestError):
    """Prompt tokens plus ``max_tokens`` exceed the model's context."""

    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}: together they "
            f"exceed the model's context of {context_length} tokens.",
            param="max_tokens" if prompt_tokens < context_length else None,
            details={"prompt_tokens": prompt_tokens, "context_length": context_length},
        )


class ChatTemplateError(InvalidRequestError):
    """The model's chat template rejects the messages, such as two user messages in a row."""

    code = "chat_template_error"


class PiiDetectedError(InvalidRequestError):
    """Personal data in a prompt while ``pii.input`` is reject; the message names only its kinds."""

    code = "pii_detected"


class NotFoundError(InvalidRequestError):
    """There is no such route, or no such object of this caller."""

    status = 404
    code = "not_found"
    default_message = "There is nothing at this address."


class MethodNotAllowedError(InvalidRequestError):
    """The route does not support the method."""

    status = 405
    code = "method_not_allowed"
    default_message = "This address does not answer that method."


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served here."""

    code = "model_not_found"
    default_message = "That model is not served here; GET /v1/models tells which is."
    param = "model"


class SessionNotFoundError(NotFoundError):
    """The caller has no conversation with this id."""

    code = "session_not_found"
    default_message = "There is no such session."


class ResponseNotFoundError(NotFoundError):
    """No response is kept by this id for the caller."""

    code = "response_not_found"
    default_message = "There is no such response of this key: it was not kept, or it has expired."


class SessionBusyError(InvalidRequestError):
    """Another turn of the conversation is in progress."""

    status = 409
    code = "session_busy"
    default_message = "Another request of this session is being answered."
    param = "session_id"


class IdempotencyKeyInUseError(InvalidRequestError):
    """The first request with this idempotency key is in progress."""

    status = 409
    code = "idempotency_key_in_use"
    default_message = "The first request with this Idempotency-Key is still being answered."
    param = "Idempotency-Key"


class IdempotencyKeyReusedError(InvalidRequestError):
    """The idempotency key belongs to a request with another route, body or session."""

    status = 422
    code = "idempotency_key_reused"
    default_message = "This Idempotency-Key belongs to another request; a new one needs a new key."
    param = "Idempotency-Key"


class BodyTooLargeError(InvalidRequestError):
    """The body exceeds ``security.max_body_bytes``."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        # The rest of the body is not read, so the connection cannot be used again.
        super().__init__(
            f"The request body is larger than {limit} bytes.", headers={"Connection": "close"}
        )


class InvalidAPIKeyError(ServiceError):
    """The key is missing or unknown; the response does not say which."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"
    default_message = (
        "A valid API key is needed, in the X-API-Key header or as Authorization: Bearer."
    )

    def __init__(self) -> None:
        super().__init__(headers={"WWW-Authenticate": 'Bearer realm="llm-service"'})


class InsufficientScopeError(ServiceError):
    """The key is valid, but lacks the scope."""

    status = 403
    code = "insufficient_scope"
    type = "permission_error"

    def __init__(self, scope: str) -> None:
        # RFC 6750, section 3: the challenge names the scope.
        challenge = f'Bearer realm="llm-service", error="insufficient_scope", scope="{scope}"'
        super().__init__(
            f"This API key does not have the scope {scope}.",
            headers={"WWW-Authenticate": challenge},
        )


class RetryableError(ServiceError):
    """Base of the errors after which a retry can succeed; sends ``Retry-After``."""

    status = 503

    def __init__(self, message: str | None = None, *, retry_after: float = 1.0) -> None:
        # RFC 9110 allows whole seconds only; rounding down would make callers retry too early.
        self.retry_after = max(1, int(-(-retry_after // 1)))
        super().__init__(message, headers={"Retry-After": str(self.retry_after)})


class RateLimitExceededError(RetryableError):
    """The caller's token bucket is empty."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    default_message = "Too many requests; see Retry-After."


class TokenBudgetExceededError(RetryableError):
    """The key has used its ``daily_tokens``."""

    status = 429
    code = "token_budget_exceeded"
    type = "rate_limit_error"
    default_message = "This API key has used its tokens of the day; see Retry-After."


class OverloadedError(RetryableError):
    """The queue has no place for this caller, or the request waited too long in it."""

    code = "overloaded"
    default_message = "The service is at capacity; see Retry-After."


class TooManyConnectionsError(RetryableError):
    """The service has its most connections, or the client's address has."""

    code = "too_many_connections"
    default_message = "There are too many connections; see Retry-After."


class ModelLoadingError(RetryableError):
    """The model is still being loaded."""

    code = "model_loading"
    default_message = "The model is still loading; see Retry-After."


class DrainingError(RetryableError):
    """The service is shutting down and accepts no new requests."""

    code = "draining"
    default_message = "The service is shutting down."


class EngineUnavailableError(RetryableError):
    """The engine process is being restarted, and has not had this request."""

    code = "engine_unavailable"
    default_message = "The engine is being restarted; see Retry-After."


class EngineFailedError(ServiceError):
    """The engine process died with this request.

    Balancers repeat a 503 on another copy, whose engine it might kill too.

    Args:
        twice: Two processes did. The official clients, which repeat a 500, obey the header.
    """

    code = "engine_failed"
    default_message = "The engine stopped unexpectedly during this request."

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__(headers={"X-Should-Retry": "false"} if twice else None)


class StateUnavailableError(RetryableError):
    """Sessions or idempotency keys that copies of the service share cannot be reached."""

    code = "state_unavailable"
    default_message = "Sessions and idempotency keys cannot be reached; see Retry-After."


class DeadlineExceededError(ServiceError):
    """The request exceeded ``engine.request_timeout_seconds`` or the caller's own limit."""

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
    EngineFailedError,
    DeadlineExceededError,
)
"""The errors of a generating route, for the OpenAPI document."""


class StartupError(Exception):
    """The service cannot start; the message is one line that says what to do."""


class ConfigurationError(StartupError):
    """config.yml, .env or the environment has an invalid setting."""


class ModelLoadError(StartupError):
    """The model cannot be loaded: missing, gated, corrupt, unsupported or refused."""
