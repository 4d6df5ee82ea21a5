"""What a trained network costs, beside its teacher."""

import statistics
import time
from dataclasses import dataclass

import torch

from sakd.decisions.text import page
from sakd.networks import StagedNet
from sakd.networks.cost import cost
from sakd.trained.load import Trained

BATCHES = (1, 64)
LEAST_RUNS, SECONDS = 5, 2.0  # of a measurement, but for a first run that does not count


@dataclass(frozen=True)
class Costs:
    """``size``: bytes of its weights; ``latency``: median seconds on the CPU, by the number of images."""

    name: str
    parameters: int
    multiply_adds: int | None
    size: int
    latency: dict[int, float]


def costs(trained: Trained) -> Costs:
    """Count and time a network, in PyTorch on the CPU, in float32 and with the threads that it has."""
    network = trained.network.cpu()
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    counted = cost(network)
    latency = {number: _latency(network, number) for number in BATCHES}
    return Costs(trained.name, counted["parameters"], counted["multiply_adds"], size, latency)


@torch.no_grad()
def _latency(network: StagedNet, number: int) -> float:
    """Median seconds of a pass of so many images."""
    images, seconds = torch.zeros(number, *network.input_shape), []
    network(images)
    while len(seconds) < LEAST_RUNS or sum(seconds) < SECONDS / len(BATCHES):
        before = time.perf_counter()
        network(images)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def as_text(student: Costs, teacher: Costs | None) -> str:
    """Student and teacher side by side, with what the student has of the teacher's."""
    networks = [student] if teacher is None else [student, teacher]
    rows = {
        "parameters": [n.parameters for n in networks],
        "multiply-adds": [n.multiply_adds for n in networks],
    }
    rows["bytes of weights"] = [n.size for n in networks]
    lines = [[label, *map(_whole, values), _share(values)] for label, values in rows.items()]
    for number in BATCHES:
        seconds = [n.latency[number] for n in networks]
        images = f"{number} image{'s' * (number > 1)}"
        lines.append([f"ms for {images}", *(f"{1000 * each:.2f}" for each in seconds), _share(seconds)])
    head = [
        "cost",
        *(f"{label} {n.name}" for label, n in zip(("student", "teacher"), networks, strict=False)),
    ]
    threads = f"median of PyTorch on the CPU, threads: {torch.get_num_threads()}"
    if teacher is None:
        return page([[head, *(line[:-1] for line in lines)], threads])
    return page([[[*head, "share"], *lines], threads])


def _whole(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _share(values: list) -> str:
    return "-" if None in values else f"{100 * values[0] / values[-1]:.1f} %"
