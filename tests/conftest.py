"""For all tests."""

import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.said import REPORTED_TO, Said

T = TypeVar("T")


class Watch:
    """A plugin of pytest's: no test passes that has made an engine tell what was said to it, or a daemon's."""

    def __init__(self) -> None:
        self.said = Said()
        self._directory = tempfile.TemporaryDirectory()
        self.reports = Path(self._directory.name) / "said"
        os.environ[REPORTED_TO] = str(self.reports)
        self.said.begin()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, T, T]:
        self.said.forget()
        result = yield
        assert self.said.quotations() == []
        assert self.reported() == []
        return result

    def reported(self) -> list[str]:
        """By daemons, since this was asked last."""
        if not self.reports.exists():
            return []
        lines = self.reports.read_text().splitlines()
        self.reports.unlink()
        return lines


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons of this test are not: it measures them, or has them name what prompts have too, such as unknown fields."""
    monkeypatch.delenv(REPORTED_TO)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(), "what was said")
