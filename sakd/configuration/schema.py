"""Keys and values of the nodes that no constructor takes.

A key that is not here is refused, with ``+`` as well; a node with a ``_target_`` has its constructor's, too.
"""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from annotated_types import Ge, Gt, Le, Lt, MinLen, doc

from sakd.ranges import (
    BatchSize,
    BelowOne,
    Count,
    Deviation,
    Epochs,
    File,
    Folder,
    Magnitude,
    Name,
    NotNegative,
    Operations,
    Percent,
    Positive,
    Rate,
    Seed,
    Share,
    Text,
    Threads,
)

Node = dict[str, Any]  # with a _target_
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Channels = Annotated[int, Ge(1), Le(2**16)]
Pixels = Annotated[int, Ge(1), Le(2**14)]  # of a side
Classes = Annotated[int, Ge(2), Le(10**7)]
Store = Annotated[str, MinLen(1), doc("a store such as sqlite:///mlflow.db or http://host:5000")]
Decay = Annotated[float, Gt(0), Lt(1)]
Part = Annotated[int, Ge(2), Le(2**31 - 1)]  # of a data set's images


class Recipe(TypedDict):
    """``dataset.recipe``: other keys' defaults."""

    epochs: NotRequired[Epochs]
    teacher_epochs: NotRequired[Epochs]
    batch_size: NotRequired[BatchSize]
    pretraining_epochs: NotRequired[Epochs]
    pretraining_lr: NotRequired[Rate]
    gamma: NotRequired[Positive]


class RandAugment(TypedDict):
    """``dataset.rand_augment``."""

    operations: Operations
    magnitude: Magnitude


class Data(TypedDict):
    """``dataset``: what it promises of its images, and what is said of its reader."""

    _target_: Any  # checked where it is imported
    name: Name
    classes: Classes
    channels: Channels
    image_size: Pixels
    mean: Annotated[list[Share], MinLen(1)] | None  # of pixels in [0, 1]; null: of the training images
    std: Annotated[list[Deviation], MinLen(1)] | None
    crop_padding: NotRequired[Annotated[int, Ge(0), Le(2**14)]]
    flip: NotRequired[bool]
    rand_augment: NotRequired[RandAugment | None]
    erasing: NotRequired[Share]
    val_fraction: BelowOne
    train_samples: Part | None
    test_samples: Part | None
    reads: NotRequired[list[str]]
    ignore_others: NotRequired[bool]
    recipe: NotRequired[Recipe | None]


class Network(TypedDict):
    """``student``."""

    _target_: Any
    name: Name
    num_classes: NotRequired[Classes]
    in_channels: NotRequired[Channels]
    image_size: NotRequired[Pixels]
    checkpoint: NotRequired[File | None]
    checkpoint_part: NotRequired[Text | None]
    pretrained: NotRequired[Text | None]


class Scheduled(TypedDict):
    """``schedule``."""

    _target_: Any
    by: NotRequired[Literal["epoch", "step"]]
    warmup_epochs: NotRequired[NotNegative]
    warmup_start: NotRequired[Share]


class Training(TypedDict):
    """``teacher.training``."""

    seed: Seed
    epochs: Epochs
    batch_size: BatchSize
    precision: Precision
    optimizer: Node
    schedule: Scheduled | None
    clip_gradients: NotRequired[Positive | None]
    accumulate: NotRequired[Count]
    checkpoint: NotRequired[File | None]
    checkpoint_part: NotRequired[Text | None]
    pretrained: NotRequired[Text | None]


class TeacherNetwork(Network):
    """``teacher``."""

    checkpoint: File | None
    min_accuracy: Percent
    training: Training


class Pretraining(TypedDict):
    """``distiller.pretraining``."""

    name: Name
    loss: NotRequired[Node | None]  # its own; else it is the one of the distiller's that ``name`` names
    distiller: NotRequired[Name]  # in a sum: whose it is
    seed: Seed
    epochs: Epochs
    batch_size: BatchSize
    optimizer: Node
    schedule: Scheduled | None
    clip_gradients: NotRequired[Positive | None]
    accumulate: NotRequired[Count]


class Reference(TypedDict):
    """``distiller.reference``: the paper."""

    method: Text
    authors: list[Text]
    title: Text
    venue: Text
    year: Count


class Losses(TypedDict):
    """``distiller``."""

    name: Name
    losses: dict[str, Node]
    reference: NotRequired[Reference | None]
    alpha: NotRequired[Annotated[float, Ge(0), Le(1e9)]]  # what losses take their weights from
    beta: NotRequired[Annotated[float, Ge(0), Le(1e9)]]
    product: NotRequired[Node | None]  # what is made of the student and the teacher, in the student's place
    pretraining: NotRequired[Pretraining | None]
    pretrains: NotRequired[Text]  # in a pretraining's own run: which of the losses


class Mode(TypedDict):
    """``spot_mode``."""

    _target_: Any
    name: Name
    optimizer: NotRequired[Node]


class Task(TypedDict):
    """``task``: what is learned from labels."""

    weight: NotNegative
    label_smoothing: BelowOne  # 1 would leave nothing of the labels
    class_weights: Annotated[list[Positive], MinLen(2)] | Literal["balanced"] | None
    mixup: NotNegative  # alpha of a Beta distribution; 0: none
    cutmix: NotNegative


class Tracking(TypedDict):
    """``tracking``."""

    name: Literal["mlflow", "none"]
    uri: NotRequired[Store]
    experiment: NotRequired[Name]
    model: NotRequired[bool]
    pictures: NotRequired[bool]
    system_metrics: NotRequired[bool]


class Whole(TypedDict):
    """The configuration of a run; what other values are copied from comes before them."""

    dataset: Data
    seed: Seed
    epochs: Epochs
    batch_size: BatchSize
    optimizer: Node
    schedule: Scheduled | None
    clip_gradients: NotRequired[Positive | None]
    accumulate: NotRequired[Count]
    precision: Precision
    task: NotRequired[Task]
    student: Network
    teacher: TeacherNetwork
    distiller: Losses
    spot_mode: Mode
    tracking: Tracking
    device: Text
    threads: Threads | None
    memory_format: Literal["auto", "contiguous", "channels_last"]
    fold_batch_norm: bool
    compile: Literal["auto", "none", "default", "graph"]
    ema: NotRequired[Decay | None]
    keep_best: NotRequired[bool]
    top5: NotRequired[bool]
    early_stop: NotRequired[Epochs | None]
    optimized_metric: NotRequired[Text | None]
    cohort: Count
    profile: bool
    record_spots: bool
    runs: Folder
