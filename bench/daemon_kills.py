"""Does every client of a daemon that dies hear of it, and can another take its place at once?

A daemon over the fake executor serves a path. Several clients have requests under way: whole answers, streams, streams that
are read slowly or left early, prompts that take several steps, two outputs of one prompt. At a random moment the daemon gets
SIGKILL, or SIGTERM, with time to drain or, every other time, with less than the requests need. Then the next one is started
on the same path. Of each round is demanded that

- before the signal every request ended in its full, right answer; after it every request ended within seconds, in that or in
  a typed error: ConnectionLost after SIGKILL, Cancelled after SIGTERM, and that only to requests that had not begun to be
  answered where there was time to drain;
- SIGTERM ended with status 0, the socket's file gone;
- the lock was free as soon as the process had ended, no process of its session was left, and whoever connects to the path is
  answered by the new daemon's process.

    python -m bench.daemon_kills [--kills 200] [--terms 200] [--seed 1]

Exit status 1 if any of this did not hold.
"""

import argparse
import fcntl
import itertools
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from bench._common import finish, machine, progress, spread, table
from ferrum_rt.interfaces.errors import FerrumError
from ferrum_rt.interfaces.responses import assemble
from ferrum_rt.ipc.client import Client, connect
from tests.fakes.daemon import ForkedDaemon, forked_daemon
from tests.runtime.engines import text_after

STEP_S = 0.008
NUM_CLIENTS, NUM_STREAMS = 4, 4
MAX_DELAYS_S = (0.03, 0.3)
"""From the start of the load to the signal: while clients still connect, or in the midst of their requests."""
KILL, TERM, SHORT_TERM = "SIGKILL", "SIGTERM", "SIGTERM, no time to drain"
DRAIN_S = {KILL: 20.0, TERM: 20.0, SHORT_TERM: 0.02}
END_LIMIT_S = 10.0
"""For all to have ended after the signal, beside the time to drain."""
EXPECTED = {KILL: "connection_lost", TERM: "cancelled", SHORT_TERM: "cancelled"}


@dataclass
class Round:
    """The end of one daemon. Times are of time.monotonic."""

    kind: str
    signalled_at: float = 0.0
    exited_at: float = 0.0
    last_end_at: float = 0.0
    start_s: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    open_requests: dict[int, str] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def connected(self, number: int, error: FerrumError | None = None) -> None:
        """Or not. Whom a daemon that ends has not taken in yet, it only hangs up on."""
        self.open_requests.pop(number)
        self.last_end_at = time.monotonic()
        after = (EXPECTED[self.kind], "connection_lost", "not_found")
        if error is not None and not (self.signalled_at and error.code in after):
            self.violations.append(f"a connection was refused: {error!r}")

    def ended(self, number: int, how: str, num_chunks: int) -> None:
        """A request's end: ``how`` is answered, left, or an error's code."""
        self.open_requests.pop(number)
        self.endings[how] += 1
        self.last_end_at = time.monotonic()
        if how in ("answered", "left"):
            return
        if not self.signalled_at:
            self.violations.append(f"a request ended in {how} before the signal")
        elif how != EXPECTED[self.kind]:
            self.violations.append(f"a request ended in {how}")
        elif self.kind == TERM and num_chunks:
            self.violations.append(f"a request ended in {how} after {num_chunks} chunks, with time to drain")


# -- the load -------------------------------------------------------------------------------------------------------------


async def client(path: Path, dice: random.Random, numbers: "itertools.count[int]", now: Round) -> None:
    number = next(numbers)
    now.open_requests[number] = "connect"
    try:
        async with connect(path) as engine:
            now.connected(number)
            async with anyio.create_task_group() as streams:
                for _ in range(NUM_STREAMS):
                    streams.start_soon(stream, engine, dice, numbers, now)
    except FerrumError as error:
        now.connected(number, error)


async def stream(engine: Client, dice: random.Random, numbers: "itertools.count[int]", now: Round) -> None:
    """One request after the other, until one fails."""
    for number in numbers:
        request = Request(dice)
        now.open_requests[number] = f"{request}"
        try:
            how = await request.run(engine)
        except FerrumError as error:
            now.ended(number, error.code, request.num_chunks)
            return
        now.ended(number, how, request.num_chunks)


class Request:
    """One of the kinds that there are."""

    def __init__(self, dice: random.Random) -> None:
        self._prompt = "x" * dice.choice((3, 50, 700)) + f"{dice.random()}"
        self._fields: dict[str, Any] = {"max_tokens": dice.choice((5, 20, 60)), "n": dice.choice((1, 1, 1, 2))}
        self._is_whole = dice.random() < 0.3
        self._pause_s = dice.choice((0.0, 0.0, 0.01))
        self._leaves_after = dice.choice((None, None, None, 3))
        self.num_chunks = 0

    def __str__(self) -> str:
        return f"{vars(self)}"

    async def run(self, engine: Client) -> str:
        if self._is_whole:
            return self._check((await engine.infer(self._prompt, **self._fields)).text)
        received = []
        async with engine.infer_stream(self._prompt, **self._fields) as chunks:
            async for chunk in chunks:
                received.append(chunk)
                self.num_chunks += 1
                if self.num_chunks == self._leaves_after:
                    return "left"
                if self._pause_s:
                    await anyio.sleep(self._pause_s)
        return self._check(assemble(received, None).text)

    def _check(self, text: str) -> str:
        return "answered" if text == text_after(self._prompt, self._fields["max_tokens"]) else "wrong answer"


