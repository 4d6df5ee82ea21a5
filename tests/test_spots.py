"""Which stages each kind of spot pairs, for networks of equal and of unequal depth, and what cannot be
paired."""

import pytest

from sakd.errors import ConfigError
from sakd.networks import resnet8, resnet20, vgg8
from sakd.spots import Spot, all_spots, spots_at

IMAGE_SIZE = 32


@pytest.fixture(scope="module")
def networks():
    return {network.__name__: network(10, 3, IMAGE_SIZE) for network in (resnet8, resnet20, vgg8)}


@pytest.fixture
def equal(networks):
    """Student and teacher, both with three stages."""
    return networks["resnet8"], networks["resnet20"]


@pytest.fixture
def unequal(networks):
    """A student with three stages and a teacher with four."""
    return networks["resnet8"], networks["vgg8"]


def pairs(spots):
    return [(spot.student, spot.teacher) for spot in spots]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("hint", [("stage2", "stage2")]),
        ("stages", [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]),
        ("last_stage", [("stage3", "stage3")]),
        ("embedding", [("embedding", "embedding")]),
        ("logits", [("logits", "logits")]),
    ],
)
def test_kinds_for_networks_of_equal_depth(equal, where, expected):
    assert pairs(spots_at(where, *equal)) == expected


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("hint", [("stage2", "stage2")]),
        ("stages", [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")]),
        ("last_stage", [("stage3", "stage4")]),
        ("embedding", [("embedding", "embedding")]),
        ("logits", [("logits", "logits")]),
    ],
)
def test_kinds_for_networks_of_unequal_depth_whichever_is_the_deeper(unequal, where, expected):
    shallow, deep = unequal
    assert pairs(spots_at(where, shallow, deep)) == expected
    assert pairs(spots_at(where, deep, shallow)) == [(b, a) for a, b in expected]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("stage3", [("stage3", "stage3")]),
        ("stem", [("stem", "stem")]),
        ("stage3:stage4", [("stage3", "stage4")]),
        (
            ["stage1", "stage3:stage4", "embedding"],
            [("stage1", "stage1"), ("stage3", "stage4"), ("embedding", "embedding")],
        ),
        (
            ["hint", "last_stage", "logits"],
            [("stage2", "stage2"), ("stage3", "stage4"), ("logits", "logits")],
        ),
    ],
)
def test_stages_by_name_the_student_first_and_lists_of_names_and_kinds(unequal, where, expected):
    assert pairs(spots_at(where, *unequal)) == expected


def test_a_spot_has_each_networks_shape(unequal):
    assert spots_at(["stage2", "stage3:stage4", "embedding"], *unequal) == [
        Spot("stage2", "stage2", (32, 16, 16), (256, 8, 8)),
        Spot("stage3", "stage4", (64, 8, 8), (512, 4, 4)),
        Spot("embedding", "embedding", (64,), (512,)),
    ]


def test_a_spots_name_is_its_stages_where_they_agree_else_both(unequal):
    assert [spot.name for spot in spots_at(["stage2", "stage3:stage4"], *unequal)] == [
        "stage2",
        "stage3-stage4",
    ]


@pytest.mark.parametrize(
    ("where", "suggestion"),
    [
        ("embeding", "embedding"),
        ("last_stag", "last_stage"),
        ("stage33", "stage3"),
        ("hints", "hint"),
        (["logit"], "logits"),
    ],
)
def test_a_misspelled_spot_is_named_and_a_near_one_suggested(equal, where, suggestion):
    name = where if isinstance(where, str) else where[0]
    with pytest.raises(
        ConfigError, match=rf"the student \(resnet\) has no stage '{name}'.*Did you mean '{suggestion}'\?"
    ):
        spots_at(where, *equal)


@pytest.mark.parametrize("where", ["stage4", "stage4:stage3", "stage3:stage5"])
def test_a_stage_that_one_of_the_networks_lacks_is_named_with_that_network(unequal, where):
    role, family, stage = (
        ("teacher", "vgg", "stage5") if "stage5" in where else ("student", "resnet", "stage4")
    )
    with pytest.raises(
        ConfigError, match=rf"the {role} \({family}\) has no stage '{stage}'; it has stem, stage1"
    ):
        spots_at(where, *unequal)


@pytest.mark.parametrize(
    ("where", "found"), [("stage3:embedding", "stage3 and embedding"), ("logits:stem", "logits and stem")]
)
def test_a_map_beside_a_vector_is_refused(equal, where, found):
    with pytest.raises(ConfigError, match=f"found a map beside a vector .{found}."):
        spots_at(where, *equal)


@pytest.mark.parametrize("where", ["", "nothing", [""], "stage2:", "stage2:stage1:stage2"])
def test_names_that_are_no_stage_are_refused(equal, where):
    with pytest.raises(ConfigError, match="where="):
        spots_at(where, *equal)


@pytest.mark.parametrize("where", [["stage2", "stage2"], ["stages", "stage2"], ["hint", "stage2:stage2"]])
def test_a_pair_listed_twice_is_refused(equal, where):
    with pytest.raises(ConfigError, match="expected each stage once"):
        spots_at(where, *equal)


def test_all_spots_are_distinct_in_order_of_depth_with_the_logits_last(unequal):
    used = spots_at(["embedding", "stage2", "stage3:stage4", "stage1"], *unequal) + spots_at(
        "stage2", *unequal
    )
    expected = ["stage1", "stage2", "stage3-stage4", "embedding", "logits"]
    assert [spot.name for spot in all_spots(used, *unequal)] == expected


@pytest.mark.parametrize("used", [[], ["logits"]])
def test_the_logits_are_a_spot_once_whether_asked_for_or_not(equal, used):
    spots = spots_at(used, *equal) if used else []
    assert all_spots(spots, *equal) == spots_at("logits", *equal)


@pytest.mark.parametrize(
    ("used", "named"),
    [
        pytest.param(["stage1:stage3", "stage2"], "stage1-stage3 and stage2", id="crossing"),
        pytest.param(["stage1", "stage1:stage2"], "stage1 and stage1-stage2", id="student-stage-twice"),
        pytest.param(["stage1:stage2", "stage2"], "stage1-stage2 and stage2", id="teacher-stage-twice"),
        pytest.param(["embedding:logits"], "embedding-logits and logits", id="teacher-logits-twice"),
    ],
)
def test_spots_that_no_sample_can_be_routed_through_in_order_are_refused(equal, used, named):
    with pytest.raises(
        ConfigError,
        match=f"spots {named}: expected stages in the same order in both networks, each used once",
    ):
        all_spots(spots_at(used, *equal), *equal)
