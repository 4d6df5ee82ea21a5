"""What a trained network's features are worth on another data set: a linear classifier on them, frozen.

As in the transfer protocol of Tian et al. (2020), "Contrastive Representation Distillation", ICLR, section
4.1; how the classifier is trained is this file's own.
"""

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.data import Dataset, Images
from sakd.data.batches import normalise
from sakd.errors import ConfigError
from sakd.process import tf32
from sakd.streams import initialising, stream
from sakd.trained.images import batches
from sakd.trained.load import Trained

EPOCHS, BATCH, RATE, MOMENTUM = 100, 256, 0.1, 0.9
MILESTONES = (30, 60, 90)  # epochs after which the rate falls to a tenth


@dataclass(frozen=True)
class Probed:
    """Accuracies in percent of a linear classifier on ``features`` numbers of the embedding."""

    train_images: int
    test_images: int
    classes: int
    features: int
    train_accuracy: float
    test_accuracy: float
    epochs: int = EPOCHS


def probe(trained: Trained, dataset: Dataset, device: torch.device) -> Probed:
    """Train a linear classifier on the embedding of the training images, and test it on the test images.

    Images are not augmented, and resized to those that the network takes; grey ones have its channels.
    Features are standardised, each by its mean and deviation over the training images, and the classifier
    learns by SGD: 100 epochs of batches of 256, rate 0.1, a tenth of it after 30, 60 and 90, momentum 0.9.

    Raises ConfigError for images whose channels the network does not take.
    """
    with tf32(False):
        (seen, labels), (unseen, test_labels) = (
            _features(trained, images, device) for images in (dataset.train, dataset.test)
        )
        mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-6)
        seen, unseen = (seen - mean) / deviation, (unseen - mean) / deviation
        classifier = _learned(seen, labels, dataset.classes)
        with torch.no_grad():
            accuracies = [
                100 * (classifier(x).argmax(1) == y).double().mean().item()
                for x, y in ((seen, labels), (unseen, test_labels))
            ]
    return Probed(len(seen), len(unseen), dataset.classes, seen.shape[1], *accuracies)


@torch.no_grad()
def _features(trained: Trained, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings [N, d] and labels [N]."""
    channels, height, width = trained.network.input_shape
    if images.shape[0] not in (1, channels):
        raise ConfigError(
            f"dataset.channels: found {images.shape[0]}, expected {channels} as {trained.called} takes, or 1"
        )
    network = trained.network.to(device).between(None, "embedding")
    mean, std = (
        torch.tensor(v, device=device).view(-1, 1, 1) for v in (trained.about.mean, trained.about.std)
    )
    found = []
    for pixels, labels in batches(images, device):
        pixels = pixels.expand(-1, channels, -1, -1)
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(
                pixels.float(), (height, width), mode="bilinear", antialias=True, align_corners=False
            )
        found.append((network(normalise(pixels, mean, std)), labels))
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def _learned(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    with initialising(0, "probe"):
        classifier = nn.Linear(features.shape[1], classes).to(features.device)
    optimizer = torch.optim.SGD(classifier.parameters(), RATE, MOMENTUM)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, MILESTONES)
    orders = stream(0, "probe")
    for _ in range(EPOCHS):
        for places in torch.randperm(len(features), generator=orders).to(features.device).split(BATCH):
            loss = F.cross_entropy(classifier(features[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return classifier


def as_text(name: str, about: str, found: Probed) -> str:
    return (
        f"{name}, a linear classifier on its frozen embedding ({found.features} numbers), {about}: "
        f"{found.classes} classes\ntest {found.test_accuracy:.2f} % of {found.test_images:,} images, train "
        f"{found.train_accuracy:.2f} % of {found.train_images:,} ({found.epochs} epochs)\n"
    )


def as_json(name: str, about: str, found: Probed) -> str:
    return json.dumps({"network": name, "on": about} | asdict(found), indent=2, allow_nan=False) + "\n"


FORMATS = {"terminal": as_text, "json": as_json}
