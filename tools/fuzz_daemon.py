"""Send a daemon very many frames, most of which mean harm, and see that nothing comes of it.

    python -m tools.fuzz_daemon --frames 1000000 --seed 1

starts a daemon over the fake executor in a process of its own (or takes the one, over that executor too, that listens at
--socket) and speaks to it over many connections at once. Every answer is held against docs/protocol.md; between them one
connection that does no harm asks for texts and must get the right ones. At the end the daemon must be alive, have nothing
under way and nothing left open, and have grown by less than --max-growth-mib since a tenth of the frames was sent.

    python -m tools.fuzz_daemon --walks 10000

lets hypothesis think of that many conversations instead, those of tests/daemon/test_live_fuzz.py, and reduce one that goes
wrong to the least that does.

A frame counts as sent when the daemon has reason to look at it, so not behind one that ends its connection. Whatever
happens against the protocol is written to the corpus folder, as the bytes of the connection that met it, to be replayed by
tests/daemon/test_live_fuzz.py. The last line of standard output is JSON; the exit status is 1 if anything was wrong.
"""

import argparse
import json
import os
import selectors
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import anyio

from ferrum_rt.interfaces.errors import InvalidFormat
from ferrum_rt.ipc.framing import encode
from ferrum_rt.ipc.messages import Cancel, Credit, Goodbye, Hello, Query, Submit, WireRequest, WireSampling
from tests.daemon.line import Line
from tests.fakes.daemon import daemon_process
from tests.ipc.frames import broken_frame, large_attacks, odd_message, right_submit, session_message

ROOT = Path(__file__).parent.parent
HELLO = encode(Hello(version=1, client="fuzz"))
NUM_LINES = 16
FRAMES_PER_ANSWER = 500
MAX_WAIT_S = 30.0
MAX_VIOLATIONS = 10
# Few slots and pages, so that requests wait, are parked and are preempted.
CONFIG = {"scheduler": {"max_running_requests": 16}, "kv_cache": {"num_pages": 200}}


class Walk:
    """One connection's life: bursts of frames, each answered before the next, until one ends it or it leaves."""

    def __init__(self, path: Path, rng: Random) -> None:
        self.line, self._rng = Line(path), rng
        self.began = time.monotonic()
        self.hostile = 0
        self._ids: list[str] = []
        self._num_bursts = rng.choice((1, 1, 2, 4))
        self._is_calm = rng.random() < 0.5
        self._is_leaving = False
        if rng.random() < 0.98:
            self.line.say(HELLO)
        else:
            self._say_hostile()
        self._burst()

    @property
    def is_over(self) -> bool:
        return self.line.is_over

    def step(self) -> None:
        """Go on, if what was said is answered."""
        line = self.line
        line.pump()
        if line.is_over or line.ledger.is_ending:
            return
        if not line.has_half_a_frame and not self._is_leaving and not line.ledger.num_queries:
            if self._num_bursts:
                self._is_calm = False
                self._burst()
            else:
                self._settle()
        if not self._can_go_on or (self._is_leaving and not line.ledger.waiting):
            self._leave()
        line.flush()

    def _burst(self) -> None:
        self._num_bursts -= 1
        for _ in range(self._rng.choice((2, 8, 20, 40))):
            if not self._can_go_on:
                break
            if self._rng.random() < (0.25 if self._is_calm else 0.05):
                self._say_valid()
            else:
                self._say_hostile()
        if self._can_go_on:
            self.line.say(encode(Query(query_id=self._rng.getrandbits(60), kind="health")))
        self.line.flush()

    @property
    def _can_go_on(self) -> bool:
        return not self.line.ledger.is_ending and not self.line.has_half_a_frame

    def _say_valid(self) -> None:
        rng = self._rng
        if rng.random() < 0.6 or not self._ids:
            self._ids.append(f"r{len(self._ids)}")
            self.line.say(encode(right_submit(rng, self._ids[-1])), is_right=True)
        else:
            one = rng.choice(self._ids)
            quiet = Query(query_id=len(self._ids), kind=rng.choice(("status", "metrics", "arrivals")))
            change = session_message(rng, len(self._ids))
            self.line.say(encode(rng.choice((Cancel(request_id=one), Credit(request_id=one, chunks=5), quiet, change))))

    def _say_hostile(self) -> None:
        before = self.line.num_frames
        self.line.say(self._hostile())
        self.hostile += self.line.num_frames - before

    def _hostile(self) -> bytes:
        rng = self._rng
        if (kind := rng.random()) < 0.0002:
            return _large()[rng.randrange(len(_large()))]
        if self._is_calm or kind < 0.7:
            while isinstance(message := odd_message(rng, tuple(self._ids[-4:])), Hello | Goodbye) and self._is_calm:
                pass
            return encode(message)
        return broken_frame(rng)

    def _settle(self) -> None:
        """Every request must come to its end: those that nothing hinders by themselves, the others cancelled."""
        self._is_leaving = True
        ledger = self.line.ledger
        for request_id in set(ledger.waiting) - set(ledger.waiting_right):
            self.line.say(encode(Cancel(request_id=request_id)))

    def _leave(self) -> None:
        if self.line.ledger.is_ending:
            return
        way = self._rng.randrange(3)
        if way == 0 and self._can_go_on:
            self.line.say(encode(Goodbye()))
        elif way == 1 and not self.line.unsent:
            self.line.half_close()
        else:
            self.line.hang_up()


