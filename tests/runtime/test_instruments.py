"""Metrics, as a host's collector reads them: in a process of its own, for a process has one provider of them."""

import json
import subprocess
import sys
from typing import Any

import pytest

from ferrum_rt.interfaces import telemetry as names
from tests.fakes.daemon import ROOT

HOST = """
import asyncio, json
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from ferrum_rt.interfaces.errors import FerrumError
from tests.runtime.engines import fake_engine

reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider([reader]))

def read():
    data = reader.get_metrics_data()
    return json.loads(data.to_json()) if data else {{}}

async def main():
{body}

asyncio.run(main())
"""
BODY = """
    async with fake_engine({"scheduler": {"max_running_requests": 2}}, fail_at={1}) as (engine, _):
        print(json.dumps(read()))
        await engine.infer_batch(["fails"], max_tokens=2)
        for number in range(3):
            await engine.infer(f"prompt {number}", max_tokens=5)
        async with engine.infer_stream("left", max_tokens=900) as chunks:
            await anext(chunks)
            print(json.dumps(read()))
        async with fake_engine() as (other, _):
            await other.infer("x", max_tokens=1)
            print(json.dumps(read()))
"""


def points_of(host: str) -> list[dict[str, list[dict[str, Any]]]]:
    """For each time that the host read its metrics: the points of each, by name."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", host], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [
        {
            metric["name"]: metric["data"]["data_points"]
            for resource in json.loads(line).get("resource_metrics", ())
            for scope in resource["scope_metrics"]
            for metric in scope["metrics"]
        }
        for line in done.stdout.splitlines()
    ]


def by(points: list[dict[str, Any]], attribute: str) -> dict[Any, float]:
    return {point["attributes"][attribute]: point["value"] for point in points}


@pytest.mark.slow
def test_a_collector_reads_what_engines_count() -> None:
    """Histograms of the requests that have ended, by how, with the conventions' buckets; and each engine's counts."""
    before, during, after = points_of(HOST.format(body=BODY))

    assert names.REQUEST_DURATION not in before
    assert by(before[names.REQUESTS], names.STATE) == {"running": 0, "waiting": 0, "parked": 0}

    durations = {point["attributes"].get(names.ERROR_TYPE): point for point in during[names.REQUEST_DURATION]}
    assert {error: point["count"] for error, point in durations.items()} == {None: 3, "backend_error": 1}
    assert durations[None]["attributes"] == {
        names.OPERATION_NAME: names.TEXT_COMPLETION,
        names.PROVIDER_NAME: names.PROVIDER,
        names.REQUEST_MODEL: "fake",
    }
    [first] = during[names.TIME_TO_FIRST_TOKEN]
    [each] = during[names.TIME_PER_OUTPUT_TOKEN]
    assert (first["count"], each["count"]) == (3, 3)
    assert first["sum"] < durations[None]["sum"]
    for point, bounds in (
        (durations[None], names.DURATION_BOUNDS),
        (first, names.FIRST_TOKEN_BOUNDS),
        (each, names.PER_TOKEN_BOUNDS),
    ):
        assert tuple(point["explicit_bounds"]) == bounds

    assert by(during[names.REQUESTS], names.STATE) == {"running": 1, "waiting": 0, "parked": 0}
    assert by(during[names.REQUESTS_ENDED], names.OUTCOME) == {"finished": 3, "failed": 1, "cancelled": 0, "rejected": 0}
    pages = by(during[names.PAGES], names.STATE)
    assert set(pages) == {"free", "active", "cached"}
    assert pages["active"] >= 1
    for name in (names.STEPS, names.STEP_TIME, names.HOST_TIME, names.PROMPT_TOKENS, names.GENERATED_TOKENS):
        assert during[name][0]["value"] > 0, name

    assert [point["attributes"][names.ENGINE] for point in after[names.STEPS]] == [1, 2]
    assert after[names.GENERATED_TOKENS][1]["value"] == 1


@pytest.mark.slow
def test_a_provider_that_raises_is_no_requests_trouble() -> None:
    """A histogram of the host's SDK that cannot be recorded to is logged, by the error's class alone."""
    body = """
    from ferrum_rt.runtime import instruments
    class Raising:
        def record(self, value, attributes):
            raise ZeroDivisionError("secret")
    instruments._DURATION = Raising()
    async with fake_engine() as (engine, _):
        print(json.dumps({}))
        assert (await engine.infer("x", max_tokens=3)).usage.completion_tokens == 3
"""
    done = subprocess.run(
        [sys.executable, "-c", HOST.format(body=body)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "metrics could not be recorded: ZeroDivisionError" in done.stderr
    assert "secret" not in done.stderr
