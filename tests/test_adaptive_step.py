"""Whole training steps against a straight-line implementation of the method, in float64.

``StraightLine`` is written as one reads the paper: every stage by name from the images on, kept rows picked
out, batch norm, Gumbel draws and SGD as formulas, all gradients by autograd over the complete routed network.
Of the package it uses the stages of the two networks alone; it starts from a trainer's weights, by their
names in a saved state.
"""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from sakd.distillers import AT, KD, PKT, SP, FitNet
from sakd.networks import resnet8, resnet14, vgg8, wrn_16_1
from sakd.spots import Adaptive, Anti
from sakd.streams import initialising
from sakd.training import Execution, Teacher, Trainer, spots_of
from tests.conftest import take_step

BATCH, CLASSES, STEPS = 8, 5, 2  # momentum shows in the second step
TEMPERATURE, GAMMA, KD_TEMPERATURE = 5.0, 2.0, 4.0
LR, POLICY_LR, MOMENTUM, DECAY, POLICY_DECAY = 0.05, 0.025, 0.9, 5e-4, 1e-3

PAIRS = {  # student, teacher
    "same-family": (resnet8, resnet14),
    "other-family": (resnet8, wrn_16_1),
    "deeper-teacher": (resnet8, vgg8),
}
MODES = {Adaptive: list(PAIRS), Anti: ["same-family"]}
LAST_STAGE = {resnet8: "stage3", resnet14: "stage3", wrn_16_1: "stage3", vgg8: "stage4"}
METHODS = {  # which loss is looked at at which kind of spot
    "hint": ["fitnet"],
    "stages": ["at"],
    "last_stage": ["sp"],
    "embedding": ["pkt"],
    "logits": [],
    "all": ["fitnet", "at", "pkt"],
}
WEIGHTS = {"kd": 1.0, "fitnet": 2.0, "at": 100.0, "sp": 30.0, "pkt": 300.0}


def places(method, student, teacher):
    """The pairs of stages at which a method compares."""
    return {
        "kd": [("logits", "logits")],
        "fitnet": [("stage2", "stage2")],
        "at": [("stage1", "stage1"), ("stage2", "stage2"), ("stage3", "stage3")],
        "sp": [(LAST_STAGE[student], LAST_STAGE[teacher])],
        "pkt": [("embedding", "embedding")],
    }[method]


def name_of(spot):
    return spot[0] if spot[0] == spot[1] else "-".join(spot)


# ---- the losses on the rows that are kept


def kd(student, teacher):
    p_s, p_t = (torch.softmax(logits / KD_TEMPERATURE, dim=1) for logits in (student, teacher))
    return KD_TEMPERATURE**2 * (p_t * torch.log(p_t / p_s)).sum(dim=1).mean()


def squared_error(student, teacher):
    return ((student - teacher) ** 2).mean()


def at(student, teacher):
    size = min(student.shape[-1], teacher.shape[-1])
    maps = []
    for features in (student, teacher):
        ratio = features.shape[-1] // size
        pooled = F.avg_pool2d(features, ratio)
        attention = (pooled**2).mean(dim=1).flatten(1)
        maps.append(attention / attention.norm(dim=1, keepdim=True))
    return ((maps[0] - maps[1]) ** 2).mean()


def sp(student, teacher):
    grams = []
    for features in (student, teacher):
        gram = features.flatten(1) @ features.flatten(1).T
        grams.append(gram / gram.norm(dim=1, keepdim=True))
    return ((grams[0] - grams[1]) ** 2).sum() / len(student) ** 2


def pkt(student, teacher):
    probabilities = []
    for features in (student, teacher):
        unit = features / (features.norm(dim=1, keepdim=True) + 1e-7)
        similarity = (unit @ unit.T + 1) / 2
        probabilities.append(similarity / similarity.sum(dim=1, keepdim=True))
    p_s, p_t = probabilities
    return (p_t * torch.log((p_t + 1e-7) / (p_s + 1e-7))).mean()


LOSSES = {"kd": kd, "fitnet": squared_error, "at": at, "sp": sp, "pkt": pkt}


# ---- adapters


def adapted(weights, prefix, features, target):
    """``features`` through the adapter ``prefix`` to the shape of ``target``; batch norm takes the batch's
    moments."""
    if features.dim() == 2:
        return features @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]
    kernel, bias = weights[f"{prefix}.0.weight"], weights[f"{prefix}.0.bias"]
    size, wanted = features.shape[-1], target.shape[-1]
    if size == wanted:
        assert kernel.shape[-2:] == (1, 1)
        x = F.conv2d(features, kernel, bias)
    elif size == 2 * wanted:
        assert kernel.shape[-2:] == (3, 3)
        x = F.conv2d(features, kernel, bias, stride=2, padding=1)
    else:
        assert wanted == 2 * size
        assert kernel.shape[-2:] == (4, 4)
        x = F.conv_transpose2d(features, kernel, bias, stride=2, padding=1)
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    scale, shift = (weights[f"{prefix}.1.{key}"].reshape(1, -1, 1, 1) for key in ("weight", "bias"))
    return torch.clamp((x - mean) / torch.sqrt(variance + 1e-5) * scale + shift, min=0)


