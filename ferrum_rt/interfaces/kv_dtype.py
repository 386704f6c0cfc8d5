"""Element types of the KV cache, chosen apart from the weights' type."""

import enum
from typing import ClassVar


class KvDtypeKind(enum.StrEnum):
    """Names as users write them. ``float32`` is for tests."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FP8 = "fp8"
    INT8 = "int8"


class KvDtype:
    """What a page pool must know of its element type. ``scale_bytes`` are kept beside the elements of one head of one
    token."""

    kind: ClassVar[KvDtypeKind]
    itemsize: ClassVar[int]
    scale_bytes: ClassVar[int] = 0


class KvFp32(KvDtype):
    """IEEE single precision."""

    kind = KvDtypeKind.FLOAT32
    itemsize = 4


class KvBf16(KvDtype):
    """bfloat16."""

    kind = KvDtypeKind.BFLOAT16
    itemsize = 2


class KvFp16(KvDtype):
    """IEEE half precision."""

    kind = KvDtypeKind.FLOAT16
    itemsize = 2


class KvFp8(KvDtype):
    """e4m3 (OCP 8-bit floating point, "fn" variant), saturating at ±448."""

    kind = KvDtypeKind.FP8
    itemsize = 1


class KvInt8(KvDtype):
    """Symmetric int8 with one float32 scale per token and head."""

    kind = KvDtypeKind.INT8
    itemsize = 1
    scale_bytes = 4


KV_DTYPES: dict[KvDtypeKind, type[KvDtype]] = {cls.kind: cls for cls in (KvFp32, KvBf16, KvFp16, KvFp8, KvInt8)}
