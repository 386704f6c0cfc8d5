"""The CUDA executor on an emulated device, with a decoder whose answers are exact."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from ferrum_rt.interfaces.errors import BackendError, EngineFailed, ResourceExhausted
from ferrum_rt.interfaces.model_executor import (
    DecodeInput,
    PageAppend,
    PageCopy,
    PrefillInput,
    SlotAssignment,
    StepInput,
    StepOutput,
    UnifiedBatch,
)
from ferrum_rt.interfaces.sampler import SamplingConfig, SequenceHistory
from ferrum_rt.interfaces.types import RequestId, TokenId
from ferrum_rt.kernels.batch import KvPages
from ferrum_rt.kernels.cuda.device import DeviceGraph
from ferrum_rt.kernels.sampling import uniform
from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor, graph_sizes
from ferrum_rt.runtime.execution.sampler import BatchSampler
from ferrum_rt.runtime.execution.step_pieces import piece_sizes
from tests.fakes.cuda_model import TokenDecoder, TokenOps, draw_by_sample, token_model_info
from tests.fakes.device import POISON, EmulatedDevice, EmulatedGraph
from tests.fakes.memory import VOCABULARY, next_token

NUM_SLOTS, NUM_PAGES, BLOCK_SIZE, MAX_LEN, MAX_TOKENS = 5, 12, 4, 24, 40


class Rig:
    """An executor, and what it runs on."""

    def __init__(self, *, is_lazy: bool = False, has_graphs: bool = True) -> None:
        self.device = EmulatedDevice(is_lazy=is_lazy)
        self.ops = TokenOps(self.device, MAX_LEN, BLOCK_SIZE)
        self.decoder = TokenDecoder(self.device, self.ops, NUM_SLOTS, BLOCK_SIZE)
        self.pages = KvPages(torch.full(((NUM_PAGES + 1) * BLOCK_SIZE, 1), POISON))
        self.sampler = BatchSampler(NUM_SLOTS, VOCABULARY, MAX_LEN)
        self.executor = CudaExecutor(
            token_model_info(MAX_LEN),
            self.decoder,
            self.ops,
            self.sampler,
            [self.pages],
            self.device,
            draw_by_sample,
            weight_bytes=7,
            num_slots=NUM_SLOTS,
            num_pages=NUM_PAGES,
            block_size=BLOCK_SIZE,
            max_tokens=MAX_TOKENS,
        )
        if has_graphs:
            self.executor.capture_graphs(lambda done, total: None)

    def replays(self) -> dict[int, int]:
        """By batch size, how often its graph of decodes was replayed, each time with the one draw that follows."""
        counts = {}
        for size, graphs in self.executor._graphs.items():
            forward, *draws = (emulated(graph).num_replays for graph in (graphs.forward, *graphs.draws))
            assert forward == sum(draws)
            counts[size] = forward
        return {size: count for size, count in counts.items() if count}

    def start(self, prompts: dict[int, list[int]], **sampling: object) -> list[int]:
        """Give each slot a sequence with two pages of its own; the tokens sampled first."""
        assigned = [
            SlotAssignment(
                slot,
                RequestId(str(slot)),
                SamplingConfig(**sampling),  # type: ignore[arg-type]
                [2 * slot, 2 * slot + 1],
                SequenceHistory(token_ids=[TokenId(token) for token in prompt], num_prompt_tokens=len(prompt)),
            )
            for slot, prompt in prompts.items()
        ]
        prefills = [PrefillInput(slot, [TokenId(t) for t in prompt], 0, True) for slot, prompt in prompts.items()]
        return tokens_of(self.executor.execute(StepInput(assigned, [], [], UnifiedBatch([], prefills))))


def emulated(graph: DeviceGraph) -> EmulatedGraph:
    assert isinstance(graph, EmulatedGraph)
    return graph


@contextmanager
def rig(*, is_lazy: bool = False, has_graphs: bool = True) -> Iterator[Rig]:
    made = Rig(is_lazy=is_lazy, has_graphs=has_graphs)
    try:
        yield made
    finally:
        made.device.advance()
        made.executor.close()
        made.device.close()


def decodes(positions: dict[int, int], **changes: list[PageAppend]) -> StepInput:
    batch = UnifiedBatch([DecodeInput(slot, position) for slot, position in positions.items()], [])
    return StepInput([], changes.get("appended", []), [], batch)


def outputs_of(future: "Future[StepOutput]") -> list[TokenId | None]:
    output = future.result(timeout=30)
    sampled = [*(item.sampled for item in output.decodes), *(item.sampled for item in output.prefills)]
    return [None if item is None else item.token_id for item in sampled]


def tokens_of(future: "Future[StepOutput]") -> list[int]:
    return [token for token in outputs_of(future) if token is not None]


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("num_slots", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_captured_sizes(num_slots: int, sizes: list[int]) -> None:
    """1, 2, 4, then every 8, and the number of slots."""
    assert graph_sizes(num_slots) == sizes


@pytest.mark.slow  # torch's own first steps
def test_decodes_replay_the_next_larger_graph() -> None:
    """A step of three decodes replays the graph for four, once, and nothing is waited for; a mixed step replays none of
    those for decodes."""
    prompts = {0: [1, 2, 3], 2: [4], 4: [5, 6]}
    with rig() as made:
        first = made.start(prompts)
        assert made.replays() == {}
        syncs = made.device.num_syncs
        second = tokens_of(made.executor.execute(decodes({0: 3, 2: 1, 4: 2})))
        assert made.device.num_syncs == syncs
        assert made.replays() == {4: 1}
        third = tokens_of(made.executor.execute(decodes({4: 3})))
        assert made.replays() == {1: 1, 4: 1}
        mixed = UnifiedBatch([DecodeInput(0, 4)], [PrefillInput(1, [TokenId(9)], 0, True)])
        assigned = SlotAssignment(1, RequestId("1"), SamplingConfig(), [2])
        assert tokens_of(made.executor.execute(StepInput([assigned], [], [], mixed)))[1] == next_token([9])
        assert made.replays() == {1: 1, 4: 1}
    found = [list(tokens) for tokens in zip(first, second, strict=True)]
    assert found == [continuation(prompt, 2) for prompt in prompts.values()]
    assert third == continuation(prompts[4], 3)[2:]


@pytest.mark.parametrize(
    ("max_tokens", "sizes"),
    [
        (9, [9]),
        (16, [16]),
        (40, [16, 32, 40]),
        (300, [16, 32, 64, 128, 256, 300]),
        (512, [16, 32, 64, 128, 256, 320, 384, 448, 512]),
        (8192, [16, 32, 64, 128, 256, 320, 384, 448, 512]),
    ],
)
def test_sizes_of_pieces(max_tokens: int, sizes: list[int]) -> None:
    """16, twice that and so on up to 256, every 64 up to 512; and no more than a step may have."""
    assert piece_sizes(max_tokens) == sizes


def mixed_step(new: dict[int, list[int]], positions: dict[int, int], start: int = 0) -> StepInput:
    """Decodes of known slots, and beside them the prompts of new ones, each with two pages of its own."""
    assigned = [SlotAssignment(slot, RequestId(str(slot)), SamplingConfig(), [2 * slot, 2 * slot + 1]) for slot in new]
    prefills = [PrefillInput(slot, [TokenId(t) for t in tokens], start, True) for slot, tokens in new.items()]
    return StepInput(assigned, [], [], UnifiedBatch([DecodeInput(*item) for item in positions.items()], prefills))


@pytest.mark.parametrize(("num_prompts", "length", "size"), [(1, 3, 16), (1, 7, 16), (3, 7, 32)])
def test_mixed_steps_are_replayed_in_pieces(num_prompts: int, length: int, size: int) -> None:
    """A step of decodes and prompts replays the graphs of the next larger number of rows, each once and with no other, and
    waits for nothing; each row has the token that is its own."""
    prompts = {slot: [slot + 4, *range(length - 1)] for slot in range(1, 1 + num_prompts)}
    with rig() as made:
        (first,) = made.start({0: [1, 2, 3]})
        before, syncs = [graph.num_replays for graph in made.device.graphs], made.device.num_syncs
        tokens = tokens_of(made.executor.execute(mixed_step(prompts, {0: 3})))
        assert made.device.num_syncs == syncs
        pieces = made.executor._pieces[size]._graphs
        assert [graph.num_replays - then for graph, then in zip(made.device.graphs, before, strict=True)] == [
            int(graph in pieces) for graph in made.device.graphs
        ]
        # What they left is there for the step after.
        after = tokens_of(made.executor.execute(decodes({0: 4, **dict.fromkeys(prompts, length)})))
    assert [first, tokens[0], after[0]] == continuation([1, 2, 3], 3)
    assert [list(pair) for pair in zip(tokens[1:], after[1:], strict=True)] == [
        continuation(prompt, 2) for prompt in prompts.values()
    ]


def test_steps_above_the_largest_pieces_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than were captured replay nothing, and have the same tokens."""
    monkeypatch.setattr("ferrum_rt.runtime.execution.step_pieces._MOST_ROWS", 16)
    prompts = {slot: [slot, *range(6)] for slot in range(4)}
    with rig() as made:
        assert list(made.executor._pieces) == [16]
        assert made.start(prompts) == [next_token(prompt) for prompt in prompts.values()]
        assert not any(graph.num_replays for graph in made.device.graphs)
        assert tokens_of(made.executor.execute(decodes({3: 7}))) == continuation(prompts[3], 2)[1:]