# ---- the method, in a straight line


class StraightLine:
    """One pair under the named methods, from copies of ``trainer``'s weights."""

    def __init__(self, trainer, spots, methods, pair, anti):
        self.spots, self.methods, self.anti = (
            spots,
            {name: places(name, *pair) for name in ["kd", *methods]},
            anti,
        )
        self.student, self.teacher = deepcopy(trainer.student), deepcopy(trainer.teacher.network)

        def own(module):
            return {
                name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()
            }

        self.regressors, self.policy = own(trainer.distillers), own(trainer.spot_mode)
        self.draws = torch.Generator().manual_seed(trainer.streams["policy"].initial_seed())
        self.momenta = {}

    def step(self, images, labels):
        """All that a step computes and leaves behind, by name."""
        self.student.train()
        student, teacher = {}, {}
        x = images
        for stage in self.student._modules:
            student[stage] = x = self.student._modules[stage](x)
        x = images
        for stage in self.teacher._modules:
            teacher[stage] = x = self.teacher._modules[stage](x)
        task_loss = -torch.log_softmax(student["logits"], dim=1)[torch.arange(BATCH), labels].mean()

        # The policy's scores: the teacher's embedding first, then the student's; of each spot's two the
        # teacher's first.
        seen = torch.cat([teacher["embedding"], student["embedding"]], dim=1).detach()
        scores = seen @ self.policy["policy.weight"].T + self.policy["policy.bias"]
        scores = scores.reshape(BATCH, len(self.spots), 2)
        exponential = torch.empty_like(scores).detach().exponential_(generator=self.draws)
        noisy = scores - torch.log(exponential)
        hard = (noisy[:, :, 0] > noisy[:, :, 1]).double()
        to_teacher, to_student = (torch.exp(noisy[:, :, channel] / TEMPERATURE) for channel in (0, 1))
        soft = to_teacher / (to_teacher + to_student)
        # Exactly 0 or 1: a rounding error would decide between equals in max-pooling.
        route = hard + (soft - soft.detach())

        # What the student minimises.
        losses = {"task": task_loss}
        for method, where in self.methods.items():
            losses[method] = torch.zeros((), dtype=torch.float64)
            for spot in where:
                kept = hard[:, self.spots.index(spot)] == (0 if self.anti else 1)
                f_s, f_t = student[spot[0]], teacher[spot[1]]
                if method == "fitnet":
                    f_s = adapted(self.regressors, f"fitnet.regressors.{name_of(spot)}", f_s, f_t)
                if kept.any():
                    share = kept.sum() / BATCH
                    losses[method] = losses[method] + WEIGHTS[method] * share * LOSSES[method](
                        f_s[kept], f_t[kept]
                    )

        # The routed network: the student in eval, its statistics those that its own pass has just moved.
        self.student.eval()
        routed_logits = self.routed(images, route)
        c = -torch.log_softmax(routed_logits, dim=1)[torch.arange(BATCH), labels].mean()
        if c > task_loss:
            policy_loss = GAMMA * c
        elif c < task_loss:
            policy_loss = c / GAMMA
        else:
            policy_loss = c
        too_few = BATCH / 2 - route[:, -1].sum()
        if too_few > 0:
            policy_loss = policy_loss + too_few

        learned = dict(self.student.named_parameters()) | self.regressors
        gradients = dict(
            zip(self.policy, torch.autograd.grad(policy_loss, list(self.policy.values())), strict=True)
        )
        gradients |= dict(
            zip(learned, torch.autograd.grad(sum(losses.values()), list(learned.values())), strict=True)
        )
        for name, parameter in (self.policy | learned).items():
            rate, decay = (POLICY_LR, POLICY_DECAY) if name in self.policy else (LR, DECAY)
            descent = gradients[name] + decay * parameter.detach()
            self.momenta[name] = MOMENTUM * self.momenta[name] + descent if name in self.momenta else descent
            parameter.data -= rate * self.momenta[name]
        return {
            "routes": hard,
            "routed logits": routed_logits,
            "losses": {name: loss.detach() for name, loss in losses.items()}
            | {"policy": policy_loss.detach()},
            "gradients": gradients,
            "weights": {
                name: parameter.detach().clone() for name, parameter in (self.policy | learned).items()
            },
            "student's statistics": dict(self.student.named_buffers()),
        }

    def routed(self, images, route):
        """Both networks side by side from the images on, each sample mixed at every spot."""
        s = t = images
        student_stages, teacher_stages = list(self.student._modules), list(self.teacher._modules)
        for k, (student_stop, teacher_stop) in enumerate(self.spots):
            while student_stop in student_stages:
                s = self.student._modules[student_stages.pop(0)](s)
            while teacher_stop in teacher_stages:
                t = self.teacher._modules[teacher_stages.pop(0)](t)
            a = route[:, k].reshape([BATCH] + [1] * (s.dim() - 1))
            if (student_stop, teacher_stop) == ("logits", "logits"):
                return (1 - a) * s + a * t
            s, t = (
                (1 - a) * s + a * adapted(self.policy, f"grafts.to_student.{k}", t, s),
                (1 - a) * adapted(self.policy, f"grafts.to_teacher.{k}", s, t) + a * t,
            )
        raise AssertionError("no logits among the spots")


