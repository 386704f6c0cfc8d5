"""The errors a caller can meet: one tree, each with a stable ``code`` that is the same in-process and over the socket."""

import os
from typing import ClassVar


class FerrumError(Exception):
    """Base of every error this package raises on purpose. The message says what is wrong and what to do about it. It may
    name fields, functions and ids; it quotes nothing of prompts and outputs, and neither do its causes."""

    code: ClassVar[str] = "ferrum_error"


class ConfigError(FerrumError):
    """The engine's configuration cannot work; raised before anything is started."""

    code = "config_error"


class ModelError(FerrumError):
    """The model's files are missing, damaged or of a kind we do not run."""

    code = "model_error"


class TokenizerError(FerrumError):
    """The tokenizer's files are missing or damaged, or text cannot be turned into tokens."""

    code = "tokenizer_error"


class BackendError(FerrumError):
    """A kernel or the executor failed while it ran a step."""

    code = "backend_error"


class DeviceError(FerrumError):
    """The device that was asked for is not there or cannot be used."""

    code = "device_error"


class RequestValidationError(FerrumError):
    """A field of a request is wrong; the message names it."""

    code = "request_validation_error"


class ResourceExhausted(FerrumError):
    """The engine is full. ``retry_after`` is an estimate in seconds of when to try again."""

    code = "resource_exhausted"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(FerrumError):
    """The request's deadline passed before it had produced a token."""

    code = "deadline_exceeded"


class Cancelled(FerrumError):
    """The engine cancelled the request, because it is shutting down."""

    code = "cancelled"


class NotFound(FerrumError):
    """No request, session or model of that name exists."""

    code = "not_found"


class PermissionDenied(FerrumError):
    """The caller may not do this."""

    code = "permission_denied"


class Unsupported(FerrumError):
    """The request is sound, but this engine cannot do it."""

    code = "unsupported"


class InvalidFormat(FerrumError):
    """Bytes or a file could not be understood."""

    code = "invalid_format"


class ConnectionLost(FerrumError):
    """The daemon went away while a request was under way."""

    code = "connection_lost"


class EngineFailed(FerrumError):
    """The engine met a fault that it cannot recover from; open a new one."""

    code = "engine_failed"


def first_of(error: BaseException) -> BaseException:
    """The error itself, out of the groups that task groups wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def as_ferrum_error(kind: type[FerrumError], what: str, error: Exception) -> FerrumError:
    """The error itself, if it is meant for the caller; else one of ``kind`` that says what could not be done."""
    if isinstance(error, FerrumError):
        return error
    failure = kind(f"{what}: {error!r}")
    failure.__cause__ = error
    return failure


def without_words(kind: type[FerrumError], what: str, error: BaseException) -> FerrumError:
    """As ``as_ferrum_error``, of what was raised over a text: the message may quote it, so only the class and the place are
    told, and the error is not the cause of the new one."""
    if isinstance(error, FerrumError):
        return error
    while error.__cause__ is not None:
        error = error.__cause__
    return kind(f"{what}: {type(error).__name__}{_place(error)}")


def _place(error: BaseException) -> str:
    """Where it was raised."""
    traceback = error.__traceback__
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    return f" at {os.path.basename(code.co_filename)}:{traceback.tb_lineno} in {code.co_qualname}"


def error_classes() -> dict[str, type[FerrumError]]:
    """Every error class by its code, so that the client can raise what the engine raised."""
    classes: list[type[FerrumError]] = [FerrumError, *FerrumError.__subclasses__()]
    return {cls.code: cls for cls in classes}
