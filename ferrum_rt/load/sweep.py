"""The highest rate at which enough of the requests are good."""

from collections.abc import Awaitable, Callable

from ferrum_rt.load.results import Summary, SweepPoint

PRECISION = 0.05


async def sweep(
    measure: Callable[[float], Awaitable[Summary]],
    *,
    begin: float,
    required_share: float,
    least: float = 0.0,
    max_points: int = 20,
) -> tuple[float | None, list[SweepPoint]]:
    """Double the rate from ``begin`` until ``measure`` finds it too high (or halve it until it is not), then halve the way
    between the last that was met and the first that was not, until that is ``PRECISION`` of itself. No rate below ``least``
    is tried."""
    points: list[SweepPoint] = []

    async def is_met(rate: float) -> bool:
        summary = await measure(rate)
        completed = summary.completed / summary.requests
        share = completed * summary.goodput.mean / summary.request_rate.mean if completed else 0.0
        share = round(share, 9)  # nine in ten are 0.9
        points.append(SweepPoint(rate=rate, is_met=share >= required_share, good_share=share, summary=summary))
        return points[-1].is_met

    met, unmet, rate = 0.0, float("inf"), begin
    while len(points) < max_points and unmet - met > PRECISION * met and (rate >= least or not points):
        if await is_met(rate):
            met = rate
        else:
            unmet = rate
        rate = rate * 2 if unmet == float("inf") else (met + unmet) / 2 if met else rate / 2
    return met or None, points