def test_padding_of_pieces_touches_nobodys_page() -> None:
    """The rows that fill up a captured step write to the scratch page alone."""
    with rig() as made:
        made.start({0: [1, 2, 3]})
        with made.device.stream():
            before = made.pages.data.clone()
        tokens_of(made.executor.execute(mixed_step({2: [5, 6]}, {0: 3})))
        changed = (made.pages.data != before).nonzero()[:, 0].tolist()
    scratch = NUM_PAGES * BLOCK_SIZE
    assert {3, 4 * BLOCK_SIZE, 4 * BLOCK_SIZE + 1} <= set(changed) <= {3, 4 * BLOCK_SIZE, 4 * BLOCK_SIZE + 1, scratch}


def test_a_graph_is_planned_before_each_replay() -> None:
    """Each replay has a plan of its own, and lengths that grow past a page's end are seen."""
    with rig() as made:
        tokens = made.start({3: [7, 8]})
        planned = made.ops.decode_attentions[1].num_plans
        for step in range(5):
            tokens += tokens_of(made.executor.execute(decodes({3: 2 + step})))
            assert made.ops.decode_attentions[1].num_plans == planned + step + 1
    assert tokens == continuation([7, 8], 6)


def test_padding_touches_nobodys_page() -> None:
    """What a padded graph writes besides its own rows lies in the scratch page."""
    with rig() as made:
        made.start({0: [1, 2, 3], 1: [4], 2: [5]})
        with made.device.stream():
            before = made.pages.data.clone()
        tokens_of(made.executor.execute(decodes({0: 3, 1: 1, 2: 1})))
        changed = (made.pages.data != before).nonzero()[:, 0].tolist()
        # Slot 0 writes row 3 of its pages, slots 1 and 2 row 1 of theirs, and padding the first of the scratch page.
        assert set(changed) <= {3, 2 * BLOCK_SIZE + 1, 4 * BLOCK_SIZE + 1, NUM_PAGES * BLOCK_SIZE}
        assert set(changed) >= {3, 2 * BLOCK_SIZE + 1, 4 * BLOCK_SIZE + 1}


