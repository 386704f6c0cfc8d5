"""ferrum-rt top: the picture, as a function of two reports; and the command, in a terminal beside a daemon of its own."""

import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from ferrum_rt.cli import main
from ferrum_rt.cli.top_picture import Look, picture
from ferrum_rt.interfaces.types import (
    ClientDiagnostics,
    ClientId,
    DataType,
    Device,
    EngineMetrics,
    EngineState,
    EngineStatus,
    MemoryUsage,
    ModelId,
    ModelInfo,
    ModelType,
    PageCounts,
    RequestCounts,
    SchedulerDiagnostics,
    SchedulerStats,
)
from ferrum_rt.ipc.client import connect
from tests.command_line import Cli, assert_one_error, start
from tests.daemon.serving import daemon
from tests.fakes.daemon import daemon_process
from tests.runtime.engines import until
from tests.terminal import Terminal, terminal

# -- the picture ----------------------------------------------------------------------------------------------------------

PAGES = PageCounts(total=200, free=60, active=80, cached=60)
NO_REQUESTS = RequestCounts(running=0, waiting=0, parked=0, finished=0, failed=0, cancelled=0, rejected=0)
MODEL = ModelInfo(
    id=ModelId("demo"),
    type=ModelType.LLAMA,
    num_parameters=1,
    num_layers=1,
    hidden_size=1,
    vocab_size=1,
    max_model_len=1,
    dtype=DataType.BFLOAT16,
    device=Device.CPU,
)


def client(generated: int, **counts: int) -> ClientDiagnostics:
    have = dict.fromkeys(("num_live", "num_waiting", "num_running", "num_pages", "num_queued_tokens"), 0) | counts
    return ClientDiagnostics(served={}, generated_tokens=generated, **have)


def look(
    uptime_s: float,
    *,
    requests: RequestCounts = NO_REQUESTS,
    pages: PageCounts = PAGES,
    clients: Mapping[str, ClientDiagnostics] | None = None,
    is_told: bool = True,
    model: ModelInfo | None = MODEL,
    counters: Mapping[str, float] | None = None,
    **tokens: int,
) -> Look:
    """What a daemon might say; ``counters`` are EngineMetrics' and ``tokens`` SchedulerStats'."""
    status = EngineStatus(
        state=EngineState.READY,
        model=model,
        uptime_s=uptime_s,
        requests=requests,
        pages=pages,
        memory=MemoryUsage(weights=0, kv_cache=0),
    )
    names = ("running", "waiting", "parked", "preemptions", "prompt_tokens", "cached_tokens", "generated_tokens")
    stats = SchedulerStats(**(dict.fromkeys(names, 0) | tokens), pages=pages)
    metrics: dict[str, Any] = {"steps": 0, "step_s": 0.0, "host_s": 0.0} | dict(counters or {})
    found = SchedulerDiagnostics(
        clients={ClientId(name): one for name, one in (clients or {}).items()},
        waiting={},
        step_cost=(0.0, 0.0, 0.0, 0.0),
        estimated_wait_s=0.0,
        on_trial=[],
    )
    return Look(status=status, metrics=EngineMetrics(scheduler=stats, **metrics), diagnostics=found if is_told else None)


def shown(before: Look | None, now: Look, width: int = 100, height: int | None = None) -> dict[str, str]:
    """The picture's lines by their first words."""
    lines = picture(before, now, width=width, height=height)
    return {re.split(r" {2,}", line)[0]: line for line in lines}


def test_a_daemon_is_described() -> None:
    """Model, state and uptime; what is under way; the pages, each state with its part of the bar."""
    now = look(3725.0, requests=RequestCounts(**{**vars_of(NO_REQUESTS), "running": 3, "waiting": 2, "parked": 1}))
    lines = picture(None, now, width=63)
    assert lines[0] == "ferrum-rt top   demo (llama, bfloat16, cpu)   ready   up 1 h 2 "
    assert "requests   running 3, waiting 2, parked 1" in lines
    at = lines.index("pages      active 80, cached 60, free 60 of 200")
    assert lines[at + 1] == "           [" + "#" * 20 + "=" * 15 + "." * 15 + "]"


def vars_of(counts: RequestCounts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in counts.__struct_fields__}