# ---- the package's


@pytest.fixture
def _float64(monkeypatch):
    """Everything in float64: ``float()``, which takes what mixed precision computes to float32, must not
    round here."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def made_trainer(pair, methods, kind, execution):
    with initialising(0, "networks"):
        student, teacher = (network(CLASSES, 1, 8).double() for network in pair)
        with torch.no_grad():  # statistics that are not those of a fresh network
            teacher(torch.randn(32, 1, 8, 8, dtype=torch.float64))
        distillers = {"kd": KD(student, teacher, "logits", WEIGHTS["kd"], temperature=KD_TEMPERATURE)}
        for name in methods:
            method, where = {
                "fitnet": (FitNet, "hint"),
                "at": (AT, "stages"),
                "sp": (SP, "last_stage"),
                "pkt": (PKT, "embedding"),
            }[name]
            distillers[name] = method(student, teacher, where, WEIGHTS[name]).double()
        spots = spots_of(student, teacher, distillers.values())
        mode = kind(
            spots, student, teacher, TEMPERATURE, GAMMA, same_family_bias=0.0, other_family_bias=0.0
        ).double()
    sgd = partial(torch.optim.SGD, momentum=MOMENTUM)
    made = Trainer(
        student,
        Teacher(teacher, execution=execution),
        distillers,
        mode,
        optimizer=partial(sgd, lr=LR, weight_decay=DECAY),
        policy_optimizer=partial(sgd, lr=POLICY_LR, weight_decay=POLICY_DECAY),
        execution=execution,
    )
    for name, plugin in made.plugins.items():
        plugin.prepare(torch.arange(CLASSES), CLASSES, made.streams[name])
    return made


def stepped(trainer, images, labels):
    """What the trainer computes and leaves behind in one step, named as in ``StraightLine``."""
    seen = {}
    hook = trainer.spot_mode.grafts.register_forward_hook(
        lambda grafts, arguments, logits: seen.update(
            {"routes": arguments[-1].detach(), "routed logits": logits}
        )
    )
    measured = take_step(trainer, images, labels, torch.arange(BATCH))
    hook.remove()
    learned = [trainer.student, trainer.distillers, trainer.spot_mode]
    named = {name: parameter for module in learned for name, parameter in module.named_parameters()}
    return seen | {
        "losses": {
            name.removeprefix("loss/"): loss for name, loss in measured.items() if name.startswith("loss/")
        },
        "kept": {
            name.removeprefix("kept/"): share for name, share in measured.items() if name.startswith("kept/")
        },
        "gradients": {name: parameter.grad for name, parameter in named.items()},
        "weights": {name: parameter.detach() for name, parameter in named.items()},
        "student's statistics": dict(trainer.student.named_buffers()),
    }


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("fold", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("kind", "pair"), [(kind, pair) for kind, pairs in MODES.items() for pair in pairs])
def test_a_step_is_that_of_a_straight_line_implementation(kind, pair, methods, fold):
    pair = PAIRS[pair]
    spots = {spot for name in ["kd", *methods] for spot in places(name, *pair)}
    spots = sorted(spots, key=lambda spot: (spot[0] == "logits", spot[0] == "embedding", spot))
    trainer = made_trainer(pair, methods, kind, Execution(fold_batch_norm=fold))
    trainer.streams["policy"].manual_seed(3)
    plain = StraightLine(trainer, spots, methods, pair, anti=kind is Anti)
    draws, routes = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        images = torch.randn(BATCH, 1, 8, 8, dtype=torch.float64, generator=draws)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=draws)
        expected, found = plain.step(images, labels), stepped(trainer, images, labels)
        routes.append(expected["routes"])
        assert torch.equal(found["routes"], expected["routes"])
        teachers = expected["routes"].mean(dim=0)
        kept = 1 - teachers if kind is Anti else teachers
        assert found.pop("kept") == dict(zip(map(name_of, spots), kept, strict=True))
        assert_close(found, expected, rtol=1e-8, atol=1e-11)
    share = torch.cat(routes).mean(dim=0)
    assert ((share > 0) & (share < 1)).all()  # at every spot some went each way
