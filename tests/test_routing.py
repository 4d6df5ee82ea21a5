"""The routed network, the spot modes that choose its routes, and what they must leave untouched in a run."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sakd.data import Augmentation, Dataset, ImageSet, train_batches
from sakd.distillers import AT, KD, PKT, SP, FitNet
from sakd.errors import ConfigError
from sakd.networks import StagedNet, resnet8, resnet20, vgg8
from sakd.spots import (
    Adaptive,
    Anti,
    Fixed,
    Grafts,
    Random,
    adapter,
    all_spots,
    frozen_alias,
    router_loss,
    spots_at,
    straight_through_gumbel,
)
from sakd.streams import initialising, stream
from sakd.training import Teacher, Trainer, spots_of
from tests.conftest import fit, take_step

BATCH, CLASSES = 6, 4
PAIRS = {
    "equal-depth": (resnet8, resnet20),
    "deeper-teacher": (resnet8, vgg8),
    "deeper-student": (vgg8, resnet8),
}
PLACES = {
    "hint": ["hint"],
    "stages": ["stages"],
    "last_stage": ["last_stage"],
    "embedding": ["embedding"],
    "logits": ["logits"],
    "several": ["stage1", "hint", "last_stage", "embedding"],
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(network):
    """For 8x8 images of one channel, in 4 classes."""
    return network(CLASSES, 1, 8)


@cache
def settled(network):
    """In float64, in eval, with running statistics that are not those of a fresh network."""
    with initialising(0, network.__name__), torch.no_grad():
        network = make(network).double().train()
        network(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    return network.eval().requires_grad_(False)


def spots_for(places, student, teacher):
    return all_spots(
        [spot for where in places for spot in spots_at(where, student, teacher)], student, teacher
    )


class Routed:
    """A pair of networks with grafts, a batch, and what is known of it without grafts."""

    def __init__(self, student, teacher, places):
        self.student, self.teacher = settled(student), settled(teacher)
        self.spots = spots_for(places, self.student, self.teacher)
        self.grafts = Grafts(self.spots).double()
        self.images = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            self.teacher_features = self.teacher.features(self.images)
            self.student_logits = self.student(self.images)

    def logits(self, route):
        return self.grafts(self.student, self.teacher, self.images, self.teacher_features, route)

    def straight_line(self, route):
        """Logits stage by stage and sample by sample: after each spot a sample goes on from where its route
        says."""

        def run(network, before, upto, sample):
            first = 0 if before is None else network.names.index(before) + 1
            for name in network.names[first : network.names.index(upto) + 1]:
                sample = getattr(network, name)(sample)
            return sample

        student_ways = teacher_ways = self.images.split(1)
        before_s = before_t = None
        for k, spot in enumerate(self.spots):
            f_s = [run(self.student, before_s, spot.student, sample) for sample in student_ways]
            f_t = [run(self.teacher, before_t, spot.teacher, sample) for sample in teacher_ways]
            before_s, before_t = spot.student, spot.teacher
            chosen = [bool(choice) for choice in route[:, k]]
            if k == len(self.spots) - 1:
                return torch.cat(
                    [t if teacher else s for s, t, teacher in zip(f_s, f_t, chosen, strict=True)]
                )
            # The adapters' batch norm is in train mode: it sees all samples, also those that go another way.
            h = self.grafts.to_teacher[k](torch.cat(f_s)).split(1)
            a = self.grafts.to_student[k](torch.cat(f_t)).split(1)
            teacher_ways = [f_t[i] if chosen[i] else h[i] for i in range(BATCH)]
            student_ways = [a[i] if chosen[i] else f_s[i] for i in range(BATCH)]
        raise AssertionError("no spot")


@pytest.fixture(params=PAIRS, scope="module")
def pair(request):
    return PAIRS[request.param]


@pytest.fixture(params=PLACES, scope="module")
def routed(request, pair):
    torch.manual_seed(0)
    return Routed(*pair, PLACES[request.param])


# ---- the routed network


def test_all_through_the_teacher_gives_the_teachers_logits(routed):
    route = torch.ones(BATCH, len(routed.spots), dtype=torch.float64)
    assert torch.equal(routed.logits(route), routed.teacher_features["logits"])


def test_all_through_the_student_gives_the_students_logits(routed):
    route = torch.zeros(BATCH, len(routed.spots), dtype=torch.float64)
    assert torch.equal(routed.logits(route), routed.student_logits)


def test_mixed_routes_give_what_each_sample_gets_on_its_own_way(routed):
    spots = len(routed.spots)
    route = torch.stack([(torch.arange(BATCH) >> k) % 2 for k in range(spots)], dim=1).double()
    for choices in (route, 1 - route, route.roll(1, 0)):
        with torch.no_grad():
            assert_close(routed.logits(choices), routed.straight_line(choices), rtol=1e-9, atol=1e-11)


def test_a_route_between_0_and_1_mixes_features_and_logits(pair):
    routed = Routed(*pair, ["hint"])
    a, b = torch.rand(BATCH, dtype=torch.float64), torch.rand(BATCH, dtype=torch.float64)
    (to_teacher,), (to_student,) = routed.grafts.to_teacher, routed.grafts.to_student
    with torch.no_grad():
        f_s = routed.student.stage2(routed.student.stage1(routed.student.stem(routed.images)))
        f_t = routed.teacher_features["stage2"]
        weight = a[:, None, None, None]
        s, t = (1 - weight) * f_s + weight * to_student(f_t), (1 - weight) * to_teacher(f_s) + weight * f_t
        for name in routed.student.names[3:]:
            s = getattr(routed.student, name)(s)
        for name in routed.teacher.names[3:]:
            t = getattr(routed.teacher, name)(t)
        expected = (1 - b[:, None]) * s + b[:, None] * t
        assert_close(routed.logits(torch.stack([a, b], dim=1)), expected, rtol=1e-9, atol=1e-11)


# ---- adapters


@pytest.mark.parametrize(
    ("size_in", "size_out", "convolution", "kernel", "stride"),
    [
        (8, 8, nn.Conv2d, 1, 1),
        (8, 4, nn.Conv2d, 3, 2),
        (4, 8, nn.ConvTranspose2d, 4, 2),
        (2, 1, nn.Conv2d, 3, 2),
        (1, 2, nn.ConvTranspose2d, 4, 2),
        (8, 2, nn.Conv2d, None, None),
        (2, 8, nn.ConvTranspose2d, None, None),
        (7, 3, nn.Conv2d, None, None),
        (3, 7, nn.ConvTranspose2d, None, None),
        (7, 4, nn.Conv2d, None, None),
        (4, 7, nn.ConvTranspose2d, None, None),
    ],
)
def test_an_adapter_of_maps_fits_both_shapes(size_in, size_out, convolution, kernel, stride):
    layers = adapter((5, size_in, size_in), (3, size_out, size_out))
    assert [type(layer) for layer in layers] == [convolution, nn.BatchNorm2d, nn.ReLU]
    assert kernel is None or (layers[0].kernel_size, layers[0].stride) == ((kernel, kernel), (stride, stride))
    assert layers(torch.randn(2, 5, size_in, size_in)).shape == (2, 3, size_out, size_out)


def test_an_adapter_of_vectors_is_linear():
    layer = adapter((5,), (3,))
    assert isinstance(layer, nn.Linear)
    assert layer(torch.randn(2, 5)).shape == (2, 3)


@pytest.mark.parametrize("shapes", [((5, 8, 8), (3,)), ((5,), (3, 8, 8))])
def test_no_adapter_joins_a_map_and_a_vector(shapes):
    with pytest.raises(ConfigError, match="no adapter between a map and a vector"):
        adapter(*shapes)


# ---- the frozen alias


def test_the_alias_sees_every_change_of_the_network_at_once():
    network = make(resnet8).train()
    alias = frozen_alias(network)
    images = torch.randn(BATCH, 1, 8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    before = alias(images)
    network(images).square().sum().backward()
    optimizer.step()
    after = alias(images)
    assert not torch.equal(after, before)
    assert_close(after, deepcopy(network).eval()(images), rtol=0, atol=0)
    network.load_state_dict(make(resnet8).state_dict())
    assert_close(alias(images), deepcopy(network).eval()(images), rtol=0, atol=0)
    for (name, tensor), (alias_name, alias_tensor) in zip(
        network.state_dict().items(), alias.state_dict().items(), strict=True
    ):
        assert (name, tensor.data_ptr()) == (alias_name, alias_tensor.data_ptr())


def test_a_training_pass_of_the_network_moves_the_aliass_statistics():
    network = make(resnet8).train()
    alias = frozen_alias(network)
    before = deepcopy(alias.stem[1].running_mean)
    network(torch.randn(BATCH, 1, 8, 8))
    assert not torch.equal(alias.stem[1].running_mean, before)
    assert alias.stem[1].running_mean.data_ptr() == network.stem[1].running_mean.data_ptr()


def test_the_alias_stays_in_eval_without_gradients_and_the_network_as_it_was():
    network = make(resnet8)
    alias = frozen_alias(network)
    network.train()
    assert not any(module.training for module in alias.modules())
    assert not any(parameter.requires_grad for parameter in alias.parameters())
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_routed_pass_through_the_alias_leaves_the_students_statistics_and_gradients(pair):
    student, teacher = make(pair[0]).train(), make(pair[1]).eval().requires_grad_(False)
    grafts = Grafts(spots_for(["stages", "embedding"], student, teacher))
    images = torch.randn(BATCH, 1, 8, 8)
    route = torch.rand(BATCH, len(grafts.spots)).round().requires_grad_()
    before = deepcopy(student.state_dict())
    grafts(frozen_alias(student), teacher, images, teacher.features(images), route).square().sum().backward()
    assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert route.grad.abs().sum(0).gt(0).all()


# ---- spot modes


def features(student, teacher, batch=BATCH):
    """Random embeddings and logits of both networks, as a policy sees them."""
    return [
        {name: torch.randn(batch, *network.shapes[name]) for name in ("embedding", "logits")}
        for network in (student, teacher)
    ]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def adaptive(student, teacher, places=("hint",), kind=Adaptive, bias=(10.0, 0.0), gamma=1.0):
    return kind(
        spots_for(places, student, teacher),
        student,
        teacher,
        temperature=5.0,
        gamma=gamma,
        same_family_bias=bias[0],
        other_family_bias=bias[1],
    )


def routed_by(mode, stream, student_features, teacher_features):
    """The routes that a mode draws from ``stream``."""
    mode.prepare(torch.arange(CLASSES), CLASSES, stream)
    return mode.route(student_features, teacher_features)


def test_fixed_keeps_all():
    student, teacher = make(resnet8), make(resnet20)
    mode = Fixed(spots_for(["hint"], student, teacher), student, teacher)
    keep = mode.keep(routed_by(mode, generator(), *features(student, teacher)))
    assert torch.equal(keep, torch.ones(BATCH, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("p", "rates"),
    [
        (0.3, [0.3, 0.3]),
        ({"logits": 0.1, "stage2": 0.9}, [0.9, 0.1]),
        ({"stage2": 1.0, "logits": 0.5}, [1.0, 0.5]),
        (0, [0.0, 0.0]),
    ],
)
def test_random_keeps_each_spot_at_its_own_rate_independently(p, rates):
    student, teacher, draws = make(resnet8), make(resnet20), 20_000
    mode = Random(spots_for(["hint"], student, teacher), student, teacher, p=p)
    keep = mode.keep(routed_by(mode, generator(), *features(student, teacher, draws))).double()
    expected = torch.tensor([*rates, rates[0] * rates[1]], dtype=torch.float64)
    measured = torch.stack([*keep.mean(0), keep.prod(1).mean()])
    assert (measured - expected).abs().le(5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_random_has_each_epoch_s_rate_where_they_are_listed():
    student, teacher = make(resnet8), make(resnet20)
    mode = Random(spots_for(["hint"], student, teacher), student, teacher, {"stage2": [0, 1, 0], "logits": 1})
    shares = []
    for epoch in (1, 2, 3):
        mode.begin_epoch(epoch)
        keep = mode.keep(routed_by(mode, generator(), *features(student, teacher, 50)))
        shares.append(keep.double().mean(0).tolist())
    assert shares == [[0, 1], [1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("p", "found"),
    [
        (1.5, "found 1.5 at stage2"),
        ({"stage2": [0.5, 2], "logits": 0.5}, "found 2 at stage2"),
        ({"stage2": [], "logits": 0.5}, r"found \[\] at stage2"),
        (-0.1, "found -0.1 at stage2"),
        ("half", "found 'half' at stage2"),
        (None, "found None at stage2"),
        ({"stage2": 0.5, "logits": 2}, "found 2 at logits"),
        ({"stage2": 0.5}, r"found \['stage2'\]"),
        ({"stage2": 0.5, "logits": 0.5, "stage1": 0.5}, r"found \['logits', 'stage1', 'stage2'\]"),
        ({"stage2": 0.5, "logit": 0.5}, r"found \['logit', 'stage2'\]"),
    ],
)
def test_random_refuses_what_is_no_probability_for_each_spot(p, found):
    student, teacher = make(resnet8), make(resnet20)
    with pytest.raises(ConfigError, match=f"spot_mode.p: {found}"):
        Random(spots_for(["hint"], student, teacher), student, teacher, p=p)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0), ("temperature", -5.0), ("gamma", 0), ("gamma", -2.0), ("budget", -1.0)],
)
def test_adaptive_refuses_a_temperature_or_gamma_of_zero_or_less_and_a_budget_below(key, value):
    student, teacher = make(resnet8), make(resnet20)
    numbers = {"temperature": 5.0, "gamma": 1.0, "same_family_bias": 10.0, "other_family_bias": 0.0} | {
        key: value
    }
    with pytest.raises(ConfigError, match=f"spot_mode.{key}: found {value}"):
        Adaptive(spots_for(["hint"], student, teacher), student, teacher, **numbers)


def test_adaptive_keeps_where_the_route_is_1_and_every_route_is_exactly_0_or_1():
    student, teacher = make(resnet8), make(resnet20)
    mode = adaptive(student, teacher, bias=(0.0, 0.0))
    route = routed_by(mode, generator(), *features(student, teacher, 1000))
    assert set(route.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(mode.keep(route), route == 1)
    assert not mode.keep(route).requires_grad


def test_anti_keeps_exactly_what_adaptive_does_not():
    student, teacher = make(resnet8), make(resnet20)
    mode, inputs = adaptive(student, teacher, bias=(0.0, 0.0)), features(student, teacher, 1000)
    anti = adaptive(student, teacher, kind=Anti, bias=(0.0, 0.0))
    anti.load_state_dict(mode.state_dict())
    keep, anti_keep = (m.keep(routed_by(m, generator(), *inputs)) for m in (mode, anti))
    assert torch.equal(anti_keep, ~keep)
    assert keep.any()
    assert not keep.all()


def test_a_route_depends_on_the_stream_alone():
    student, teacher = make(resnet8), make(resnet20)
    inputs = features(student, teacher, 1000)
    spots = spots_for(["hint"], student, teacher)
    for mode in (Random(spots, student, teacher, p=0.5), adaptive(student, teacher, bias=(0.0, 0.0))):
        first, state = routed_by(mode, generator(1), *inputs), torch.get_rng_state()
        torch.rand(1)
        assert torch.equal(routed_by(mode, generator(1), *inputs), first)
        assert not torch.equal(routed_by(mode, generator(2), *inputs), first)
        torch.set_rng_state(state)
        routed_by(mode, generator(1), *inputs)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7, 3.0])
def test_channel_0_wins_with_the_sigmoid_of_the_scores_difference_at_any_temperature(difference, temperature):
    draws = 100_000
    scores = torch.tensor([difference + 1.5, 1.5]).expand(draws, 2)
    share = straight_through_gumbel(scores, temperature, generator()).double().mean()
    expected = torch.tensor(difference, dtype=torch.float64).sigmoid()
    assert (share - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_gradient_of_a_hard_choice_is_the_soft_choices(temperature):
    scores = torch.randn(50, 3, 2, dtype=torch.float64, requires_grad=True)
    hard = straight_through_gumbel(scores, temperature, generator(7))
    noise = -torch.empty_like(scores).exponential_(generator=generator(7)).log()
    weights = torch.randn(50, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((hard * weights).sum(), scores)
    soft = ((scores + noise)[..., 0] - (scores + noise)[..., 1]).div(temperature).sigmoid()
    slope = weights * soft * (1 - soft) / temperature
    assert_close(gradient, torch.stack([slope, -slope], dim=-1))
    assert torch.equal(hard, (soft > 0.5).double())


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [pytest.param(resnet20, 10.0, id="same-family"), pytest.param(vgg8, 0.25, id="other-family")],
)
def test_the_bias_of_the_pairs_family_is_added_to_the_teachers_scores(teacher, expected):
    student, teacher = make(resnet8), make(teacher)
    policies = []
    for bias in ((10.0, 0.25), (0.0, 0.0)):
        with initialising(0, "spot_mode"):
            policies.append(adaptive(student, teacher, bias=bias).policy)
    shift = (policies[0].bias - policies[1].bias).detach().view(2, 2)  # [spots, channels]
    assert_close(shift, torch.tensor([[expected, 0.0]] * 2))
    assert torch.equal(policies[0].weight, policies[1].weight)


def test_a_new_policy_chooses_the_teacher_nearly_always_in_a_family_and_about_half_the_time_across():
    student, draws, share = make(resnet8), 5000, {}
    for teacher in (make(resnet20), make(vgg8)):
        mode = adaptive(student, teacher)
        nn.init.zeros_(mode.policy.weight)  # what remains are the initial biases
        share[teacher.family] = (
            routed_by(mode, generator(), *features(student, teacher, draws)).detach().mean(0)
        )
    assert (share["resnet"] > 0.998).all()
    assert ((share["vgg"] > 0.4) & (share["vgg"] < 0.6)).all()


@pytest.mark.parametrize(
    ("routed_loss", "task_loss", "chosen", "expected"),
    [
        pytest.param(1.5, 1.0, 4, 3.0, id="worse-than-the-student"),
        pytest.param(1.5, 2.0, 4, 0.75, id="better-than-the-student"),
        pytest.param(1.5, 1.5, 4, 1.5, id="as-good-as-the-student"),
        pytest.param(1.5, 1.0, 3, 3.0, id="half-through-the-teacher"),
        pytest.param(1.5, 1.0, 1, 3.0 + 2, id="too-few-through-the-teacher"),
        pytest.param(1.5, 2.0, 0, 0.75 + 3, id="none-through-the-teacher"),
    ],
)
def test_the_router_loss_weighs_with_gamma_and_asks_for_half_a_batch_of_teachers(
    routed_loss, task_loss, chosen, expected
):
    route = torch.tensor([1.0] * chosen + [0.0] * (BATCH - chosen))
    assert router_loss(torch.tensor(routed_loss), torch.tensor(task_loss), route, gamma=2.0) == expected
    weighed = router_loss(torch.tensor(routed_loss), torch.tensor(task_loss), route, gamma=2.0, budget=0.25)
    lacking = max(0, BATCH / 2 - chosen)
    assert weighed == expected - lacking + 0.25 * lacking


def test_the_router_loss_has_the_gradients_of_its_formula():
    routed_loss = torch.tensor(1.5, requires_grad=True)
    route = torch.tensor([1.0, 0.0, 0.0, 0.0], requires_grad=True)
    router_loss(routed_loss, torch.tensor(1.0), route, gamma=2.0).backward()
    assert routed_loss.grad == 2
    assert torch.equal(route.grad, -torch.ones(4))  # a sample's, B times what a mean would ask
    route.grad = None
    router_loss(routed_loss, torch.tensor(1.0), route, gamma=2.0, budget=1 / 4).backward()
    assert torch.equal(route.grad, -torch.ones(4) / 4)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_modes_loss_is_the_routed_networks_and_trains_policy_and_adapters_alone(places, pair):
    student, teacher = make(pair[0]).train(), make(pair[1]).eval().requires_grad_(False)
    mode = adaptive(student, teacher, places, bias=(0.0, 0.0), gamma=2.0)
    nn.init.zeros_(mode.policy.weight)  # even chances, so that some samples go each way
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % CLASSES
    student_features, teacher_features = student.features(images), teacher.features(images)
    task_loss = F.cross_entropy(student_features["logits"], labels)
    route = routed_by(mode, generator(), student_features, teacher_features)
    alias = frozen_alias(student)
    loss = mode.loss(alias, teacher, images, teacher_features, route, labels, task_loss)

    with torch.no_grad():
        c = F.cross_entropy(mode.grafts(alias, teacher, images, teacher_features, route), labels)
        weighed = c * 2 if c > task_loss else c / 2
    assert_close(loss.detach(), weighed + max(0.0, 16 - float(route[:, -1].detach().sum())))

    loss.backward()
    for parameter in mode.parameters():
        assert parameter.grad.isfinite().all()
    for weight in (parameter for parameter in mode.parameters() if parameter.dim() > 1):
        assert weight.grad.abs().max() > 0
    assert mode.policy.weight.grad.abs().sum(1).gt(0).all()  # every spot's both scores
    assert all(parameter.grad is None for network in (student, teacher) for parameter in network.parameters())


# ---- in a run

DISTILLERS = {
    "at": partial(AT, where="stages", weight=100.0),
    "fitnet": partial(FitNet, where="hint", weight=1.0),
    "sp": partial(SP, where="last_stage", weight=100.0),
    "pkt": partial(PKT, where="embedding", weight=1000.0),
}


def dataset():
    """48 images of noise, in three batches of 16 an epoch."""
    draws = generator(1)
    images = torch.randint(0, 256, (56, 1, 8, 8), dtype=torch.uint8, generator=draws)
    everything = ImageSet(images, torch.randint(0, CLASSES, (56,), generator=draws))
    train, test = everything[torch.arange(48)], everything[torch.arange(48, 56)]
    return Dataset(train, test, None, CLASSES, 8, (0.5,), (0.25,), Augmentation(crop_padding=1, flip=True))


sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


def trainer(*methods, kind=None, teacher=resnet20, bias=1e4):
    """A resnet8 under KD and the methods named, or alone without them; the same weights for every spot
    mode."""
    with initialising(0, "student"):
        student = make(resnet8)
    if not methods:
        return Trainer(student, optimizer=sgd)
    with initialising(0, "teacher"):
        teacher = make(teacher)
        teacher(torch.randn(16, 1, 8, 8))
    with initialising(0, "distillers"):
        distillers = {"kd": KD(student, teacher, "logits", 1.0, temperature=4.0)}
        distillers |= {name: DISTILLERS[name](student, teacher) for name in methods}
    with initialising(0, "spot_mode"):
        spots = spots_of(student, teacher, distillers.values())
        if kind is Fixed:
            mode = Fixed(spots, student, teacher)
        else:
            mode = kind(
                spots,
                student,
                teacher,
                temperature=5.0,
                gamma=2.0,
                same_family_bias=bias,
                other_family_bias=bias,
            )
    return Trainer(
        student, Teacher(teacher), distillers, mode, optimizer=sgd, policy_optimizer=partial(sgd, lr=0.025)
    )


def trained(*methods, **keys):
    """After two epochs."""
    made = trainer(*methods, **keys)
    *_, last = fit(made, dataset(), epochs=2, batch_size=16)
    return made, last


def same(one, other):
    """All weights and running statistics, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_parts(made):
    return {"student": made.student, "distillers": made.distillers, "spot_mode": made.spot_mode}


