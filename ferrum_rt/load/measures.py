"""Records to numbers."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

from ferrum_rt.load.results import Estimate, Limits, Percentiles, Repeat, RequestRecord, Summary
from ferrum_rt.runtime.simulation.reports import quantile

# Student's t for 95 %, two-sided, by degrees of freedom; and where the normal distribution has that share.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.959964


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Each is one of the values: the least that so many per cent do not exceed. None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p95, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Percentiles(mean=fmean(ordered), p50=p50, p90=p90, p95=p95, p99=p99, max=ordered[-1])


def estimate(values: Sequence[float]) -> Estimate:
    """From one value for each repeat."""
    count = len(values)
    if count < 2:
        return Estimate(mean=values[0], margin=None)
    return Estimate(mean=fmean(values), margin=_t(count - 1) * stdev(values) / math.sqrt(count))


def _t(freedom: int) -> float:
    """Beyond the table by the first terms of its expansion about the normal distribution's (Fisher and Cornish, 1960)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def is_good(record: RequestRecord, limits: Limits) -> bool:
    """It came to its end, and kept the limits that there are."""
    if record.error is not None or record.ttft_s is None:
        return False
    if limits.ttft_s is not None and record.ttft_s > limits.ttft_s:
        return False
    return limits.itl_s is None or record.tpot_s is None or record.tpot_s <= limits.itl_s


def summarize(repeats: Sequence[Repeat], limits: Limits, spans_dropped: int = 0) -> Summary:
    """Times are of completed requests alone; a request that failed counts among the errors."""
    records = [record for repeat in repeats for record in repeat.requests]
    completed = [record for record in records if record.error is None]

    def rate(count: Callable[[RequestRecord], float]) -> Estimate:
        return estimate([sum(map(count, repeat.requests)) / repeat.duration_s for repeat in repeats])

    return Summary(
        requests=len(records),
        completed=len(completed),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        request_rate=rate(lambda record: record.error is None),
        output_token_rate=rate(lambda record: record.output_tokens),
        total_token_rate=rate(lambda record: record.output_tokens + (record.prompt_tokens if record.chunks else 0)),
        goodput=rate(lambda record: is_good(record, limits)),
        ttft_s=percentiles(record.ttft_s for record in completed if record.ttft_s is not None),
        itl_s=percentiles(gap for record in completed for gap in record.itl_s),
        tpot_s=percentiles(record.tpot_s for record in completed if record.tpot_s is not None),
        e2e_s=percentiles(record.e2e_s for record in completed),
        send_delay_s=percentiles(record.sent_s - record.due_s for record in records),
        spans_dropped=spans_dropped,
    )
