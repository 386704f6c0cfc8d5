"""Reading weights: safetensors files, memory-mapped, or random numbers.

Every tensor a model needs is looked up in the files' headers, with its shape, before the first one is read.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ferrum_rt.interfaces.errors import ModelError
from ferrum_rt.runtime.models.families import Part

# What weights are stored as, by safetensors' names. Anything else is quantized, and nonsense without its scales.
_DTYPES = ("F64", "F32", "F16", "BF16")


class WeightReader(Protocol):
    """Where weights come from."""

    def check(self, parts: Iterable[Part]) -> None:
        """Raise ModelError unless every tensor is there with its shape."""
        ...

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        """The part's tensors, one below the other, in memory of their own."""
        ...

    def read_scale(self, names: Sequence[str]) -> float | None:
        """The first of these tensors that is there, a positive number. Raises ModelError for anything else."""
        ...


class CheckpointReader:
    """A directory with model.safetensors, or with shards and their index. Files are mapped and go straight to ``device``."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self._device = device
        self._files: dict[Path, Any] = {}
        self._where = self._locate(directory)

    def check(self, parts: Iterable[Part]) -> None:
        for part in parts:
            for name, shape in zip(part.names, part.shapes, strict=True):
                path = self._where.get(name)
                if path is None:
                    listed = ", ".join(sorted({file.name for file in self._files}))
                    raise ModelError(f"{listed}: the tensor {name!r} is missing")
                try:
                    header = self._files[path].get_slice(name)
                except SafetensorError as error:
                    raise ModelError(f"{path}: the tensor {name!r} is listed in the index but not here") from error
                found = tuple(header.get_shape())
                if found != shape:
                    raise ModelError(f"{path}: the tensor {name!r} has shape {list(found)}, expected {list(shape)}")
                if header.get_dtype() not in _DTYPES:
                    raise ModelError(
                        f"{path}: the tensor {name!r} is of type {header.get_dtype()}, expected one of {', '.join(_DTYPES)}"
                    )

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        rows = sum(shape[0] for shape in part.shapes)
        result = torch.empty((rows, *part.shapes[0][1:]), dtype=dtype, device=self._device)
        row = 0
        for name, shape in zip(part.names, part.shapes, strict=True):
            result[row : row + shape[0]].copy_(self._files[self._where[name]].get_tensor(name))
            row += shape[0]
        return result

    def read_scale(self, names: Sequence[str]) -> float | None:
        name = next((name for name in names if name in self._where), None)
        if name is None:
            return None
        path = self._where[name]
        try:
            values = self._files[path].get_tensor(name).double().flatten().tolist()
        except SafetensorError as error:
            raise ModelError(f"{path}: the tensor {name!r} is listed in the index but not here") from error
        if len(values) != 1 or not 0 < values[0] < math.inf:
            raise ModelError(f"{path}: the tensor {name!r} is no scale: expected one positive number, found {values[:4]}")
        return float(values[0])

    def _locate(self, directory: Path) -> dict[str, Path]:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            try:
                listed = json.loads(index.read_bytes())["weight_map"]
                where = {str(name): directory / str(file) for name, file in listed.items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ModelError(f"{index}: not a valid index of shards: {error!r}") from error
            for path in sorted(set(where.values())):
                if path.parent != directory:
                    raise ModelError(f"{index}: the shard {path} lies outside the model's directory")
                self._open(path)
            return where
        path = directory / "model.safetensors"
        return dict.fromkeys(self._open(path), path)

    def _open(self, path: Path) -> list[str]:
        if not path.is_file():
            raise ModelError(f"{path}: no such file; weights are read from safetensors alone")
        try:
            self._files[path] = file = safe_open(path, framework="pt")
            return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or truncated safetensors file: {error}") from error


class DummyReader:
    """Random weights of any shape, the same at each run; norms are 1 so that activations stay in range. The numbers repeat
    after a prime count, which no row length divides: drawing a billion of them would take a minute."""

    def __init__(self, norm_offset: float, device: str = "cpu") -> None:
        self._norm, self._device = 1.0 - norm_offset, device
        self._numbers = torch.empty(1_000_003).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))

    def check(self, parts: Iterable[Part]) -> None:
        pass

    def read_scale(self, names: Sequence[str]) -> float | None:
        return None

    def read(self, part: Part, dtype: torch.dtype) -> Tensor:
        shape = (sum(shape[0] for shape in part.shapes), *part.shapes[0][1:])
        if part.names[0].endswith("norm.weight"):
            return torch.full(shape, self._norm, dtype=dtype, device=self._device)
        numbers = self._numbers.to(self._device, dtype)
        result = torch.empty(math.prod(shape), dtype=dtype, device=self._device)
        for piece in result.split(len(numbers)):
            piece.copy_(numbers[: len(piece)])
        return result.view(shape)
