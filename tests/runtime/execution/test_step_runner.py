"""The recorded program against the same decoder, call by call."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.interfaces.model_executor import DecodeInput, PrefillInput, SlotAssignment, StepInput, UnifiedBatch
from ferrum_rt.interfaces.sampler import SamplingConfig
from ferrum_rt.interfaces.types import RequestId, TokenId
from ferrum_rt.kernels.batch import allocate_pages
from ferrum_rt.kernels.cpu import CpuOps, NativeOps, TorchCpuOps
from ferrum_rt.runtime.execution.host_inputs import HostInputs
from ferrum_rt.runtime.execution.step_rows import lay_out
from ferrum_rt.runtime.execution.step_runner import EagerRunner, RecordedRunner, StepLogits
from ferrum_rt.runtime.loading.json_file import read_json
from ferrum_rt.runtime.models.decoder import Decoder, load_weights
from ferrum_rt.runtime.models.families import parse_config
from ferrum_rt.runtime.models.weights import CheckpointReader
from tests.checkpoints import FAMILIES, save_checkpoint
from tests.kernels.targets import needed_kernels

NUM_SLOTS, MAX_TOKENS, BLOCK_SIZE, PAGES_PER_SLOT = 4, 24, 8, 8


class Model:
    """A decoder with pages of its own, run in one of both ways."""

    def __init__(self, directory: Path, ops: CpuOps, dtype: torch.dtype, *, is_recorded: bool) -> None:
        spec = parse_config(read_json(directory / "config.json", ModelError))
        weights = load_weights(spec, CheckpointReader(directory, "cpu"), ops, dtype, 64, lambda *_: None)
        self.is_moe = spec.moe is not None
        self.decoder = Decoder(spec, weights, ops, dtype, MAX_TOKENS, NUM_SLOTS)
        self.ops = ops
        num_tokens = NUM_SLOTS * PAGES_PER_SLOT * BLOCK_SIZE
        cache = [allocate_pages(num_tokens, spec.num_kv_heads, spec.head_dim, dtype, "cpu") for _ in spec.layers]
        self.inputs = HostInputs(NUM_SLOTS, MAX_TOKENS, PAGES_PER_SLOT, BLOCK_SIZE)
        if is_recorded:
            assert isinstance(ops, NativeOps)
            self.runner: EagerRunner | RecordedRunner = RecordedRunner(self.decoder, ops, cache, self.inputs)
        else:
            self.runner = EagerRunner(self.decoder, cache, self.inputs)

    def run(self, step: StepInput) -> tuple[StepLogits, Tensor]:
        """What the runner says, and the hidden states."""
        found: list[Tensor] = []
        rows = lay_out(step.batch)
        self.inputs.take_over(step)
        self.inputs.fill(rows)
        whole = self.runner.run()
        tokens = list(whole.tokens)
        logits = whole.rows[: len(tokens)].clone()
        again = self.runner.run(lambda hidden: found.append(hidden.clone()))
        assert (list(again.tokens), again.rows[: len(tokens)].tolist()) == (tokens, logits.tolist())
        self.inputs.keep(rows.sampled_slots, tokens)
        return StepLogits(tokens, logits), found[0]


def schedule(seed: int) -> list[StepInput]:
    """Four prompts that come one after the other, in chunks, beside those that decode."""
    rng = random.Random(seed)
    prompts = [[TokenId(rng.randrange(3, 300)) for _ in range(rng.randint(1, 30))] for _ in range(NUM_SLOTS)]
    pages = list(range(NUM_SLOTS * PAGES_PER_SLOT))
    rng.shuffle(pages)
    done, assigned = [0] * NUM_SLOTS, 0
    steps = []
    for _ in range(16):
        new = []
        if assigned < NUM_SLOTS and rng.random() < 0.6:
            own = pages[assigned * PAGES_PER_SLOT : (assigned + 1) * PAGES_PER_SLOT]
            new.append(SlotAssignment(assigned, RequestId(str(assigned)), SamplingConfig(), own))
            assigned += 1
        decodes, prefills, room = [], [], MAX_TOKENS - assigned
        for slot in range(assigned):
            left = len(prompts[slot]) - done[slot]
            if left <= 0:
                decodes.append(DecodeInput(slot, done[slot]))
                done[slot] += 1
            elif room:
                count = rng.randint(1, min(left, room))
                room -= count
                chunk = prompts[slot][done[slot] : done[slot] + count]
                prefills.append(PrefillInput(slot, chunk, done[slot], sample=count == left))
                done[slot] += count
        if decodes or prefills:
            steps.append(StepInput(new, [], [], UnifiedBatch(decodes, prefills)))
        elif new:
            assigned -= 1
    return steps


def test_rounds_are_steps_one_after_the_other(tmp_path: Path) -> None:
    """Eight rounds give the tokens of eight steps, recorded and call by call, with sequences of different lengths and across
    the ends of pages."""
    kernels = needed_kernels()
    save_checkpoint("qwen3", tmp_path)
    prompts = schedule(seed=3)
    with torch.inference_mode():
        ops = NativeOps(kernels, 2)
        found = []
        for is_recorded, num_rounds in ((True, 8), (True, 1), (False, 8)):
            model = Model(tmp_path, ops, torch.float32, is_recorded=is_recorded)
            for step in prompts:
                tokens = model.run(step)[0].tokens
            decodes = prompts[-1].batch.decodes
            assert len(decodes) == NUM_SLOTS
            rounds: list[list[TokenId | None]] = [list(tokens)]
            for start in range(0, 8, num_rounds):
                items = [DecodeInput(item.slot, item.position + 1 + start) for item in decodes]
                model.inputs.fill(lay_out(UnifiedBatch(items, [])))
                rounds += [list(tokens) for tokens in model.runner.run_rounds(num_rounds)]
                model.inputs.keep([item.slot for item in decodes], rounds[-1])
            found.append(rounds)
        ops.close()
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 9


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(request.param, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_is_the_decoder_call_by_call(directory: Path, dtype: torch.dtype) -> None:
    """For each family, in steps of every mixture, the recorded program's logits are those of the same kernels called one by
    one, to the bit, whether or not somebody looks at the hidden states in between; and nearly torch's (but where experts are
    chosen by bfloat16 logits, which are equal too often)."""
    kernels = needed_kernels()
    bound = {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    with torch.inference_mode():
        first, second = NativeOps(kernels, 2), NativeOps(kernels, 2)
        recorded = Model(directory, first, dtype, is_recorded=True)
        one_by_one = Model(directory, second, dtype, is_recorded=False)
        oracle = Model(directory, TorchCpuOps(), dtype, is_recorded=False)
        for step in schedule(seed=len(directory.name)):
            ours, hidden = recorded.run(step)
            same, same_hidden = one_by_one.run(step)
            assert torch.equal(hidden, same_hidden)
            assert torch.equal(ours.rows, same.rows)
            assert list(ours.tokens) == list(same.tokens)
            if recorded.is_moe and dtype == torch.bfloat16:
                continue
            wanted, _ = oracle.run(step)
            # The next step's tokens are ours: the oracle may choose others where two are nearly equal.
            oracle.inputs.keep(lay_out(step.batch).sampled_slots, ours.tokens)
            scale = max(1.0, float(wanted.rows.abs().max())) if len(wanted.rows) else 1.0
            torch.testing.assert_close(ours.rows.float(), wanted.rows.float(), atol=bound * scale, rtol=0)
        first.close()
        second.close()
