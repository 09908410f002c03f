"""What makes a standard test standard: a subclass can add tests, but not remove or weaken one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar
from unittest import SkipTest

#: Every standard test as it was defined, by (suite, name).
_STANDARD: dict[tuple[str, str], Callable[..., Any]] = {}
_KNOWN = "__kpt_known_failure__"


class Suite:
    """A set of standard tests, collected by pytest from subclasses whose names begin with ``Test``.

    ``known_failures`` maps the name of a standard test to the reason why it fails today. Such a test
    is skipped with that reason while it fails, and fails as soon as it passes.
    """

    known_failures: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, *, standard: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if standard:
            for name, function in vars(cls).items():
                if name.startswith("test_"):
                    _STANDARD[cls.__qualname__, name] = function
            return
        names = {name for name, _ in standard_tests(cls)}
        for name, reason in cls.known_failures.items():
            if name not in names:
                raise TypeError(
                    f"{cls.__name__}.known_failures names {name!r}; the tests are {', '.join(sorted(names))}"
                )
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.known_failures[{name!r}] needs a reason")
        for name, function in standard_tests(cls):
            if not _unchanged(getattr(cls, name, None), function):
                raise TypeError(
                    f"{cls.__name__} removes or replaces the standard test {name}; mend the plugin, or list "
                    "the test in known_failures with a reason"
                )
            if name in cls.known_failures:
                setattr(cls, name, _expected_to_fail(function, cls.known_failures[name]))

    def test_no_standard_test_is_missing(self) -> None:
        """Every standard test is still the one that kpt ships."""
        changed = [
            name
            for name, function in standard_tests(type(self))
            if not _unchanged(getattr(self, name, None), function)
        ]
        assert not changed, f"standard tests were removed or replaced: {', '.join(changed)}"


_STANDARD["Suite", "test_no_standard_test_is_missing"] = Suite.test_no_standard_test_is_missing


def standard_tests(suite: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The standard tests that ``suite`` inherits, as kpt ships them."""
    bases = {base.__qualname__ for base in suite.__mro__}
    for (base, name), function in _STANDARD.items():
        if base in bases:
            yield name, function


def skip(reason: str) -> SkipTest:
    """What a standard test raises where it has nothing to test; pytest reports it as skipped."""
    return SkipTest(reason)


def _unchanged(found: Any, function: Callable[..., Any]) -> bool:
    found = getattr(found, "__func__", found)
    return found is function or (getattr(found, _KNOWN, False) and found.__wrapped__ is function)


def _expected_to_fail(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(self: Suite) -> None:
        try:
            function(self)
        except SkipTest:
            raise
        except Exception as error:
            raise SkipTest(f"known to fail: {reason}") from error
        raise AssertionError(f"{function.__name__} passes now; take it out of known_failures")

    setattr(run, _KNOWN, True)
    return run