def test_rates_are_between_two_looks() -> None:
    """By the daemon's clock: tokens, requests by outcome, steps with what each took, and by how much the loop was late."""
    before = look(
        10.0,
        requests=RequestCounts(**{**vars_of(NO_REQUESTS), "finished": 10}),
        counters={"steps": 100, "step_s": 1.0, "host_s": 0.1, "loop_lag_s": 0.5, "max_loop_lag_s": 0.2},
        prompt_tokens=1000,
        generated_tokens=500,
        preemptions=3,
    )
    now = look(
        12.0,
        requests=RequestCounts(**{**vars_of(NO_REQUESTS), "finished": 16, "failed": 1, "cancelled": 2, "rejected": 4}),
        counters={"steps": 300, "step_s": 2.6, "host_s": 0.2, "loop_lag_s": 0.51, "max_loop_lag_s": 0.2},
        prompt_tokens=5000,
        generated_tokens=550,
        cached_tokens=1250,
        preemptions=4,
    )
    lines = shown(before, now)
    assert lines["ended"] == "ended      finished 3.0/s, failed 0.5/s, cancelled 1.0/s, rejected 2.0/s"
    assert lines["tokens"] == "tokens     in 2,000/s, out 25.0/s, prefix hits 25% since the start"
    assert lines["preempted"] == "preempted  0.5/s, 4 since the start"
    assert lines["steps"] == "steps      100/s, 8.00 ms each, host 0.50 ms each, 5.0% of the time"
    assert lines["loop lag"] == "loop lag   5.0 ms/s, the longest 200.0 ms"


@pytest.mark.parametrize("before", [None, look(5.0)], ids=["one look", "no time between them"])
def test_without_time_there_are_no_rates(before: Look | None) -> None:
    """What cannot be known is a dash, and an idle daemon's averages are too."""
    lines = shown(before, look(5.0, clients={"a": client(7)}))
    assert lines["ended"].count(" -") == 4
    assert lines["steps"] == "steps      -, - each, host - each"
    assert lines["a"].endswith(" -")
    assert shown(look(4.0), look(5.0))["steps"] == "steps      0.0/s, - each, host - each, 0.0% of the time"


def test_clients_are_ordered_by_what_they_get() -> None:
    """The one with the most tokens per second first; of the others the one with the most under way, then by name. One that
    came since counts from nothing, and one that left and came back too, so no rate is below zero."""
    before = look(1.0, clients={"slow": client(1000), "quick": client(0), "again": client(900), "gone": client(5)})
    now = look(
        3.0,
        clients={
            "b": client(0, num_live=1),
            "a": client(0, num_live=1),
            "waits": client(0, num_live=9, num_waiting=9),
            "slow": client(1010, num_live=1, num_running=1, num_pages=7),
            "quick": client(80),
            "again": client(30),
            "new": client(20),
        },
    )
    table = [line.split() for line in picture(before, now, width=100)[-8:]]
    assert table[0] == ["client", "live", "running", "waiting", "pages", "tokens/s"]
    assert [(row[0], row[-1]) for row in table[1:]] == [
        ("quick", "40.0"),
        ("again", "15.0"),
        ("new", "10.0"),
        ("slow", "5.0"),
        ("waits", "0.0"),
        ("a", "0.0"),
        ("b", "0.0"),
    ]
    assert table[4] == ["slow", "1", "1", "0", "7", "5.0"]


def test_who_may_not_know_of_clients_sees_the_rest() -> None:
    """Without diagnostics there is a sentence in the table's place, and what is above it is the same."""
    told, untold = picture(None, look(1.0), width=100), picture(None, look(1.0, is_told=False), width=100)
    assert untold[:-1] == told[:-1]
    assert "the user who runs the daemon" in untold[-1]


