"""Errors speak to a person at a line, and survive the ways that exceptions travel."""

from __future__ import annotations

import copy
import inspect

import pytest

from saae_runtime import errors
from saae_runtime.errors import DataError, SaaeError

KINDS = [kind for name in errors.__all__ if inspect.isclass(kind := getattr(errors, name))]


def test_three_parts() -> None:
    error = SaaeError("The frame is gray.", "The camera says so.", "frame.repeat(3)")
    assert str(error) == "The frame is gray.\n  why: The camera says so.\n  try: frame.repeat(3)"
    assert (error.what, error.why, error.cure) == ("The frame is gray.", "The camera says so.", "frame.repeat(3)")
    assert str(SaaeError("Only this.")) == "Only this."
    assert str(SaaeError("This.", cure="that")) == "This.\n  try: that"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_documented_and_travels(kind: type[SaaeError]) -> None:
    assert issubclass(kind, SaaeError)
    assert inspect.getdoc(kind)
    error = kind("what", "why", "cure")
    # From a worker process, or copied by a test runner: the same text and parts.
    for other in (copy.deepcopy(error), copy.copy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_every_public_exception_is_listed() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, SaaeError)}
    assert set(errors.__all__) - {"shell_line", "shown"} == defined
    assert list(errors.__all__) == sorted(errors.__all__)


def test_families() -> None:
    assert issubclass(errors.ImageError, errors.DataError)
    for kind in (
        errors.BundleNotFoundError,
        errors.BundleCorruptError,
        errors.BundleVersionError,
        errors.BundlePathError,
    ):
        assert issubclass(kind, errors.BundleError)
    for kind in (errors.BackendUnavailableError, errors.EngineIncompatibleError, errors.DeviceError):
        assert issubclass(kind, errors.BackendError)


def test_exit_codes_differ_from_those_of_a_verdict() -> None:
    # saae-run ends with 0 or 1 for clean or defective: no failure may look like either.
    assert all(kind.exit_code > 1 for kind in KINDS)
    assert errors.ParityError.exit_code != SaaeError.exit_code


def test_data_error_keeps_all_findings() -> None:
    error = DataError("Two bad files.", problems=["a.png: empty", "b.png: no image"])
    assert error.problems == ("a.png: empty", "b.png: no image")
    assert copy.deepcopy(error).problems == error.problems
