"""Stand-ins for the kernels that need a GPU: attention for graphs and a draw that waits for nothing, in plain torch; and a
decoder whose answers are exact, for random schedules."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ferrum_rt.interfaces.sampler import GREEDY_BELOW
from ferrum_rt.interfaces.tensor import AttentionKind, KvLayer
from ferrum_rt.interfaces.types import DataType, Device, ModelId, ModelInfo, ModelType
from ferrum_rt.kernels.attention import AttentionGroup, attend
from ferrum_rt.kernels.batch import KvPages, TokenBatch
from ferrum_rt.kernels.cuda.attention import AttentionCall, AttentionGaps
from ferrum_rt.kernels.cuda.sampling import DrawForm, DrawParams
from ferrum_rt.kernels.reference import ReferenceOps
from ferrum_rt.kernels.sampling import argmax, draw, uniform, workspace
from tests.fakes.device import EmulatedDevice
from tests.fakes.memory import VOCABULARY

_PRIME, _FACTOR, _FIRST = 1_000_003, 31, 17  # as in tests.fakes.memory


class StandInDecodeAttention:
    """As FlashInfer plans: on the host into pinned memory, from there in the stream to where the graph reads it. ``plan`` is
    the rows of the keys [rows, length] and how many of them count [rows]."""

    def __init__(self, device: EmulatedDevice, num_rows: int, max_pages: int, block_size: int) -> None:
        self.plan = (
            torch.zeros((num_rows, max_pages * block_size), dtype=torch.int64),
            torch.zeros(num_rows, dtype=torch.int64),
        )
        self.num_plans = 0
        self._device, self._block_size = device, block_size
        self._pinned = device.pinned(2 * num_rows, torch.int64)
        self._staging = self._pinned.numpy()
        self._words = torch.zeros(2 * num_rows, dtype=torch.int64)

    def replan(self, slots: Sequence[int], num_tokens: Sequence[int], block_tables: Tensor) -> None:
        assert not self._device.is_capturing, "a plan is no part of a graph"
        kv_slots, lengths = self.plan
        assert len(slots) == len(num_tokens) == len(lengths)
        self.num_plans += 1
        self._staging[:] = [*slots, *num_tokens]
        self._device.copy(self._words, self._pinned)
        at = torch.arange(kv_slots.shape[1])
        tables = block_tables[self._words[: len(slots)]]
        kv_slots.copy_(tables[:, at // self._block_size] * self._block_size + at % self._block_size)
        lengths.copy_(self._words[len(slots) :])


class StandInOps(ReferenceOps):
    """ReferenceOps that can be captured: what a graph cannot hold is worked out from the plan in each layer."""

    def __init__(self, device: EmulatedDevice, block_size: int) -> None:
        super().__init__("cpu")
        self.decode_attentions: dict[int, StandInDecodeAttention] = {}
        self._device, self._block_size = device, block_size

    def decode_attention(self, num_rows: int, max_pages: int, kinds: Sequence[AttentionKind]) -> StandInDecodeAttention:
        made = StandInDecodeAttention(self._device, num_rows, max_pages, self._block_size)
        self.decode_attentions[num_rows] = made
        return made

    def attention(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        if isinstance(plan, AttentionGaps):
            plan.keep(AttentionCall(out, q, layer, kind))
        else:
            self.attend(out, q, layer, plan, kind)

    def attend(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        if isinstance(plan, tuple):
            kv_slots, lengths = plan
            distance = lengths[:, None, None] - 1 - torch.arange(kv_slots.shape[1])
            # As elsewhere, padding reads the sequence's own first token.
            plan = [AttentionGroup(None, kv_slots.where(distance[:, 0] >= 0, kv_slots[:, :1]), distance)]
        attend(out, q, layer, plan, kind)


def draw_stand_in(logits: Tensor, params: DrawParams, form: DrawForm) -> Tensor:
    """Greedy rows and rows of the whole vocabulary just as BatchSampler draws them; where top_k, top_p or min_p cut, from
    what they leave, as far as the form goes. -1 for a row without a finite maximum."""
    num_rows, vocab_size = logits.shape
    x = workspace(num_rows, vocab_size, "cpu")
    x[:, :vocab_size] = logits
    highest, likeliest = argmax(x)
    is_sound = highest.isfinite()
    is_greedy = params.temperature <= GREEDY_BELOW if form > DrawForm.GREEDY else torch.ones(num_rows, dtype=torch.bool)
    temperature = torch.where(is_greedy, 1.0, params.temperature)
    x = torch.where(is_sound[:, None], x, 0.0)
    ordered, _ = torch.sort(x / temperature[:, None], dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    rank = torch.arange(x.shape[1])
    limit = torch.where(params.top_k > 0, params.top_k, x.shape[1])
    # The last that is kept says what every kept one must reach; where nothing is cut, everything is kept.
    is_kept = (rank < limit[:, None]) & (probs.cumsum(-1) - probs < params.top_p[:, None])
    is_kept &= probs >= params.min_p[:, None] * probs[:, :1]
    least = ordered.gather(1, is_kept.sum(-1, keepdim=True) - 1) * temperature[:, None]
    is_whole = (params.top_k <= 0) & (params.top_p >= 1) | (form < DrawForm.TRUNCATED)
    is_whole &= params.min_p <= 0
    x = torch.where(is_whole[:, None] | (x >= least), x, -math.inf)
    drawn = draw(x, torch.where(is_sound, highest, 0.0), temperature, params.draws)
    return torch.where(is_sound, torch.where(is_greedy, likeliest, drawn), -1)


# The numbers that samples with a seed of 0 are drawn by, in order, and whose each is.
_NUM_SAMPLES = 8
_DRAWS, _order = uniform(torch.tensor(0), torch.arange(1024)[:, None], torch.arange(_NUM_SAMPLES)).flatten().sort()
_SAMPLES = _order % _NUM_SAMPLES


def draw_by_sample(logits: Tensor, params: DrawParams, form: DrawForm) -> Tensor:
    """For the TokenDecoder: what tests.fakes.memory answers for each sample, which its number tells."""
    at = torch.searchsorted(_DRAWS, params.draws).clamp(max=len(_DRAWS) - 1)
    samples = torch.where(_DRAWS[at] == params.draws, _SAMPLES[at], 0)
    return (logits.argmax(-1) + 13 * samples) % VOCABULARY


class TokenOps(StandInOps):
    """For the TokenDecoder: ``out`` [N] is a number for all the tokens that a row can see."""

    def __init__(self, device: EmulatedDevice, max_len: int, block_size: int) -> None:
        super().__init__(device, block_size)
        self._powers = torch.tensor([pow(_FACTOR, power, _PRIME) for power in range(max_len + 1)])

    def attend(self, out: Tensor, q: Tensor, layer: KvLayer[Tensor], plan: Any, kind: AttentionKind) -> None:
        kv_slots, lengths = plan
        known = layer.data[kv_slots, 0]
        after = lengths[:, None] - 1 - torch.arange(known.shape[1])
        weights = self._powers[after.clamp(min=0)].where(after >= 0, 0)
        # What lies behind the sequence is somebody else's, and may be anything.
        known = known.where(after >= 0, 0)
        out.copy_(((known + 1) * weights % _PRIME).sum(-1) + _FIRST * self._powers[lengths])


class TokenDecoder:
    """Keeps token ids in the pages, int64 [tokens, 1], and reads the whole sequence back to answer: the likeliest token is
    ``next_token`` of tests.fakes.memory. ``sees`` is told each batch that is planned. Like kernels that are compiled at
    their first use, it cannot be captured before it has run."""

    attention_kinds: tuple[AttentionKind, ...] = ()

    def __init__(self, device: EmulatedDevice, ops: TokenOps, max_rows: int, block_size: int) -> None:
        self._device, self._ops, self._compiled_for = device, ops, set[int]()
        self._embedding = torch.arange(VOCABULARY)
        self._kind = AttentionKind(1, 1, 1, 1.0)
        self._block_size = block_size
        self._logits = torch.zeros((max_rows, VOCABULARY))
        self.sees: Callable[[TokenBatch], None] = lambda batch: None

    def plan_attention(self, batch: TokenBatch) -> Any:
        """A row for each query, as in a plan for decodes."""
        self.sees(batch)
        slots = torch.tensor([span.slot for span in batch.spans for _ in range(span.num_tokens)])
        tables = batch.block_tables[slots]
        at = torch.arange(tables.shape[1] * self._block_size)
        lengths = batch.positions[: len(slots)] + 1
        return tables[:, at // self._block_size] * self._block_size + at % self._block_size, lengths

    def forward(self, batch: TokenBatch, plan: Any, cache: list[KvPages]) -> Tensor:
        num_tokens = len(batch.token_ids)
        assert num_tokens in self._compiled_for or not self._device.is_capturing, "compiled while it is captured"
        self._compiled_for.add(num_tokens)
        embedded = self._embedding.index_select(0, batch.token_ids)  # a token that is none is an error here
        cache[0].data.index_copy_(0, batch.kv_slots, embedded[:, None])
        seen = torch.empty_like(embedded)
        self._ops.attention(seen, embedded, cache[0], plan, self._kind)
        return seen % _PRIME

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        state = hidden.index_select(0, rows) % VOCABULARY
        logits = self._logits[: len(rows)]
        logits.zero_()
        return logits.scatter_(1, state[:, None], 100.0)


def token_model_info(max_model_len: int) -> ModelInfo:
    """Of a model that is a ``TokenDecoder``."""
    return ModelInfo(
        id=ModelId("tokens"),
        type=ModelType.LLAMA,
        num_parameters=0,
        num_layers=1,
        hidden_size=1,
        vocab_size=VOCABULARY,
        max_model_len=max_model_len,
        dtype=DataType.FLOAT32,
        device=Device.CUDA,
    )