@pytest.fixture(scope="module")
def alone():
    return trained()[0]


def test_a_student_alone_descends_its_cross_entropy(alone):
    student = trainer().student
    optimizer = sgd(student.parameters())
    for epoch in (1, 2):
        for images, labels, _ in train_batches(dataset(), 16, stream(0, "data", epoch)):
            optimizer.zero_grad()
            F.cross_entropy(student(images), labels).backward()
            optimizer.step()
    assert same(student, alone.student)


def test_dropout_draws_from_a_stream_of_the_seed_and_the_epoch():
    def made() -> Trainer:
        with initialising(0, "student"):
            stages = dict(make(resnet8).named_children())
        stages["logits"] = nn.Sequential(nn.Dropout(0.5), stages["logits"])
        torch.seed()  # what was drawn before does not count
        return Trainer(StagedNet(stages, "own", (1, 8, 8)), optimizer=sgd)

    whole, first, second = made(), made(), made()
    fit(whole, dataset(), 2, 16)
    fit(first, dataset(), 1, 16)
    second.load_state_dict(deepcopy(first.state_dict()))
    fit(second, dataset(), 2, 16)
    assert same(second.student, whole.student)


def test_a_run_leaves_the_global_random_numbers_alone():
    state = torch.get_rng_state()
    trained("fitnet", kind=Adaptive, bias=0.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", DISTILLERS)
def test_a_policy_sure_of_the_teacher_makes_adaptive_fixed_and_anti_a_student_alone(method, alone):
    fixed, _ = trained(method, kind=Fixed)
    sure, _ = trained(method, kind=Adaptive)
    anti, measured = trained(method, kind=Anti)
    assert same(sure.student, fixed.student)
    assert same(sure.distillers, fixed.distillers)
    assert same(anti.student, alone.student)
    assert {measured[f"loss/{name}"] for name in ("kd", method)} == {0.0}
    assert {value for name, value in measured.items() if name.startswith("kept/")} == {0.0}
    assert not same(fixed.student, alone.student)


@pytest.mark.parametrize("kind", [Adaptive, Anti])
@pytest.mark.parametrize(
    ("teacher", "methods"), [(resnet20, list(DISTILLERS)), (vgg8, ["fitnet", "sp", "pkt"])]
)
def test_a_step_gives_everything_trainable_a_gradient_and_leaves_the_teacher(kind, teacher, methods):
    made = trainer(*methods, kind=kind, teacher=teacher, bias=0.0)
    teacher_before, parts_before = deepcopy(made.teacher.network), deepcopy(trained_parts(made))
    indices = torch.arange(16)
    images = torch.randn(16, 1, 8, 8)
    made.prepare(dataset())
    take_step(made, images, indices % CLASSES, indices)
    for part in trained_parts(made).values():
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.dim() == 1 or parameter.grad.abs().max() > 0, name
    for name, part in trained_parts(made).items():
        for before, after in zip(parts_before[name].parameters(), part.parameters(), strict=True):
            assert before.dim() == 1 or not torch.equal(before, after)
    assert same(made.teacher.network, teacher_before)
    assert all(parameter.grad is None for parameter in made.teacher.network.parameters())


def test_a_step_distils_only_the_rows_that_the_mode_keeps():
    """One step's measurements are those of distillers called with the mode's mask; the policy's stream alone
    decides."""
    made = trainer("at", "pkt", kind=Anti, bias=0.0)
    copy = deepcopy(made)
    indices = torch.arange(16)
    images = torch.randn(16, 1, 8, 8)
    made.prepare(dataset())
    stream_state = made.streams["policy"].get_state()
    measured = take_step(made, images, indices % CLASSES, indices)
    with torch.no_grad():
        student, teacher = copy.student.features(images), copy.teacher.network.features(images)
        route = routed_by(copy.spot_mode, torch.Generator().set_state(stream_state), student, teacher)
    for k, spot in enumerate(copy.spots):
        assert_close(measured[f"kept/{spot.name}"], (route[:, k] == 0).float().mean())
    keep = {spot: route[:, k] == 0 for k, spot in enumerate(copy.spots)}
    for name, distiller in copy.distillers.items():
        assert_close(measured[f"loss/{name}"], distiller(student, teacher, keep, indices).detach())