@pytest.mark.parametrize("width", [1, 9, 12, 40, 61, 80, 200])
@pytest.mark.parametrize("height", [1, 5, 13, 14, 16, 24])
def test_it_fits(width: int, height: int) -> None:
    """No line is wider than the terminal and there are no more than it has; clients without a place are counted."""
    clients = {f"c{number:02}": client(number) for number in range(20)}
    lines = picture(look(1.0), look(2.0, clients=clients), width=width, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    if height >= 16 and width >= 40:
        num_shown = sum(line.startswith("c") and line[1:3].isdigit() for line in lines)
        assert lines[-1] == f"and {20 - num_shown} more"
        assert len(lines) == height


def test_a_table_that_fits_exactly_is_whole() -> None:
    """Nothing is left out for a line that says so."""
    clients = {f"client {number}": client(number) for number in range(3)}
    whole = picture(None, look(2.0, clients=clients), width=100)
    assert picture(None, look(2.0, clients=clients), width=100, height=len(whole)) == whole
    assert picture(None, look(2.0, clients=clients), width=100, height=len(whole) - 1)[-1] == "and 2 more"


def test_names_cannot_break_the_picture() -> None:
    """A client's name is cut where its column ends, by what it takes on a terminal; what turns the direction of writing, or
    controls a terminal, is a question mark."""
    names = ["x" * 300, "漢字" * 30, "e\u0301" * 40, "\u202e evil \x1b[2J"]
    lines = picture(None, look(1.0, clients={name: client(0) for name in names}), width=80)[-4:]
    assert [line[-50:] for line in lines] == [lines[0][-50:]] * 4
    by_start = {line[0]: line[:-50] for line in lines}
    assert by_start["x"] == "x" * 30
    assert by_start["漢"] == "漢字" * 7 + "漢"
    assert by_start["e"] == "e\u0301" * 30
    assert by_start["?"].startswith("? evil ?[2J ")


def test_an_engine_without_a_model() -> None:
    """One that is still starting has nothing to divide by."""
    empty = PageCounts(total=0, free=0, active=0, cached=0)
    assert "no model" in picture(None, look(0.0, model=None, pages=empty), width=80)[0]


# -- in a terminal --------------------------------------------------------------------------------------------------------


@contextmanager
def running_daemon(path: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """In a process of its own, for tests that are not async, as the command line is not."""
    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(daemon_process(path, **options)) as process:
            yield process


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a daemon with nothing to do."""
    place = tmp_path_factory.mktemp("run") / "s"
    with running_daemon(place):
        yield str(place)


def has(text: str) -> Callable[[list[str]], bool]:
    return lambda lines: any(text in line for line in lines)


def is_drawn(lines: list[str]) -> bool:
    """From the second look on there are rates."""
    return any(line.startswith("ended      finished 0.0/s") for line in lines)


def assert_restored(watching: Terminal, before: list[object]) -> None:
    assert watching.modes == before
    assert not watching.screen.is_alternate
    assert watching.screen.has_cursor


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "status"), [("xyz q", 0), ("Q", 0), ("\x03", 130)], ids=["q", "Q", "Ctrl-C"])
def test_it_draws_until_it_is_told_to_end(path: str, keys: str, status: int) -> None:
    """On the alternate screen, without echo; at the end the terminal is as it was, and nothing is said."""
    with terminal("top", "--socket", path, "--interval", "0.1") as watching:
        before = watching.modes
        lines = watching.until(is_drawn)
        assert lines[0].startswith("ferrum-rt top   fake (llama, float32, cpu)   ready   up ")
        assert watching.screen.is_alternate
        assert not watching.screen.has_cursor
        assert watching.modes != before
        watching.type(keys)
        assert watching.end() == (status, "")
        assert_restored(watching, before)


@pytest.mark.slow
def test_it_fits_whatever_size_the_terminal_takes(path: str) -> None:
    """A smaller terminal is drawn on at once, however long the interval; nothing of the larger picture is left."""
    with terminal("top", "--socket", path, "--interval", "600", lines=40, columns=100) as watching:
        watching.until(has("loop lag"))
        watching.resize(5, 40)
        assert len(watching.screen.lines) == 5
        assert watching.screen.lines[2].startswith("requests")
        watching.resize(40, 100)
        watching.until(has("tokens/s"))
        watching.type("q")
        assert watching.end() == (0, "")


@pytest.mark.slow
def test_clients_are_shown(tmp_path: Path) -> None:
    """Who has a request under way is in the table with what it holds and gets, and is gone when that has ended."""
    place = str(tmp_path / "s")
    with running_daemon(tmp_path / "s", step_s=0.005), terminal("top", "--socket", place, "--interval", "0.2") as watching:
        row = re.compile(rf"uid {os.getuid()}/default +1 +1 +0 +[1-9]\d* +[1-9][\d.,]*")
        with start("run", "def", "--max-tokens", "900", "--connect", place) as process:
            watching.until(lambda lines: any(row.fullmatch(line) for line in lines))
            process.kill()
        lines = watching.until(lambda lines: lines[-1] == "" and lines[-2].startswith("client "))
        assert "requests   running 0, waiting 0, parked 0" in lines
        watching.type("q")
        assert watching.end() == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_the_terminal_restored(path: str, number: signal.Signals) -> None:
    """With the status that a shell reports for it; also without keys, which are only read from a terminal."""
    with terminal("top", "--socket", path, "--interval", "0.1", has_keys=False) as watching:
        before = watching.modes
        watching.until(is_drawn)
        assert watching.modes == before
        watching.process.send_signal(number)
        assert watching.end() == (128 + number, "")
        assert_restored(watching, before)


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


@pytest.mark.slow
def test_it_can_be_stopped_and_goes_on(path: str) -> None:
    """Ctrl-Z gives the terminal back as it was; in the foreground again it draws on."""
    with terminal("top", "--socket", path, "--interval", "0.1") as watching:
        before = watching.modes
        watching.until(is_drawn)
        watching.type("\x1a")
        watching.until(lambda _: is_stopped(watching.process) and not watching.screen.is_alternate)
        assert_restored(watching, before)
        watching.process.send_signal(signal.SIGCONT)
        watching.until(lambda lines: watching.screen.is_alternate and is_drawn(lines))
        watching.type("q")
        assert watching.end() == (0, "")
        assert_restored(watching, before)


@pytest.mark.slow
def test_a_terminal_that_is_closed_ends_it(path: str) -> None:
    """Quietly, as a hang-up."""
    with terminal("top", "--socket", path, "--interval", "0.1") as watching:
        watching.until(is_drawn)
        watching.close()
        assert watching.end() == (128 + signal.SIGHUP, "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_daemons_end_is_told_on_the_restored_terminal(tmp_path: Path, number: signal.Signals) -> None:
    """One line says that the daemon is gone, or shuts down, and the status is 2."""
    with running_daemon(tmp_path / "s") as serving:
        with terminal("top", "--socket", str(tmp_path / "s"), "--interval", "0.1") as watching:
            before = watching.modes
            watching.until(is_drawn)
            serving.send_signal(number)
            status, said = watching.end()
            assert_restored(watching, before)
    assert status == 2
    assert re.fullmatch(r"ferrum-rt: error: .*the daemon (has closed the connection|is shutting down)\n", said), said


@pytest.mark.slow
def test_it_can_be_left_while_the_daemon_hangs(tmp_path: Path) -> None:
    """A key is heard also while an answer is waited for."""
    with running_daemon(tmp_path / "s") as serving:
        with terminal("top", "--socket", str(tmp_path / "s"), "--interval", "0.1") as watching:
            watching.until(is_drawn)
            serving.send_signal(signal.SIGSTOP)
            watching.type("q")
            assert watching.end() == (0, "")


# -- once -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.mark.slow
def test_once_prints_one_picture(path: str) -> None:
    """On a terminal, with rates, and without taking its screen."""
    with terminal("top", "--socket", path, "--interval", "0.1", "--once") as watching:
        assert watching.end() == (0, "")
        assert is_drawn(watching.screen.lines)
        assert not watching.screen.is_alternate


async def read_all(chunks: AsyncIterator[object]) -> None:
    async for _ in chunks:
        pass


@pytest.mark.parametrize("option", [[], ["--once"]])
async def test_a_pipe_gets_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """With rates, of 80 columns and as many lines as it takes, and nothing in it but text; clients are in it with what they
    have."""
    async with daemon(tmp_path, step_s=0.001) as (engine, path), connect(path) as other:
        request = other.infer_stream("x", max_tokens=900, client_id=ClientId("ada"))
        async with request as chunks:
            await anext(chunks)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read_all, chunks)
                arguments = ["top", "--socket", str(path), "--interval", "0.1", *option]
                assert await anyio.to_thread.run_sync(main, arguments) == 0
                tasks.cancel_scope.cancel()
        await until(lambda: engine.status_now().pages.active == 0)
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "requests   running 1, waiting 0, parked 0" in lines
    name, live, running, waiting, pages, rate = lines[-1].rsplit(maxsplit=5)
    assert name.endswith("/ada")
    assert (live, running, waiting) == ("1", "1", "0")
    assert int(pages) > 0
    assert float(rate.replace(",", "")) > 0


@pytest.mark.parametrize("interval", ["0", "0.01", "-1", "nan", "inf", "soon", "86400"])
def test_an_interval_that_makes_no_sense(cli: Cli, interval: str) -> None:
    """Is refused before anything is asked of the daemon."""
    result = cli("top", "--socket", "/nowhere/s", "--interval", interval)
    assert_one_error(result)
    assert "argument --interval: " in result.err


def test_a_path_without_a_daemon(cli: Cli, tmp_path: Path) -> None:
    """One line says what is wrong and what to do."""
    result = cli("top", "--socket", str(tmp_path / "nobody"))
    assert_one_error(result)
    assert "no daemon listens at" in result.err
