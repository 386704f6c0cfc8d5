"""Applications that uvicorn serves in a process of their own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fakes.daemon import ROOT


@contextmanager
def uvicorn(*arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Its URL, on a port that was free, and the process, whose log goes on in ``stderr``; killed if it is still there."""
    command = [sys.executable, "-m", "uvicorn", *arguments, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            log = ""
            while (running := re.search(r"running on (http://\S+)", log)) is None:
                line = server.stderr.readline()
                assert line, f"the server ended: {log}"
                log += line
            yield running[1], server
        finally:
            server.kill()


@contextmanager
def openai_servers() -> Iterator[str]:
    """The URL of those of tests.load.openai_server, but for their names."""
    with uvicorn("tests.load.openai_server:app") as (url, _):
        yield url
