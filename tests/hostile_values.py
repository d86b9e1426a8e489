"""Values of every kind, for arguments that expect another one, alone or inside of what they expect."""

import io
import math
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn


class _Forever:
    """Gives batches without end."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield (torch.randn(2, 3, 6, 6), torch.zeros(2, dtype=torch.int64))


FAILS: Final = "disk on fire"
"""What the error of a user's own iterable says."""


class _Raises:
    """Fails at whatever is asked of it."""

    def __iter__(self) -> Iterator[Any]:
        raise OSError(FAILS)

    def __len__(self) -> int:
        raise OSError(FAILS)


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "false": lambda: False,
    "zero": lambda: 0,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "huge": lambda: 10**30,
    "half": lambda: 0.5,
    "nan": lambda: math.nan,
    "infinite": lambda: math.inf,
    "negative": lambda: -0.5,
    "complex": lambda: 1j,
    "fraction": lambda: Fraction(1, 2),
    "numpy number": lambda: np.float32(0.5),
    "numpy integer": lambda: np.int64(3),
    "numpy nan": lambda: np.float64("nan"),
    "numpy array": lambda: np.zeros((2, 3)),
    "object array": lambda: np.array([None, "x"], dtype=object),
    "empty text": lambda: "",
    "text": lambda: "conv",
    "pattern": lambda: "[",
    "nul": lambda: "a\0b",
    "surrogate": lambda: "\udcff",
    "long text": lambda: "x" * 5000,
    "slashes": lambda: "/".join(["x" * 300] * 20),
    "folder": lambda: "/",
    "device": lambda: "/dev/null/x",
    "bytes": lambda: b"conv",
    "path": lambda: Path("nowhere"),
    "empty list": lambda: [],
    "list of none": lambda: [None],
    "list of numbers": lambda: [0.5, 1],
    "list of text": lambda: ["conv"],
    "nested": lambda: [[[[]]]],
    "endless list": lambda: _endless(),
    "set": lambda: {"conv"},
    "range": lambda: range(3),
    "generator": lambda: (number for number in range(3)),
    "empty dict": lambda: {},
    "dict": lambda: {"conv": 0.5},
    "dict of none": lambda: {None: None},
    "dict of nan": lambda: {"*": math.nan},
    "dict of lists": lambda: {"conv": [1, 2]},
    "dict of numbers": lambda: {1: 2},
    "object": object,
    "class": lambda: nn.Linear,
    "function": lambda: len,
    "file": lambda: io.StringIO("{}"),
    "lock": threading.Lock,
    "forever": _Forever,
    "raises": _Raises,
    "slice": lambda: slice(2),
    "ellipsis": lambda: ...,
    "dtype": lambda: torch.float32,
    "device object": lambda: torch.device("meta"),
    "module": lambda: nn.Linear(2, 3),
    "empty module": lambda: nn.Module(),
    "lazy module": lambda: nn.LazyLinear(3),
    "scripted module": lambda: torch.jit.script(nn.Linear(2, 3)),
    "meta module": lambda: nn.Linear(2, 3, device="meta"),
    "module list": lambda: nn.ModuleList([nn.Linear(2, 3)]),
    "parameter": lambda: nn.Parameter(torch.randn(2, 3)),
    "tensor": lambda: torch.randn(2, 3, 6, 6),
    "scalar tensor": lambda: torch.tensor(0.5),
    "empty tensor": lambda: torch.empty(0),
    "integer tensor": lambda: torch.zeros(2, 3, dtype=torch.int64),
    "meta tensor": lambda: torch.empty(2, 3, 6, 6, device="meta"),
    "sparse tensor": lambda: torch.eye(3).to_sparse(),
    "float8 tensor": lambda: torch.zeros(2, 3).to(torch.float8_e4m3fn),
    "nan tensor": lambda: torch.full((2, 3, 6, 6), math.nan),
    "tuple of sparse": lambda: (torch.eye(3).to_sparse(),),
    "tuple of float8": lambda: (torch.zeros(2, 3, 6, 6).to(torch.float8_e4m3fn),),
    "tuple of meta": lambda: (torch.empty(2, 3, 6, 6, device="meta"),),
    "tuple of nothing": lambda: (torch.empty(0, 3, 6, 6),),
    "tuple of text": lambda: ("x",),
    "tuple of object": lambda: (object(),),
    "tuple of wrong shape": lambda: (torch.randn(2, 4, 6, 6),),
    "tuple of too many": lambda: (torch.randn(2, 3, 6, 6),) * 3,
}


def _endless() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


def _entry(**keys: Any) -> list[dict[str, Any]]:
    """A config list of one entry, in which keys are other than they should be."""
    return [{"op_types": ["Conv2d"], "sparsity": 0.5} | keys]


PLACES: dict[str, Callable[[Any], Any]] = {
    "a list": lambda value: [value],
    "a tuple": lambda value: (value,),
    "a pair": lambda value: [(value, value)],
    "a mapping": lambda value: {"conv": value},
    "a key": lambda value: {value: 0.5} if getattr(type(value), "__hash__", None) else {"conv": value},
    "inputs": lambda value: {"x": value},
    "a group": lambda value: {"conv.weight[0]": value},
    "units": lambda value: {"conv.weight[0]": [value]},
    "masks": lambda value: {"fc.weight": value},
    "sizes": lambda value: {"x": {2: value}},
    "a sparsity": lambda value: _entry(sparsity=value),
    "types": lambda value: _entry(op_types=value),
    "names": lambda value: _entry(op_names=[value]),
    "an exclusion": lambda value: [*_entry(), {"exclude": value, "op_names": ["conv"]}],
    "configs": lambda value: {"pruning_configs": [value], "target_sparsity": 0.5},
    "a pattern": lambda value: {"pruning_configs": [{"op_names": ["conv"], "pattern": value}]},
    "a target": lambda value: [(torch.zeros(2, 3, 6, 6), value)],
    "a batch": lambda value: [{"x": value}],
}
"""Where in an argument a wrong value may stand, as `PLACES[place](value)`."""