def test_the_next_step_is_enqueued_before_this_one_ran() -> None:
    """Two steps are launched and nothing of the first one's graph has run; both give the right tokens in the end."""
    with rig(is_lazy=True) as made:
        started = made.executor.execute(
            StepInput(
                [SlotAssignment(0, RequestId("0"), SamplingConfig(), [0, 1])],
                [],
                [],
                UnifiedBatch([], [PrefillInput(0, [TokenId(3)], 0, True)]),
            )
        )
        made.device.advance()
        (token,) = tokens_of(started)
        first = made.executor.execute(decodes({0: 1}))
        ran = made.device.num_run
        second = made.executor.execute(decodes({0: 2}))
        graph_length = len(emulated(made.executor._graphs[1].forward).operations)
        assert made.device.num_run - ran < graph_length, "the second launch waited for the first step"
        assert made.device.num_queued >= 2 * graph_length
        assert not first.done()
        made.device.advance()
        assert [token, *tokens_of(first), *tokens_of(second)] == continuation([3], 3)


def test_a_third_step_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps have memory to be on their way in; the third is not written there before the first has been read."""
    waited: list[Future[StepOutput]] = []

    with rig(is_lazy=True) as made:

        def wait(futures: list[Future[StepOutput]]) -> None:
            waited.extend(futures)
            made.device.advance()
            futures[0].exception(timeout=30)

        assigned = SlotAssignment(0, RequestId("0"), SamplingConfig(), [0, 1])
        prefill = UnifiedBatch([], [PrefillInput(0, [TokenId(3)], 0, True)])
        monkeypatch.setattr("ferrum_rt.runtime.execution.cuda_executor.wait", wait)
        futures = [made.executor.execute(StepInput([assigned], [], [], prefill)), made.executor.execute(decodes({0: 1}))]
        assert waited == []
        futures.append(made.executor.execute(decodes({0: 2})))
        assert waited == futures[:1]
        made.device.advance()
        assert [token for future in futures for token in tokens_of(future)] == continuation([3], 3)


def test_results_are_poison_until_their_event() -> None:
    """What the host could read of a step that has not run is no token."""
    with rig(is_lazy=True) as made:
        future = made.executor.execute(
            StepInput(
                [SlotAssignment(0, RequestId("0"), SamplingConfig(), [0])],
                [],
                [],
                UnifiedBatch([], [PrefillInput(0, [TokenId(3)], 0, True)]),
            )
        )
        assert made.executor._results[made.executor._turn][0] == POISON
        made.device.advance()
        assert tokens_of(future) == [next_token([3])]


def test_pages_are_copied_before_the_batch() -> None:
    """A sequence that goes on in a copy of another's page has that one's tokens, and its own from there on."""
    with rig() as made:
        made.start({0: [1, 2, 3]})
        step = StepInput(
            [SlotAssignment(1, RequestId("1"), SamplingConfig(), [9])],
            [],
            [PageCopy(0, 9)],
            UnifiedBatch([DecodeInput(0, 3)], [PrefillInput(1, [TokenId(8)], 2, True)]),
        )
        assert tokens_of(made.executor.execute(step)) == [continuation([1, 2, 3], 2)[1], next_token([1, 2, 8])]


@pytest.mark.parametrize("has_graphs", [True, False])
def test_appended_pages_are_used(has_graphs: bool) -> None:
    """A page that is appended holds the tokens from then on, in a graph too."""
    with rig(has_graphs=has_graphs) as made:
        tokens = made.start({0: [1] * 8})
        tokens += tokens_of(made.executor.execute(decodes({0: 8}, appended=[PageAppend(0, 2, 11)])))
        tokens += tokens_of(made.executor.execute(decodes({0: 9})))
        assert tokens == continuation([1] * 8, 3)
        assert made.pages.data[11 * BLOCK_SIZE, 0] == tokens[0]


def test_rows_that_the_graph_cannot_draw_are_sampled_from_its_logits() -> None:
    """A banned token is not drawn, the sequence goes on from the one that was, and the plain row beside it is untouched."""
    banned = next_token([1, 2])
    with rig() as made:
        (first,) = made.start({0: [1, 2]}, bad_words=((banned,),))
        (beside,) = made.start({1: [5]})
        assert first == (0 if banned != 0 else 1)  # the first of the many that are next in line
        second, third = tokens_of(made.executor.execute(decodes({0: 2, 1: 1})))
        expected = next_token([1, 2, first])
        assert second == (expected if expected != banned else 0)
        assert [beside, third] == continuation([5], 2)
        scored = made.start({2: [6]}, logprobs=1)
        assert scored == [next_token([6])]


def test_prompt_scores_come_with_their_chunk() -> None:
    """Each token after a chunk's first is scored, and so is the one after the chunk."""
    with rig() as made:
        item = PrefillInput(0, [TokenId(1), TokenId(2)], 0, False, 1, TokenId(3))
        step = StepInput([SlotAssignment(0, RequestId("0"), SamplingConfig(), [0])], [], [], UnifiedBatch([], [item]))
        (output,) = made.executor.execute(step).result(timeout=30).prefills
        assert output.sampled is None
        assert [score.token_ids for score in output.scores] == [[2, next_token([1])], [3, next_token([1, 2])]]


