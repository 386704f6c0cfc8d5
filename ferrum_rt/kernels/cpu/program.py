"""Instructions for the native step program; ``native/program.h`` and the headers beside it say the same in C++."""

import ctypes
import enum
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

WORDS = 24
"""Of eight bytes, in each instruction."""


class Op(enum.IntEnum):
    """Kernels."""

    PREPARE = 0
    LINEAR = 1
    GATHER = 2
    RMS_NORM = 3
    QK_NORM_ROPE = 4
    GATED_ACTIVATION = 5
    SOFT_CAP = 6
    ARGMAX = 7
    APPEND = 8
    PLAN = 9
    ATTENTION = 10
    ROUTE = 11
    GROUP = 12
    EXPERTS_LINEAR = 13
    COMBINE = 14
    ADVANCE = 15
    DRAW = 16


class Kind(enum.IntEnum):
    """What a granule of a linear layer holds."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3


ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}
PER_GRANULE = {Kind.FLOAT32: 1, Kind.BFLOAT16: 2, Kind.FLOAT16: 2, Kind.INT8: 4}
KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}


class Rows(enum.IntEnum):
    """Numbers of rows that each batch has its own of. Four less is twice as many, and so on."""

    TOKENS = -1
    SAMPLED = -2
    SPANS = -3

    def times(self, count: int) -> int:
        return self - 4 * (count - 1)


class BatchSizes(NamedTuple):
    """What ``Rows`` stand for in one step."""

    tokens: int
    sampled: int
    spans: int


class Program:
    """Instructions to be run one after the other."""

    def __init__(self, instructions: Sequence[bytes]) -> None:
        self.length = len(instructions)
        self._words = ctypes.create_string_buffer(b"".join(instructions))
        self.address = ctypes.addressof(self._words)


def instruction(op: Op, dtype: torch.dtype, rows: int, *words: int | float) -> bytes:
    """One instruction; ``words`` are sizes, addresses and numbers, in the order of the kernel's struct."""
    given = (struct.pack("=d" if isinstance(word, float) else "=q", word) for word in words)
    packed = struct.pack("=3q", op, TYPES[dtype], rows) + b"".join(given)
    return packed.ljust(8 * WORDS, b"\0")
