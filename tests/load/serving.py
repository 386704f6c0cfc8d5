"""The servers of tests.load.openai_server, in a process of their own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.fakes.daemon import ROOT


@contextmanager
def openai_servers() -> Iterator[str]:
    """Their URL, but for their names."""
    command = [sys.executable, "-m", "uvicorn", "tests.load.openai_server:app", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            log = ""
            while (running := re.search(r"running on (http://\S+)", log)) is None:
                line = server.stderr.readline()
                assert line, f"the server ended: {log}"
                log += line
            yield running[1]
        finally:
            server.kill()
