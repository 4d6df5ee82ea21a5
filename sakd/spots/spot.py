"""Spots: the places where a student is compared with its teacher, and where the two are grafted together."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from sakd.errors import ConfigError, did_you_mean
from sakd.networks import Shape, StagedNet

KINDS = ("hint", "stages", "last_stage", "embedding", "logits")


class Spot(NamedTuple):
    """A stage of the student and one of the teacher, with the shapes of their outputs for one sample."""

    student: str
    teacher: str
    student_shape: Shape
    teacher_shape: Shape

    @property
    def name(self) -> str:
        """Name of the spot: ``stage2``, or ``stage3-stage4`` where the two stages' names differ."""
        return self.student if self.student == self.teacher else f"{self.student}-{self.teacher}"


def spots_at(where: str | Sequence[str], student: StagedNet, teacher: StagedNet) -> list[Spot]:
    """The spots of a kind, in order of depth.

    ``hint`` (stage 2 of both), ``stages`` (stage 1 … of the shallower, pairwise by index), ``last_stage``
    (the last map of each), ``embedding``, ``logits``; or stages by name: ``stage3``, ``stage3:stage4``
    (student:teacher); or a list of such.

    Raises ConfigError if ``where`` is none of these, a network lacks the stage, or a map would be paired with
    a vector.
    """
    kinds = {
        "hint": [("stage2", "stage2")],
        "stages": list(zip(student.maps, teacher.maps)),  # noqa: B905, the shallower network ends the list
        "last_stage": [(student.maps[-1], teacher.maps[-1])],
    }
    pairs = [
        pair
        for name in _names(where)
        for pair in kinds.get(name, [(name.split(":")[0], name.split(":")[-1])])
    ]
    if len(set(pairs)) < len(pairs):
        raise ConfigError(f"where={where}: expected each stage once")
    return [_spot(pair, where, student, teacher) for pair in pairs]


def _names(where: object) -> Sequence[str]:
    names = [where] if isinstance(where, str) else where
    listed = isinstance(names, Sequence) and len(names) > 0
    if not listed or not all(isinstance(name, str) and name.count(":") < 2 for name in names):
        raise ConfigError(
            f"where={where}: expected one of {', '.join(KINDS)}, a stage, student:teacher stages, or a "
            "list of such"
        )
    return names


def _spot(pair: tuple[str, str], where: object, student: StagedNet, teacher: StagedNet) -> Spot:
    for role, stage, network in zip(("student", "teacher"), pair, (student, teacher), strict=True):
        if stage not in network.names:
            options = [*KINDS, *network.names]
            raise ConfigError(
                f"where={where}: the {role} ({network.family}) has no stage '{stage}'; it has "
                f"{', '.join(network.names)}, and kinds of spot are "
                f"{', '.join(KINDS)}.{did_you_mean(stage, options)}"
            )
    shapes = student.shapes[pair[0]], teacher.shapes[pair[1]]
    if len(shapes[0]) != len(shapes[1]):
        raise ConfigError(
            f"where={where}: found a map beside a vector ({pair[0]} and {pair[1]}), expected two of a kind"
        )
    return Spot(*pair, *shapes)


def all_spots(spots: Iterable[Spot], student: StagedNet, teacher: StagedNet) -> list[Spot]:
    """Distinct spots in order of depth, with the logits as the last.

    Raises ConfigError if the order differs between the networks: a sample could not be routed through both.
    """
    logits = spots_at("logits", student, teacher)
    ordered = sorted(
        {*spots, *logits}, key=lambda spot: (student.index(spot.student), teacher.index(spot.teacher))
    )
    for before, after in pairwise(ordered):
        ascending = student.index(before.student) < student.index(after.student)
        if not ascending or teacher.index(before.teacher) >= teacher.index(after.teacher):
            raise ConfigError(
                f"spots {before.name} and {after.name}: expected stages in the same order in both "
                "networks, each used once"
            )
    return ordered
