"""Spot modes: *where* a student is distilled, per sample and step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.errors import ConfigError, check_number, did_you_mean
from sakd.networks import StagedNet
from sakd.plugin import Plugin
from sakd.ranges import Finite, NotNegative, Positive, Share
from sakd.spots.grafts import Grafts
from sakd.spots.spot import Spot


class SpotMode(Plugin):
    """Decides routes [B, spots] (1: teacher, 0: student), and which rows each spot keeps, or how much.

    ``learns`` says whether the mode has parameters that a loss of the routed network trains.
    """

    learns = False

    def __init__(self, spots: Sequence[Spot], student: StagedNet, teacher: StagedNet):
        super().__init__()
        self.spots = tuple(spots)

    def route(self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        """Routes [B, spots] from both networks' features; random numbers come from ``self.stream`` alone."""
        raise NotImplementedError

    def keep(self, route: Tensor) -> Tensor:
        """Mask [B, spots], True where the sample is distilled at the spot, or its weight there, in [0, 1].

        Carries no gradient.
        """
        return route.detach() > 0.5

    def probability(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Probability [B, spots] with which each sample's route is the teacher, where samples decide it.

        None where they do not.
        """
        return None

    def loss(
        self,
        student: StagedNet,
        teacher: StagedNet,
        images: Tensor,
        teacher_features: Mapping[str, Tensor],
        route: Tensor,
        labels: Tensor,
        task_loss: Tensor,
    ) -> Tensor:
        """The scalar that trains the mode, where it learns.

        ``student`` is the frozen alias, in eval; ``labels``: int64 [B], or where images are mixed what each
        class counts, float32 [B, classes]; ``task_loss``: the student's plain cross-entropy with them, a
        scalar, without weights and smoothing.
        """
        raise NotImplementedError


class Fixed(SpotMode):
    """Distils every sample at every spot, always: ordinary distillation."""

    def route(self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        logits = student_features["logits"]
        return torch.ones(len(logits), len(self.spots), device=logits.device)


class Random(SpotMode):
    """Distils each sample at each spot with probability ``p``.

    ``p``: one number, or one by spot's name, to match a measured keep rate; or a list of one for each epoch.
    """

    def __init__(
        self,
        spots: Sequence[Spot],
        student: StagedNet,
        teacher: StagedNet,
        p: Share | Mapping[str, Share | list[Share]],
    ):
        super().__init__(spots, student, teacher)
        names = [spot.name for spot in self.spots]
        rates = dict(p) if isinstance(p, Mapping) else dict.fromkeys(names, p)
        if set(rates) != set(names):
            found = sorted(map(str, rates))
            stray = next(iter({*found} ^ {*names}))
            raise ConfigError(
                f"spot_mode.p: found {found}, expected a rate for {names}.{did_you_mean(stray, names)}"
            )
        self.by_epoch = {
            name: tuple(rate) if isinstance(rate, (list, tuple)) else (rate,) for name, rate in rates.items()
        }
        for name, own in self.by_epoch.items():
            for rate in own or ([],):
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                    raise ConfigError(
                        f"spot_mode.p: found {rate!r} at {name}, expected a probability from 0 to 1"
                    )
        self.register_buffer("rates", torch.tensor(self._rates_in(1)), persistent=False)

    def _rates_in(self, epoch: int) -> list[float]:
        """Rates of the spots in an epoch, the last where it is behind all that are listed."""
        listed = (self.by_epoch[spot.name] for spot in self.spots)
        return [float(own[min(epoch, len(own)) - 1]) for own in listed]

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        if any(len(own) > 1 for own in self.by_epoch.values()):  # in place: a captured step sees them change
            self.rates.copy_(torch.tensor(self._rates_in(epoch)))

    def route(self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        logits = student_features["logits"]
        draws = torch.rand(len(logits), len(self.spots), generator=self.stream, device=logits.device)
        return (draws < self.rates).float()


class Adaptive(SpotMode):
    """Distils where a policy routes a sample through the teacher.

    The policy chooses teacher or student for each sample at each spot. It is one linear layer on both
    networks' embeddings; it and the grafts' adapters learn from the routed network's cross-entropy c: times
    ``gamma`` where c is above the student's own, divided by it where below; plus a budget, max(0, B/2 -
    teachers chosen at the logits) (Song et al., IEEE TIP 2022), times ``budget``. The budget is a sum over
    the batch where c is a mean: at 1, as published, a sample that it asks for weighs B times what it weighs
    in c; at 1/B as much.

    The teacher's scores start with ``same_family_bias`` or ``other_family_bias`` added.
    """

    learns = True

    def __init__(
        self,
        spots: Sequence[Spot],
        student: StagedNet,
        teacher: StagedNet,
        temperature: Positive,
        gamma: Positive,
        same_family_bias: Finite,
        other_family_bias: Finite,
        budget: NotNegative = 1.0,
    ):
        super().__init__(spots, student, teacher)
        check_number("spot_mode.temperature", temperature, least=0, above=True)
        check_number("spot_mode.gamma", gamma, least=0, above=True)
        check_number("spot_mode.same_family_bias", same_family_bias)
        check_number("spot_mode.other_family_bias", other_family_bias)
        check_number("spot_mode.budget", budget, least=0)
        self.temperature, self.gamma, self.budget = temperature, gamma, budget
        width = teacher.shapes["embedding"][0] + student.shapes["embedding"][0]
        self.policy = nn.Linear(width, 2 * len(self.spots))
        bias = same_family_bias if student.family == teacher.family else other_family_bias
        with torch.no_grad():
            self.policy.bias.view(-1, 2)[:, 0] += bias
        self.grafts = Grafts(self.spots)

    def route(self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        scores = self._scores(student_features, teacher_features)
        return straight_through_gumbel(scores, self.temperature, self.stream)

    def probability(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor:
        return F.softmax(self._scores(student_features, teacher_features), dim=-1)[..., 0]

    def _scores(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor:
        """The policy's scores [B, spots, 2], the teacher's first."""
        embeddings = torch.cat([teacher_features["embedding"], student_features["embedding"].detach()], dim=1)
        embeddings = embeddings.to(self.policy.weight.dtype)
        return self.policy(embeddings).view(len(embeddings), len(self.spots), 2)

    def loss(
        self,
        student: StagedNet,
        teacher: StagedNet,
        images: Tensor,
        teacher_features: Mapping[str, Tensor],
        route: Tensor,
        labels: Tensor,
        task_loss: Tensor,
    ) -> Tensor:
        routed_logits = self.grafts(student, teacher, images, teacher_features, route)
        routed_loss = F.cross_entropy(routed_logits.float(), labels)
        return router_loss(routed_loss, task_loss.detach(), route[:, -1], self.gamma, self.budget)


class Anti(Adaptive):
    """Distils exactly where adaptive would not; policy and adapters learn just as there."""

    def keep(self, route: Tensor) -> Tensor:
        return ~super().keep(route)


class Soft(Adaptive):
    """Distils every sample at every spot as much as a policy leans to the teacher: adaptive without the draw.

    A sample's weight at a spot is the softmax of the policy's scores over ``temperature``: what adaptive adds
    noise to and rounds, and what its gradient goes through. At a temperature of 1 it is the share of
    adaptive's draws that choose the teacher. The route is the weight itself, so that the grafted network goes
    on with a mixture of both networks' features; policy and adapters learn from it as there, the budget
    counting weights. No random numbers are drawn.
    """

    def route(self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        return self.probability(student_features, teacher_features)

    def keep(self, route: Tensor) -> Tensor:
        return route.detach()

    def probability(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> Tensor:
        scores = self._scores(student_features, teacher_features)
        return F.softmax(scores / self.temperature, dim=-1)[..., 0]


def straight_through_gumbel(scores: Tensor, temperature: float, stream: torch.Generator) -> Tensor:
    """One hard draw per pair of ``scores`` [..., 2]: 1.0 where channel 0 won, else 0.0, exactly.

    The gradient is the soft choice's (Jang et al., ICLR 2017).
    """
    exponential = torch.empty_like(scores).exponential_(generator=stream)
    noise = -exponential.log()  # standard Gumbel
    soft = F.softmax((scores + noise) / temperature, dim=-1)[..., 0]
    return (soft.detach() >= 0.5).to(soft.dtype) + (soft - soft.detach())


def router_loss(
    routed_loss: Tensor, task_loss: Tensor, logits_route: Tensor, gamma: float, budget: float = 1.0
) -> Tensor:
    """Loss of the router, a scalar: the routed network's cross-entropy, weighed, and the budget's hinge.

    The weight says whether it beats the student's. ``logits_route``: [B], the route at the logits. The hinge,
    times ``budget``, is not divided by B.
    """
    above, below = routed_loss > task_loss, routed_loss < task_loss
    one = torch.ones_like(task_loss)
    weight = torch.where(above, one * gamma, torch.where(below, one / gamma, one))
    lacking = F.relu(len(logits_route) / 2 - logits_route.sum())
    return torch.add(weight * routed_loss, lacking, alpha=budget)
