"""ferrum-rt bench: the kinds of it, each in a module of its own that is loaded when it is called."""

import argparse
from pathlib import Path

from ferrum_rt.cli.bench.options import add_serve_bench_options, add_sweep_options
from ferrum_rt.cli.options import add_engine_options, add_json_option


def add_bench_commands(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND", required=True)

    sub = kinds.add_parser("kv", help="what types of keys and values cost and give", allow_abbrev=False)
    add_engine_options(sub)
    sub.add_argument("--text", metavar="FILE", type=Path, help="a text to measure on; a module of our own if left out")
    sub.add_argument("--tokens", metavar="N", type=int, default=512, help="its first N tokens (default: 512)")
    add_json_option(sub)
    sub.set_defaults(command=_bench_kv)

    sub = kinds.add_parser("serve", help="what many users at a time would meet", allow_abbrev=False)
    add_serve_bench_options(sub)
    sub.set_defaults(command=_bench_serve)

    sub = kinds.add_parser("sweep", help="the highest rate at which users are served well", allow_abbrev=False)
    add_sweep_options(sub)
    sub.set_defaults(command=_bench_sweep)


def _bench_kv(arguments: argparse.Namespace) -> int:
    from ferrum_rt.cli.bench.kv import bench_kv

    return bench_kv(arguments)


def _bench_serve(arguments: argparse.Namespace) -> int:
    from ferrum_rt.cli.bench.serve import bench_serve

    return bench_serve(arguments)


def _bench_sweep(arguments: argparse.Namespace) -> int:
    from ferrum_rt.cli.bench.serve import bench_sweep

    return bench_sweep(arguments)