@pytest.mark.parametrize("has_graphs", [True, False])
def test_a_row_of_nan_fails_alone(has_graphs: bool) -> None:
    """A token of -1 is an error in its own row, and the next step of that slot harms nobody."""
    with rig(has_graphs=False) as made:
        draw = made.executor._draw
        spoilt = uniform(torch.tensor(1), torch.arange(100), torch.tensor(0))
        made.executor._draw = lambda logits, params, form: draw(logits, params, form).where(
            ~torch.isin(params.draws, spoilt), -1
        )
        if has_graphs:
            made.executor.capture_graphs(lambda done, total: None)
        (first,) = made.start({0: [1]})
        step = StepInput(
            [SlotAssignment(1, RequestId("1"), SamplingConfig(seed=1), [2])],
            [],
            [],
            UnifiedBatch([], [PrefillInput(1, [TokenId(2)], 0, True)]),
        )
        (failed,) = made.executor.execute(step).result(timeout=30).prefills
        assert failed.sampled is not None
        assert isinstance(failed.sampled.error, BackendError)
        assert failed.sampled.token_id is None
        second, none = outputs_of(made.executor.execute(decodes({0: 1, 1: 1})))
        assert ([first, second], none) == (continuation([1], 2), None)


# -- faults ---------------------------------------------------------------------------------------------------------------