@cache
def _large() -> list[bytes]:
    return list(large_attacks().values())


class Healthy:
    """The connection that does no harm. Its ledger knows the texts that it must get."""

    def __init__(self, path: Path) -> None:
        self.line = Line(path)
        self.line.say(HELLO)
        self.num_answers = 0
        self.max_answer_s = 0.0
        self.asked_at = time.monotonic()
        self._is_waiting = False

    def ask(self) -> None:
        if self._is_waiting or self.line.is_over:
            return
        request = WireRequest(text=f"answer {self.num_answers}: ", sampling=WireSampling(max_tokens=20))
        self.line.sent.clear()
        self.line.say(encode(Submit(request_id="answer", request=request, credit=100)), is_right=True)
        self.line.flush()
        self.asked_at, self._is_waiting = time.monotonic(), True

    def step(self) -> None:
        self.line.pump()
        assert not self.line.is_over, "it was cut off"
        if self._is_waiting and not self.line.ledger.waiting:
            self._is_waiting = False
            self.num_answers += 1
            self.max_answer_s = max(self.max_answer_s, time.monotonic() - self.asked_at)


class Vitals:
    """What the process behind a socket holds, by /proc."""

    def __init__(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            self.pid: int = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self._proc = Path(f"/proc/{self.pid}")

    @property
    def rss_mib(self) -> float:
        pages = int((self._proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def num_fds(self) -> int:
        return len(os.listdir(self._proc / "fd"))

    @property
    def num_threads(self) -> int:
        return len(os.listdir(self._proc / "task"))


class Run:
    """The loop over all connections, and what it found."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self._path, self._options = path, options
        self._rng = Random(options.seed)
        self._poll = selectors.DefaultSelector()
        self._began = self._shown_at = time.monotonic()
        self._is_watched = sys.stderr.isatty()
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.rss_at_tenth = 0.0
        self.healthy = Healthy(path)
        self._poll.register(self.healthy.line.socket, selectors.EVENT_READ, self.healthy)

    def answer_once(self) -> None:
        """One right answer to the connection that does no harm, whatever else there is."""
        before = self.healthy.num_answers
        while self.healthy.num_answers == before and not self.healthy.line.is_over:
            self.healthy.ask()
            self._poll.select(timeout=1)
            self._step_healthy()
            if time.monotonic() - self.healthy.asked_at > MAX_WAIT_S:
                self._give_up(f"got no answer in {MAX_WAIT_S:g} s")

    def go(self, vitals: Vitals) -> None:
        walks, next_answer = set[Walk](), 0
        while walks or not self._is_done:
            while len(walks) < NUM_LINES and not self._is_done:
                self._open(walks)
            if self.counts["frames"] >= next_answer:
                next_answer += FRAMES_PER_ANSWER
                self.healthy.ask()
            self._turn(walks)
            if not self.rss_at_tenth and self.counts["frames"] * 10 >= self._options.frames:
                self.rss_at_tenth = vitals.rss_mib
            self._show()

    @property
    def _is_done(self) -> bool:
        return (
            self.counts["frames"] >= self._options.frames
            or len(self.violations) >= MAX_VIOLATIONS
            or self.healthy.line.is_over
        )

    def _open(self, walks: set[Walk]) -> None:
        walk = Walk(self._path, self._rng)
        walks.add(walk)
        self._poll.register(walk.line.socket, selectors.EVENT_READ, walk)
        self._step(walk, walks)

    def _turn(self, walks: set[Walk]) -> None:
        for key, _ in self._poll.select(timeout=0.05):
            if key.data is self.healthy:
                if not self.healthy.line.is_over:
                    self._step_healthy()
            else:
                self._step(key.data, walks)
        now = time.monotonic()
        for walk in [walk for walk in walks if walk.line.unsent or now - walk.began > MAX_WAIT_S]:
            if now - walk.began > MAX_WAIT_S:
                self._violated(walk.line, f"no end of it after {MAX_WAIT_S:g} s; waiting for {walk.line.ledger.waiting}")
                walk.line.hang_up()
            self._step(walk, walks)

    def _step(self, walk: Walk, walks: set[Walk]) -> None:
        try:
            if not walk.is_over:
                walk.step()
        except (AssertionError, InvalidFormat) as error:
            self._violated(walk.line, str(error))
            walk.line.is_over = True
        if walk.is_over:
            walks.discard(walk)
            self._poll.unregister(walk.line.socket)
            walk.line.socket.close()
            self.counts["frames"] += walk.line.num_frames
            self.counts["hostile"] += walk.hostile
            self.counts["connections"] += 1
            self.counts["cut"] += walk.line.ledger.is_cut

    def _step_healthy(self) -> None:
        try:
            self.healthy.step()
        except (AssertionError, InvalidFormat) as error:
            self._give_up(str(error))

    def _give_up(self, what: str) -> None:
        self._violated(self.healthy.line, f"the connection that does no harm: {what}")
        self.healthy.line.is_over = True

    def _violated(self, line: Line, what: str) -> None:
        self._options.corpus.mkdir(parents=True, exist_ok=True)
        name = f"found {self._options.seed} {len(self.violations)}"
        (self._options.corpus / name).write_bytes(line.sent)
        self.violations.append(f"{name}: {what}")

    def _show(self) -> None:
        now = time.monotonic()
        if self._is_watched and now - self._shown_at > 0.5:
            self._shown_at = now
            frames = self.counts["frames"]
            rate = frames / (now - self._began)
            text = f"{frames:,} of {self._options.frames:,} frames, {rate:,.0f}/s, {len(self.violations)} violations"
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._is_watched:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._poll.close()


def status_of(path: Path) -> dict[str, Any]:
    """What a fresh connection is told. Raises AssertionError."""
    line = Line(path)
    line.say(HELLO + encode(Query(query_id=1, kind="status")))
    deadline = time.monotonic() + MAX_WAIT_S
    with selectors.DefaultSelector() as poll:
        poll.register(line.socket, selectors.EVENT_READ)
        while not line.ledger.report:
            line.pump()
            assert time.monotonic() < deadline, "no report of the status came"
            poll.select(timeout=1)
    line.hang_up()
    status: dict[str, Any] = json.loads(line.ledger.report)
    return status


def is_idle(path: Path) -> bool:
    """No request is under way, and none has left a page."""
    status = status_of(path)
    return not any(status["requests"][kind] for kind in ("running", "waiting", "parked")) and not status["pages"]["active"]


def comes_true(what: str, is_so: Callable[[], bool]) -> list[str]:
    """Nothing, or the violation that it did not come true in time."""
    deadline = time.monotonic() + 10
    while not is_so():
        if time.monotonic() > deadline:
            return [f"at the end: not {what}"]
        time.sleep(0.05)
    return []


def fuzz(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    vitals, run = Vitals(path), Run(path, options)
    try:
        run.answer_once()
        fds, threads, began = vitals.num_fds, vitals.num_threads, time.monotonic()
        run.go(vitals)
        seconds = time.monotonic() - began
        run.answer_once()
        violations = run.violations
        violations += comes_true("idle", lambda: is_idle(path))
        violations += comes_true(f"back at {fds} open files", lambda: vitals.num_fds <= fds)
        violations += comes_true(f"back at {threads} threads", lambda: vitals.num_threads <= threads)
        growth = vitals.rss_mib - run.rss_at_tenth
        if growth > options.max_growth_mib:
            violations.append(f"memory grew by {growth:.1f} MiB since a tenth; at most {options.max_growth_mib} go")
    except OSError as error:
        violations = [*run.violations, f"the daemon is gone: {error}"]
        seconds = growth = 0.0
    finally:
        run.close()
    return {
        "frames": run.counts["frames"],
        "hostile": run.counts["hostile"],
        "connections": run.counts["connections"],
        "cut": run.counts["cut"],
        "answers": run.healthy.num_answers,
        "max_answer_s": round(run.healthy.max_answer_s, 3),
        "seconds": round(seconds, 1),
        "frames_per_s": round(run.counts["frames"] / max(seconds, 1e-9)),
        "rss_mib_at_tenth": round(run.rss_at_tenth, 1),
        "rss_growth_mib": round(growth, 1),
        "seed": options.seed,
        "violations": violations,
    }


def _is_complaint(line: str) -> bool:
    """Anything but a line of the log about the ordinary course of things, which cutting off a client is."""
    try:
        return json.loads(line)["level"] not in ("debug", "info")
    except ValueError:
        return True


async def main(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a run over a daemon that is there, or over one of its own."""
    async with AsyncExitStack() as stack:
        if options.socket:
            return fuzz(options.socket, options)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stderr = stack.enter_context((folder / "stderr").open("w+b"))
        await stack.enter_async_context(daemon_process(folder / "s", stderr=stderr, config=CONFIG))
        report = fuzz(folder / "s", options)
        stderr.seek(0)
        if complaints := [line for line in stderr.read().decode(errors="replace").splitlines() if _is_complaint(line)]:
            report["violations"].append(f"the daemon said on its standard error: {complaints[-5:]}")
        return report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed sends the same frames, if not at the same time")
    parser.add_argument("--walks", type=int, help="conversations of hypothesis's to have instead")
    parser.add_argument("--socket", type=Path, help="of a daemon over the fake executor; else one is started")
    parser.add_argument("--max-growth-mib", type=float, default=32.0, help="of memory (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, default=ROOT / "tests/daemon/corpus", help="where violations are written")
    return parser.parse_args(arguments)


def converse(count: int) -> dict[str, Any]:
    """The report of that many conversations."""
    from tests.daemon.test_live_fuzz import UvloopConversations, walk

    try:
        walk(UvloopConversations, count, shrinks=True)
    except Exception as error:  # whatever went wrong in one; hypothesis has written which
        traceback.print_exception(error)
        return {"walks": count, "violations": [str(error)]}
    return {"walks": count, "violations": []}


if __name__ == "__main__":
    options = parse()
    found = converse(options.walks) if options.walks else anyio.run(main, options)
    print(json.dumps(found))
    sys.exit(bool(found["violations"]))
