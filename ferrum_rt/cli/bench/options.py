"""The options of ``ferrum-rt bench serve`` and ``sweep``, apart from what they do."""

import argparse
from pathlib import Path
from typing import Any

from ferrum_rt.cli.options import add_connect_option, add_engine_options, add_json_option

# Options of the workload, which a trace has of its own; left out they are these. The means of the sizes are those of
# conversations in ShareGPT; that the standard deviations are as large is our choice, for a long tail.
DRAWN: dict[str, Any] = {
    "requests": 200,
    "duration": None,
    "rate": None,
    "burstiness": 1.0,
    "concurrency": 8,
    "prompt_tokens": "lognormal:202,202",
    "output_tokens": "lognormal:179,179",
    "shared_prefix": None,
}
WARMUP = 10
OPENAI_VOCAB_SIZE = 10_000
SWEEP_BEGIN, SWEEP_SHARE, SWEEP_DURATION = 1.0, 0.9, 30.0


def add_serve_bench_options(parser: argparse.ArgumentParser) -> None:
    _add_target_options(parser)
    workload = parser.add_argument_group("the workload")
    shown = {name: f"(default: {value})" for name, value in DRAWN.items()}
    workload.add_argument("--requests", metavar="N", type=int, help=f"how many {shown['requests']}")
    workload.add_argument("--duration", metavar="S", type=float, help="instead: as many as come in S seconds at --rate")
    workload.add_argument("--rate", metavar="R", type=float, help="open loop: R a second, whatever became of those before")
    workload.add_argument(
        "--burstiness",
        metavar="CV",
        type=float,
        help="of --rate: 0 is a metronome, 1 is Poisson, more are bursts (default: 1)",
    )
    workload.add_argument(
        "--concurrency", metavar="C", type=int, help=f"closed loop: so many under way at a time {shown['concurrency']}"
    )
    _add_size_options(workload)
    workload.add_argument(
        "--trace",
        metavar="FILE.jsonl",
        type=Path,
        help="these requests: a line each with arrival_s, prompt_tokens, output_tokens, client, priority, deadline_s",
    )
    workload.add_argument("--repeats", metavar="N", type=int, default=1, help="run it N times, with another seed each time")
    report = _add_report_options(parser)
    report.add_argument(
        "--spans", metavar="FILE", type=Path, help="the file that the daemon of --connect writes its spans to, to be read"
    )


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    _add_target_options(parser)
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--from",
        dest="begin",
        metavar="RATE",
        type=float,
        default=SWEEP_BEGIN,
        help=f"the first rate that is tried, in requests a second (default: {SWEEP_BEGIN:g})",
    )
    search.add_argument(
        "--share",
        metavar="S",
        type=float,
        default=SWEEP_SHARE,
        help=f"of the requests that must come to their end within the limits (default: {SWEEP_SHARE:g})",
    )
    search.add_argument(
        "--duration",
        metavar="S",
        type=float,
        default=SWEEP_DURATION,
        help=f"of each rate's run, in seconds (default: {SWEEP_DURATION:g})",
    )
    workload = parser.add_argument_group("the workload")
    workload.add_argument(
        "--burstiness", metavar="CV", type=float, help="0 is a metronome, 1 is Poisson, more are bursts (default: 1)"
    )
    _add_size_options(workload)
    _add_report_options(parser)


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser)
    add_connect_option(parser, "put it on the daemon at SOCKET, or on your own daemon, instead of an engine in this process")
    parser.add_argument(
        "--target", metavar=("openai", "URL"), nargs=2, help="put it on a server that speaks OpenAI's protocol, as vLLM does"
    )
    parser.add_argument("--openai-model", metavar="NAME", help="which of that server's models, if it has several")
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help=f"token ids of that server's prompts are less than N (default: {OPENAI_VOCAB_SIZE})",
    )


def _add_size_options(group: "argparse._ArgumentGroup") -> None:
    sizes = "N, uniform:LEAST,MOST, normal:MEAN,SD or lognormal:MEAN,SD"
    group.add_argument("--prompt-tokens", metavar="D", help=f"{sizes} (default: {DRAWN['prompt_tokens']})")
    group.add_argument("--output-tokens", metavar="D", help=f"likewise (default: {DRAWN['output_tokens']})")
    group.add_argument(
        "--shared-prefix", metavar="CxN", help="prompts begin with one of C texts of N tokens, as 10x256, and go on as above"
    )
    group.add_argument("--seed", metavar="S", type=int, default=0, help="the same seed gives the same requests (default: 0)")
    group.add_argument(
        "--warmup",
        metavar="N",
        type=int,
        default=WARMUP,
        help=f"so many are sent before, and not counted (default: {WARMUP})",
    )


def _add_report_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    report = parser.add_argument_group("the report")
    report.add_argument("--ttft-slo", metavar="S", type=float, help="a good request has its first token within S seconds")
    report.add_argument("--itl-slo", metavar="S", type=float, help="and the others S seconds apart, on average")
    report.add_argument("--save", metavar="FILE.json", type=Path, help="keep all that was found, to make reports from")
    report.add_argument("--report", metavar="FILE.html", type=Path, help="write it as a page to be looked at")
    report.add_argument("--plots", metavar="DIR", type=Path, help="draw its pictures, as PNGs")
    add_json_option(report)
    return report
