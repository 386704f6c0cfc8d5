"""For all tests."""

import pytest

from tests.said import Watch


def pytest_configure(config: pytest.Config) -> None:
    watch = Watch()
    watch.begin()
    config.pluginmanager.register(watch, "what was said")
