"""ferrum-rt: the runtime from a terminal. One module per command; this one reads the command line and reports errors."""

import argparse
from typing import NoReturn

import ferrum_rt
from ferrum_rt.cli.bench import add_bench_commands
from ferrum_rt.cli.chat import chat
from ferrum_rt.cli.doctor import doctor
from ferrum_rt.cli.options import (
    UsageError,
    add_connect_option,
    add_engine_options,
    add_json_option,
    add_model_option,
    add_sampling_options,
)
from ferrum_rt.cli.output import discard_stdout, report_error
from ferrum_rt.cli.run import run
from ferrum_rt.cli.serve import add_serve_options, serve
from ferrum_rt.cli.simulate_options import add_simulate_options
from ferrum_rt.cli.status import status
from ferrum_rt.cli.top import add_top_options, top
from ferrum_rt.interfaces.errors import FerrumError

ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0 when done, 1 when doctor or status finds a fault, a bench finds nobody
    served or a daemon's engine has failed, 2 after an error, and what a shell reports for a program that Ctrl-C (130) or a
    closed pipe (141) ended. --help and --version raise SystemExit."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            exit_status: int = arguments.command(arguments)
            return exit_status
        finally:
            print(end="", flush=True)  # what cannot be written is better met here than at the interpreter's exit
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return BROKEN_PIPE
    except OSError as error:
        discard_stdout()
        report_error(error)
        return ERROR
    except (UsageError, FerrumError, UnicodeError) as error:
        report_error(error)
        return ERROR


def _parser() -> Parser:
    parser = Parser(prog="ferrum-rt", description="Run language models on this machine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ferrum-rt {ferrum_rt.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    connect = "use the model of the daemon at SOCKET, or of your own daemon; the PROMPT goes before it"

    sub = commands.add_parser("run", help="continue a text", allow_abbrev=False)
    sub.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add_engine_options(sub)
    add_connect_option(sub, connect)
    add_sampling_options(sub)
    add_json_option(sub)
    sub.set_defaults(command=run)

    sub = commands.add_parser("chat", help="talk with a model", allow_abbrev=False)
    add_engine_options(sub)
    add_connect_option(sub, connect)
    add_sampling_options(sub)
    sub.set_defaults(command=chat)

    sub = commands.add_parser("serve", help="let other processes use a model", allow_abbrev=False)
    add_serve_options(sub)
    sub.set_defaults(command=serve)

    sub = commands.add_parser("status", help="ask a daemon how it is doing", allow_abbrev=False)
    sub.add_argument("--socket", metavar="PATH", help="the daemon's socket; your own daemon's if left out")
    form = sub.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--arrivals", metavar="FILE", help="write its latest requests as a trace for simulate; - prints it")
    sub.set_defaults(command=status)

    sub = commands.add_parser("top", help="watch a daemon", allow_abbrev=False)
    add_top_options(sub)
    sub.set_defaults(command=top)

    sub = commands.add_parser("simulate", help="see what an engine would make of a workload", allow_abbrev=False)
    add_simulate_options(sub)
    sub.set_defaults(command=_simulate)

    sub = commands.add_parser(
        "bench", help="measure: a load, the highest rate, types of keys and values", allow_abbrev=False
    )
    add_bench_commands(sub)

    sub = commands.add_parser("doctor", help="show what is installed, and try it", allow_abbrev=False)
    add_model_option(sub)
    form = sub.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--build", action="store_true", help="do nothing but compile the CPU kernels, and say where they are")
    sub.add_argument(
        "--target", metavar="NAME", action="append", help="with --build: into the package, for this instruction set"
    )
    sub.set_defaults(command=doctor)
    return parser


def _simulate(arguments: argparse.Namespace) -> int:
    from ferrum_rt.cli.simulate import simulate

    return simulate(arguments)
