"""Ranges of numbers, to be written where a constructor takes them: `temperature: Positive`.

Whatever a configuration gives is held to them before work begins. Upper ends that no paper comes near are
there so that a slip of the finger is found by its key and not, epochs later, by a loss that is infinite.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate, doc

LARGEST = 3.4028234e38  # that float32 holds
LARGEST_RATE = 1e6

Rate = Annotated[float, Ge(0), Le(LARGEST_RATE)]  # of learning
Finite = Annotated[float, Ge(-1e9), Le(1e9)]
NotNegative = Annotated[float, Ge(0), Le(1e9)]
Positive = Annotated[float, Gt(0), Le(1e9)]
Factor = Annotated[float, Gt(0), Le(64)]  # of widths
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Deviation = Annotated[float, Ge(1e-6), Le(1)]  # of pixels in [0, 1]
Percent = Annotated[float, Ge(0), Le(100), doc("percent, from 0 to 100")]

Natural = Annotated[int, Ge(0), Le(2**31 - 1)]
Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Width = Annotated[int, Ge(1), Le(2**16)]  # of a layer
Epochs = Annotated[int, Ge(1), Le(10**6)]
BatchSize = Annotated[int, Ge(2), Le(10**6)]
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Operations = Annotated[int, Ge(1), Le(14)]  # that RandAugment sends an image through
Magnitude = Annotated[int, Ge(0), Le(30)]  # of each of them
Processes = Annotated[int, Ge(0), Le(1024)]
Threads = Annotated[int, Ge(1), Le(1024)]  # many more end the process

Text = Annotated[str, MinLen(1)]
Name = Annotated[str, MinLen(1), doc("a name, in one line")]
File = Annotated[str, MinLen(1), doc("the path of a file")]
Folder = Annotated[str, MinLen(1), doc("the path of a folder")]


def is_sorted(values: list[float]) -> bool:
    return list(values) == sorted(values)


def in_order(kind: type) -> object:
    """Kind of lists whose values, of ``kind``, do not fall."""
    return Annotated[list[kind], Predicate(is_sorted)]
