"""The options of ``ferrum-rt simulate``, apart from what it does: that needs parts of the engine, as a client does not."""

import argparse
import math
from pathlib import Path

from ferrum_rt.cli.options import add_json_option

# Options of the workload, which a trace has of its own; left out they are these.
DRAWN: dict[str, object] = {
    "requests": 1000,
    "arrivals": "poisson",
    "rate": 1.0,
    "burstiness": 3.0,
    "period": 600.0,
    "amplitude": 0.8,
    "prompt_tokens": "lognormal:512,512",
    "output_tokens": "lognormal:128,128",
    "client": None,
    "deadline": None,
    "seed": 0,
}


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    _add_workload_options(parser.add_argument_group("the workload"))
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--config", metavar="FILE.toml", type=Path, help="a configuration, which the options overrule")
    engine.add_argument("--slots", metavar="N", type=int, help="scheduler.max_running_requests")
    engine.add_argument("--queue", metavar="N", type=int, help="scheduler.max_waiting_requests; past it one is refused")
    engine.add_argument("--pages", metavar="N", type=int, help="kv_cache.num_pages; left out: enough for all slots")
    engine.add_argument("--block-size", metavar="N", type=int, help="kv_cache.block_size, tokens of a page")
    engine.add_argument("--max-batched-tokens", metavar="N", type=int, help="batching.max_batched_tokens, of a step")
    engine.add_argument("--max-model-len", metavar="N", type=int, help="longer requests are refused; left out: none is")
    costs = parser.add_argument_group("what a step takes")
    for name, value, unit, what in (
        ("--step-ms", 8.0, "MS", "every step"),
        ("--token-us", 20.0, "US", "and for each token that is computed"),
        ("--sequence-us", 30.0, "US", "and for each sequence"),
        ("--context-ns", 70.0, "NS", "and for each token of context that is attended to"),
    ):
        costs.add_argument(name, metavar=unit, type=float, default=value, help=f"{what} (default: {value:g})")
    report = parser.add_argument_group("the report")
    report.add_argument("--ttft-slo", metavar="S", type=float, default=math.inf, help="a first token should come within S")
    report.add_argument("--itl-slo", metavar="S", type=float, default=math.inf, help="the others S apart, on average")
    report.add_argument("--plot", metavar="FILE", type=Path, help="draw a picture: .png, .svg, .pdf or .html")
    add_json_option(report)


def _add_workload_options(group: "argparse._ArgumentGroup") -> None:
    shown = {name: f"(default: {value})" for name, value in DRAWN.items()}
    group.add_argument("--requests", metavar="N", type=int, help=f"how many {shown['requests']}")
    group.add_argument(
        "--arrivals", choices=["constant", "poisson", "bursty", "seasonal"], help=f"how they come {shown['arrivals']}"
    )
    group.add_argument("--rate", metavar="R", type=float, help=f"requests a second {shown['rate']}")
    group.add_argument(
        "--burstiness", metavar="CV", type=float, help=f"of bursty: 1 is Poisson, more are bursts {shown['burstiness']}"
    )
    group.add_argument("--period", metavar="S", type=float, help=f"of seasonal, in seconds {shown['period']}")
    group.add_argument("--amplitude", metavar="A", type=float, help=f"of seasonal, from 0 to 1 {shown['amplitude']}")
    sizes = "N, uniform:LEAST,MOST, normal:MEAN,SD or lognormal:MEAN,SD"
    group.add_argument("--prompt-tokens", metavar="D", help=f"{sizes} {shown['prompt_tokens']}")
    group.add_argument("--output-tokens", metavar="D", help=f"likewise {shown['output_tokens']}")
    group.add_argument(
        "--shared-prefix", metavar="N", type=int, default=0, help="a client's prompts start with the same N tokens"
    )
    group.add_argument(
        "--client", metavar="NAME=SHARE[:PRIORITY]", action="append", help="may be given again; one client if left out"
    )
    group.add_argument("--deadline", metavar="S", type=float, help="of each request, in seconds from its arrival")
    group.add_argument("--seed", metavar="S", type=int, help=f"the same seed gives the same requests {shown['seed']}")
    group.add_argument(
        "--trace",
        metavar="FILE.jsonl",
        type=Path,
        help="these requests: a line each with arrival_s, prompt_tokens, output_tokens, client, priority, deadline_s",
    )
