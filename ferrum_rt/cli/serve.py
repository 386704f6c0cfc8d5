"""ferrum-rt serve: the runtime as a daemon."""

import argparse
from functools import partial

from ferrum_rt.cli.options import add_engine_options, engine_fields
from ferrum_rt.daemon.config import load_serve_config


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_engine_options(parser)
    parser.add_argument("--socket", metavar="PATH", help="where to listen; your runtime directory if left out")


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; 1 if the engine failed."""
    read_config = partial(
        load_serve_config,
        arguments.config,
        model=arguments.model,
        socket=arguments.socket,
        fields=engine_fields(arguments),
    )
    config = read_config()  # what is wrong with it is said before torch is loaded
    from ferrum_rt.daemon.service import run_daemon

    return run_daemon(config, read_config)
