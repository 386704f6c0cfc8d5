"""ferrum-rt serve: the runtime as a daemon."""

import argparse
from functools import partial

from ferrum_rt.cli.options import add_engine_options, engine_fields, given_options
from ferrum_rt.daemon.config import load_serve_config

# Options that go by the same name in the configuration's table daemon.
_DAEMON = ("socket", "otlp", "spans", "prometheus")


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser)
    parser.add_argument("--socket", metavar="PATH", help="where to listen; your runtime directory if left out")
    parser.add_argument("--otlp", metavar="ENDPOINT", help="send spans and metrics there, as http://localhost:4318")
    parser.add_argument("--spans", metavar="FILE", help="append spans to FILE, a line each; - writes them to standard error")
    parser.add_argument(
        "--prometheus", metavar="ADDRESS", help="let metrics be read there: 127.0.0.1:9464, or the path of a socket"
    )


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 1 if the engine failed."""
    read_config = partial(
        load_serve_config,
        arguments.config,
        model=arguments.model,
        daemon=given_options(arguments, _DAEMON),
        fields=engine_fields(arguments),
    )
    config = read_config()  # what is wrong with it is said before torch is loaded
    from ferrum_rt.daemon.service import run_daemon

    return run_daemon(config, read_config)
