"""Instructions for the native step program; ``native/program.h`` and ``native/linear.h`` say the same in C++."""

import enum
import struct

import torch

WORDS = 24
"""Of eight bytes, in each instruction."""


class Op(enum.IntEnum):
    """Kernels."""

    PREPARE = 0
    LINEAR = 1


class Kind(enum.IntEnum):
    """What a granule of a linear layer holds."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    INT8 = 3


TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PER_GRANULE = {Kind.FLOAT32: 1, Kind.BFLOAT16: 2, Kind.FLOAT16: 2, Kind.INT8: 4}
KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}


def instruction(op: Op, dtype: torch.dtype, rows: int, *words: int) -> bytes:
    """One instruction; ``words`` are sizes and addresses, in the order of the kernel's struct."""
    filling = WORDS - 3 - len(words)
    return struct.pack(f"={WORDS}q", op, TYPES[dtype], rows, *words, *[0] * filling)