def count_allocations(made: Rig) -> int:
    """Of the step that ``faulty_step`` describes."""
    made.device.fail_at = 10**6
    tokens_of(made.executor.execute(faulty_step(1)))
    left, made.device.fail_at = made.device.fail_at, None
    return 10**6 - left


def faulty_step(slot: int) -> StepInput:
    assigned = SlotAssignment(slot, RequestId(str(slot)), SamplingConfig(logprobs=1), [2 * slot])
    prefill = PrefillInput(slot, [TokenId(slot + 1)], 0, True)
    return StepInput([assigned], [], [PageCopy(10, 11)], UnifiedBatch([DecodeInput(0, 1)], [prefill]))


@pytest.mark.slow
def test_a_step_without_memory_is_run_again() -> None:
    """Wherever memory runs out once, the cache is emptied and the step gives what it would have given."""
    with rig() as made:
        made.start({0: [4]})
        total = count_allocations(made)
    assert total > 10
    for fail_at in range(0, total, 3):
        with rig() as made:
            made.start({0: [4]})
            made.device.fail_at = fail_at
            assert tokens_of(made.executor.execute(faulty_step(2))) == [continuation([4], 2)[1], next_token([3])]
            assert made.device.num_empty_cache == 1
            assert made.device.fail_at is None
            assert tokens_of(made.executor.execute(decodes({2: 1}))) == continuation([3], 2)[1:]


def test_a_step_that_finds_no_memory_twice_fails() -> None:
    """It raises ResourceExhausted, but its slots are taken over, and those that come after run."""
    with rig() as made:
        made.start({0: [4]})
        made.device.fail_at, made.device.num_failures = 3, 2
        with pytest.raises(ResourceExhausted, match=r"memory\.utilization"):
            made.executor.execute(faulty_step(2))
        assert made.executor._block_tables[2, 0] == 4
        tokens_of(made.executor.execute(decodes({2: 1})))  # planned already, when the step failed
        assert made.start({3: [1, 2]}) == [next_token([1, 2])]


def test_a_fault_of_the_device_is_the_engines_end() -> None:
    """The step that meets it, the one launched behind it and all later ones end with EngineFailed; closing still works."""
    with rig(is_lazy=True) as made:
        made.executor._flights = [None, None]
        prefill = UnifiedBatch([], [PrefillInput(0, [TokenId(1)], 0, True)])
        assigned = SlotAssignment(0, RequestId("0"), SamplingConfig(), [0])
        first = made.executor.execute(StepInput([assigned], [], [], prefill))
        second = made.executor.execute(decodes({0: 1}))
        made.device.die_at = 5
        made.device.advance()
        for future in (first, second):
            with pytest.raises(EngineFailed, match="illegal memory access"):
                future.result(timeout=30)
        with pytest.raises(EngineFailed):
            made.executor.execute(decodes({0: 2}))


def test_a_fault_met_while_launching() -> None:
    """A device that is found dead while a step is launched ends the engine too."""
    with rig() as made:
        made.start({0: [1]})
        made.device.die_at = 0
        with made.device.stream():
            torch.ones(3)
        made.device.advance()
        with pytest.raises(EngineFailed):
            made.executor.execute(decodes({0: 1}))


def test_another_error_is_the_steps_own() -> None:
    """What the decoder raises comes out as it is, and the next step runs."""
    with rig() as made:
        (token,) = made.start({0: [1]})

        def crack(batch: object) -> None:
            raise ZeroDivisionError

        made.decoder.sees = crack
        with pytest.raises(ZeroDivisionError):
            made.start({1: [2]})
        assert [token, *tokens_of(made.executor.execute(decodes({0: 1})))] == continuation([1], 2)


def test_closing_gives_back_the_thread() -> None:
    """No thread of the executor's is left."""
    with rig() as made:
        made.start({0: [1]})
        assert any(thread.name.startswith("ferrum-device-waiter") for thread in threading.enumerate())
    assert not any(thread.name.startswith("ferrum-device-waiter") for thread in threading.enumerate())


def test_memory_usage() -> None:
    """Weights as given, and the pages with the scratch page."""
    with rig() as made:
        usage = made.executor.memory_usage()
        assert (usage.weights, usage.kv_cache) == (7, (NUM_PAGES + 1) * BLOCK_SIZE * 8)