# -- a daemon's end -------------------------------------------------------------------------------------------------------


async def play(path: Path, dice: random.Random, now: Round) -> None:
    config = {"scheduler": {"drain_s": DRAIN_S[now.kind]}}
    began = time.monotonic()
    async with forked_daemon(path, config=config, step_s=STEP_S) as daemon:
        now.start_s = time.monotonic() - began
        if (pid := serving_pid(path)) != daemon.pid:
            now.violations.append(f"process {pid} serves the path, not the new daemon's {daemon.pid}")
        numbers = itertools.count()
        async with anyio.create_task_group() as clients:
            for _ in range(NUM_CLIENTS):
                clients.start_soon(client, path, dice, numbers, now)
            await anyio.sleep(dice.uniform(0.0, dice.choice(MAX_DELAYS_S)))
            now.signalled_at = time.monotonic()
            daemon.send(signal.SIGKILL if now.kind == KILL else signal.SIGTERM)
            clients.start_soon(watch_end, daemon, path, now)
            clients.cancel_scope.deadline = anyio.current_time() + END_LIMIT_S + DRAIN_S[now.kind]
    if clients.cancel_scope.cancelled_caught:
        now.violations += [f"never ended: {request}" for request in now.open_requests.values()]
        if not now.exited_at:
            now.violations.append("the process did not end")


async def watch_end(daemon: ForkedDaemon, path: Path, now: Round) -> None:
    status = await daemon.end()
    now.exited_at = time.monotonic()
    if status != (-signal.SIGKILL if now.kind == KILL else 0):
        now.violations.append(f"exit status {status}; its last lines: {daemon.log()[-5:]}")
    now.violations += left_behind(path, daemon.pid, has_socket=now.kind == KILL)


def left_behind(path: Path, pid: int, *, has_socket: bool) -> list[str]:
    """What should not be there any more."""
    found = []
    if path.exists() and not has_socket:
        found.append("the socket was left")
    with open(f"{path}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append("the lock was left")
    if orphans := session(pid):
        found.append(f"processes were left: {orphans}")
    return found


def serving_pid(path: Path) -> int:
    """Of the process that listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
        pid, _, _ = struct.unpack("iII", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def session(leader: int) -> list[int]:
    """The processes of its session; a daemon is forked with one of its own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == leader:
            found.append(int(entry.parent.name))
    return found


# -- all of them ----------------------------------------------------------------------------------------------------------


async def play_all(kinds: list[str], dice: random.Random, rounds: list[Round]) -> None:
    """Until there is a violation."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ferrum-rt" / "default.sock"
        for index, kind in enumerate(kinds, start=1):
            rounds.append(Round(kind))
            try:
                await play(path, dice, rounds[-1])
            except AssertionError as error:  # it was never ready
                rounds[-1].violations.append(f"the next daemon did not start: {error}")
            if rounds[-1].violations:
                return
            if index % 20 == 0:
                progress(f"{index} of {len(kinds)} rounds")


def summary(rounds: list[Round]) -> dict[str, Any]:
    ended = sum((one.endings for one in rounds), Counter[str]())
    return {
        "rounds": len(rounds),
        "requests": dict(sorted(ended.items())),
        "signal_to_last_end_ms": spread(1e3 * (one.last_end_at - one.signalled_at) for one in rounds),
        "signal_to_exit_ms": spread(1e3 * (one.exited_at - one.signalled_at) for one in rounds),
        "start_ms": spread(1e3 * one.start_s for one in rounds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Does every client of a daemon that dies hear of it?")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=200, help="every other one with too little time to drain")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="a short run that shows only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.kills, args.terms = 3, 4

    facts = machine()
    dice = random.Random(args.seed)
    kinds = [KILL] * args.kills + [TERM, SHORT_TERM] * (args.terms // 2) + [TERM] * (args.terms % 2)
    dice.shuffle(kinds)
    rounds: list[Round] = []
    anyio.run(partial(play_all, kinds, dice, rounds))

    violations = [f"round {index} ({one.kind}): {text}" for index, one in enumerate(rounds, 1) for text in one.violations]
    for text in violations:
        progress(text)
    done = [one for one in rounds if not one.violations]
    found = {kind: summary(mine) for kind in DRAIN_S if (mine := [one for one in done if one.kind == kind])}
    print("Milliseconds: median (low to high)")
    times = ("signal_to_last_end_ms", "signal_to_exit_ms", "start_ms")
    header = ["", "rounds", "requests", "signal to last client's end", "signal to exit", "start of the next"]
    print(
        table(
            header,
            [
                [kind, row["rounds"], sum(row["requests"].values()), *(row[name].show() for name in times)]
                for kind, row in found.items()
            ],
        )
    )
    settings = {
        "kills": args.kills,
        "terms": args.terms,
        "seed": args.seed,
        "clients": NUM_CLIENTS,
        "streams": NUM_STREAMS,
        "step_s": STEP_S,
    }
    finish("daemon_kills", facts, settings, {"violations": violations, "results": found})
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
