"""Random schedules through the CUDA executor: ``python -m tests.runtime.execution.cuda_schedules 10000``.

The device runs a step only when its result is wanted, and then no further: as late as a device can be. Pages and slots keep
what earlier schedules left there.
"""

import random
import sys
from collections.abc import Callable

import torch

from ferrum_rt.interfaces.model_executor import StepInput, StepOutput
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.scheduler import SequenceRequest
from ferrum_rt.interfaces.types import FinishReason, TokenId
from ferrum_rt.kernels.batch import KvPages
from ferrum_rt.runtime.execution.cuda_executor import CudaExecutor
from ferrum_rt.runtime.execution.sampler import BatchSampler
from tests.fakes.cuda_model import TokenDecoder, TokenOps, draw_by_sample, token_model_info
from tests.fakes.device import POISON, EmulatedDevice
from tests.fakes.memory import VOCABULARY, next_token
from tests.runtime.scheduling.test_scheduler_properties import (
    BLOCK_SIZE,
    BUDGET,
    EOS,
    MAX_LEN,
    NUM_PAGES,
    NUM_SLOTS,
    Schedule,
)

BANNED = 11


class Machine:
    """The executor and its device, for one schedule after the other."""

    def __init__(self) -> None:
        self.device = EmulatedDevice(is_lazy=True)
        self.ops = TokenOps(self.device, MAX_LEN, BLOCK_SIZE)
        self.pages = KvPages(torch.full(((NUM_PAGES + 1) * BLOCK_SIZE, 1), POISON))
        self.executor = CudaExecutor(
            token_model_info(MAX_LEN),
            TokenDecoder(self.device, self.ops, NUM_SLOTS, BLOCK_SIZE),
            self.ops,
            BatchSampler(NUM_SLOTS, VOCABULARY, MAX_LEN),
            [self.pages],
            self.device,
            draw_by_sample,
            weight_bytes=0,
            num_slots=NUM_SLOTS,
            num_pages=NUM_PAGES,
            block_size=BLOCK_SIZE,
            max_tokens=BUDGET,
        )
        self.executor.capture_graphs(lambda done, total: None)

    def close(self) -> None:
        self.executor.close()
        self.device.close()


class CudaSchedule(Schedule):
    """Some of the requests need more than the graph's draw: they may not say ``BANNED``. The others want draws of each form,
    which the stand-in makes no difference between."""

    def __init__(self, choices: bytes, machine: Machine) -> None:
        super().__init__(choices, max_rounds=1)
        self._machine = machine

    def sampling(self) -> SamplingConfig:
        greedy = SamplingConfig()
        return (
            greedy,
            greedy,
            SamplingConfig(bad_words=((BANNED,),)),
            SamplingConfig(temperature=1.0),
            SamplingConfig(temperature=1.0, top_p=0.9),
        )[self.choose(5)]

    def launch(self, step: StepInput) -> Callable[[], StepOutput]:
        future = self._machine.executor.execute(step)
        event = self._machine.device.last_event

        def land() -> StepOutput:
            self._machine.device.advance(event)
            return future.result(timeout=30)

        return land


def expected(request: SequenceRequest, index: int) -> tuple[list[TokenId], FinishReason]:
    """What the request's sample says on its own."""
    tokens = list(request.token_ids)
    for _ in range(request.max_tokens):
        if request.sampling.bad_words:
            token = next_token(tokens)  # the sampler is greedy, whatever the sample
            tokens.append(TokenId(0) if token == BANNED else token)
        else:
            tokens.append(next_token(tokens, index))
        if tokens[-1] == EOS:
            return tokens[len(request.token_ids) :], FinishReason.EOS
    return tokens[len(request.token_ids) :], FinishReason.LENGTH


def check(machine: Machine, seed: int) -> None:
    """Run the schedule of this number, and raise AssertionError if anybody got what is not theirs."""
    rng = random.Random(seed)
    schedule = CudaSchedule(rng.randbytes(rng.randint(8, 160)), machine)
    schedule.run()
    for (request_id, index), found in schedule.outputs.items():
        request, reason = schedule.requests[request_id], schedule.reasons[request_id, index]
        tokens, expected_reason = expected(request, index)
        if reason is FinishReason.CANCELLED:
            assert found == tokens[: len(found)], f"schedule {seed}"
        else:
            assert (found, reason) == (tokens, expected_reason), f"schedule {seed}"
        if found and request.prompt_logprobs is not None:
            scored = [score.token_ids[0] for score in schedule.scores[request_id]]
            assert scored == request.token_ids[1:], f"schedule {seed}"
    pages = schedule.cache.statistics().pages
    assert (pages.active, pages.free + pages.cached) == (0, NUM_PAGES), f"schedule {seed}"


def main() -> None:
    torch.set_num_threads(1)
    machine, count = Machine(), int(sys.argv[1])
    for seed in range(count):
        check(machine, seed)
        if seed % 1000 == 999:
            print(f"{seed + 1} schedules", flush=True)
    replays = sum(graph.num_replays for graph in machine.device.graphs)
    machine.close()
    print(f"{count} schedules, {replays} replays of graphs: all exact")


if __name__ == "__main__":
    main()
