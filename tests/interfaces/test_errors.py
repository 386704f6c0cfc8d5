"""The errors: one tree, stable codes, one set of classes for every way to reach an engine."""

import inspect
import pickle

import pytest

import ferrum_rt
from ferrum_rt.interfaces import errors
from ferrum_rt.interfaces.errors import FerrumError, ResourceExhausted, error_classes

# The codes are on the wire and in other people's logs: a change here breaks them.
CODES = {
    "FerrumError": "ferrum_error",
    "ConfigError": "config_error",
    "ModelError": "model_error",
    "TokenizerError": "tokenizer_error",
    "BackendError": "backend_error",
    "DeviceError": "device_error",
    "RequestValidationError": "request_validation_error",
    "ResourceExhausted": "resource_exhausted",
    "DeadlineExceeded": "deadline_exceeded",
    "Cancelled": "cancelled",
    "NotFound": "not_found",
    "PermissionDenied": "permission_denied",
    "Unsupported": "unsupported",
    "InvalidFormat": "invalid_format",
    "ConnectionLost": "connection_lost",
    "EngineFailed": "engine_failed",
}


def test_every_error_class_is_known() -> None:
    """The module defines the classes that the design lists, each with its code, and no others."""
    classes = [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, FerrumError)]
    assert {cls.__name__: cls.code for cls in classes} == CODES


def test_codes_are_unique() -> None:
    """No two classes share a code, and error_classes finds each class by its own."""
    assert len(set(CODES.values())) == len(CODES)
    assert {code: cls.__name__ for code, cls in error_classes().items()} == {code: name for name, code in CODES.items()}


@pytest.mark.parametrize("name", CODES)
def test_errors_are_public(name: str) -> None:
    """Each class is a FerrumError with a docstring, and ferrum_rt exports that very class."""
    cls = getattr(errors, name)
    assert issubclass(cls, FerrumError)
    assert cls.__doc__
    assert name in ferrum_rt.__all__
    assert getattr(ferrum_rt, name) is cls


@pytest.mark.parametrize("cls", error_classes().values())
def test_errors_can_be_made_from_a_message(cls: type[FerrumError]) -> None:
    """A message is all it takes to make one, as the client does; the text is the message, and a copy is equal to it."""
    error = cls("the message")
    assert str(error) == "the message"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, vars(copy)) == (cls, error.args, vars(error))


def test_resource_exhausted_says_when_to_try_again() -> None:
    """ResourceExhausted carries the seconds to wait."""
    assert ResourceExhausted("full").retry_after == 1.0
    assert ResourceExhausted("full", retry_after=2.5).retry_after == 2.5


def test_unknown_names_are_not_exported() -> None:
    """A name that the package does not have is an AttributeError that says so."""
    name = "OutOfCheese"
    with pytest.raises(AttributeError, match=f"ferrum_rt.*'{name}'"):
        getattr(ferrum_rt, name)
