"""A trained network in others' formats: what is written is run again first, on the whole test set."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sakd.data import Images
from sakd.data.batches import normalise
from sakd.errors import CheckpointError, ExportError, in_one_line
from sakd.files import write_whole
from sakd.networks import StagedNet
from sakd.networks.checkpoints import shared_weights
from sakd.trained.images import batches
from sakd.trained.load import BEST_WEIGHTS, Trained, built

TOLERANCE = 1e-4  # of the largest logit: by how much outputs may differ
EXAMPLES = 2  # images in an example; with one, an export would take no other number

Runs = Callable[[Tensor], Tensor]  # images as the file takes them, [B, C, H, W], to logits [B, classes]


@dataclass(frozen=True)
class Checked:
    """A file beside the network that it holds, on all test images; accuracies in percent.

    ``difference``: the largest between logits, ``largest``: the largest logit.
    """

    images: int
    accuracy: float
    difference: float
    largest: float


@dataclass(frozen=True)
class Format:
    """A way to write a network. ``is_program``: it can be run alone, and have the normalisation inside."""

    file: str  # its name, by default
    is_program: bool
    write: Callable[[Trained, bool], bytes]
    read: Callable[[Trained, bytes], Runs]


def export(trained: Trained, to: str, output: Path, normalises: bool | None, test: Images) -> Checked:
    """Write a network as one of ``FORMATS``, once it has been read back, run on ``test`` and compared.

    ``normalises``: whether the file takes images as they are stored (the default) or as the network does;
    None for what holds weights alone. Raises ExportError if the format cannot hold the network, or the file
    gives other logits than the network by more than ``TOLERANCE`` of the largest, or another accuracy;
    nothing is written then.
    """
    form = FORMATS[to]
    if not form.is_program and normalises is not None:
        raise ExportError(f"--normalise: {to} holds weights alone; expected it with {_programs()}")
    inside = form.is_program and normalises is not False
    if output.resolve() == trained.path.resolve():
        raise ExportError(f"{output}: is the run's own file, expected another for what is exported")
    content = form.write(trained, inside)
    checked = check(trained, form.read(trained, content), inside, test)
    write_whole(output, content)
    return checked


def default_output(trained: Trained, to: str) -> Path:
    file = FORMATS[to].file
    return trained.path.parent / (f"best_{file}" if trained.path.name == BEST_WEIGHTS else file)


def _programs() -> str:
    return " and ".join(name for name, form in FORMATS.items() if form.is_program)


@torch.no_grad()
def check(trained: Trained, runs: Runs, inside: bool, test: Images) -> Checked:
    """Compare what a file gives with what its network does. Raises ExportError as ``export`` does."""
    network = trained.module()
    correct, found_correct, differences, logits = 0, 0, [], []
    for pixels, labels in batches(test, torch.device("cpu")):
        expected = network(pixels)
        found = runs(pixels if inside else normalise(pixels, network.mean, network.std))
        correct += int((expected.argmax(1) == labels).sum())
        found_correct += int((found.argmax(1) == labels).sum())
        differences.append((found - expected).abs().max())
        logits.append(expected.abs().max())
    difference, largest = torch.stack(differences).max().item(), torch.stack(logits).max().item()
    if not difference <= TOLERANCE * largest:  # of NaN, too
        raise ExportError(
            f"{trained.called}: found logits that differ by {difference:.2g} in what was exported, expected "
            f"at most {TOLERANCE:g} of the largest, {largest:.3g}"
        )
    if correct != found_correct:
        raise ExportError(
            f"{trained.called}: found {found_correct} of {len(test)} test images right in what was exported, "
            f"expected {correct}"
        )
    return Checked(len(test), 100 * correct / len(test), difference, largest)


# ---- weights


def _write_checkpoint(trained: Trained, inside: bool) -> bytes:
    """Weights under "model", by the names that RepDistiller and mdistiller load strictly."""
    weights = shared_weights(trained.network)
    if not weights:
        raise CheckpointError(
            f"{trained.called}: found {trained.name} of {trained.about.network['_target_']}, expected a "
            "network whose weights have names that the field shares"
        )
    own = {"model": weights, "name": trained.name}
    if trained.result is not None:
        own |= {"epoch": trained.epoch, "accuracy": trained.accuracy}
    content = io.BytesIO()
    torch.save(own, content)
    return content.getvalue()


def _write_safetensors(trained: Trained, inside: bool) -> bytes:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in trained.network.state_dict().items()}
    return save(weights, trained.about.metadata())


def _read_weights(suffix: str) -> Callable[[Trained, bytes], Runs]:
    return lambda trained, content: built(trained.about, content, Path(f"exported{suffix}"))


# ---- programs


def _module(trained: Trained, inside: bool) -> tuple[nn.Module, Tensor]:
    """What a program does, and an example of what it gets."""
    shape = (EXAMPLES, *trained.network.input_shape)
    if inside:
        return trained.module(), torch.zeros(shape, dtype=torch.uint8)
    return trained.network, torch.zeros(shape)


def _program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Of any number of images. PyTorch raises many kinds of errors for what it cannot hold."""
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(module, (example,), dynamic_shapes=(batch,))


def _as_pt2(module: nn.Module, example: Tensor) -> bytes:
    content = io.BytesIO()
    torch.export.save(_program(module, example), content)
    return content.getvalue()


def _read_pt2(trained: Trained, content: bytes) -> Runs:
    return torch.export.load(io.BytesIO(content)).module()


def _as_onnx(module: nn.Module, example: Tensor) -> bytes:
    program = torch.onnx.export(
        _program(module, example),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    return program.model_proto.SerializeToString()


def _read_onnx(trained: Trained, content: bytes) -> Runs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"--to onnx: {error}; expected `pip install 'sakd[onnx]'`") from error


def _write_program(to: str, made: Callable[[nn.Module, Tensor], bytes]) -> Callable[[Trained, bool], bytes]:
    def write(trained: Trained, inside: bool) -> bytes:
        if to == "onnx":
            _check_onnx()
        module, example = _module(trained, inside)
        try:
            return made(module, example)
        except Exception as error:  # of many kinds
            layer = _refused_layer(trained.network, made) or trained.name
            raise ExportError(f"{trained.called}: {to} cannot hold {layer} ({in_one_line(error)})") from error

    return write


@torch.no_grad()
def _refused_layer(network: StagedNet, made: Callable[[nn.Module, Tensor], bytes]) -> str | None:
    """The first layer that cannot be exported by itself, by its path and class; None if each can.

    A kind of layer is tried once.
    """
    tried: dict[type, bool] = {}
    for path, layer, given in list(_layers(network)):
        if type(layer) not in tried:
            try:
                made(layer, given)
                tried[type(layer)] = True
            except Exception:  # of many kinds
                return f"{path}, a {type(layer).__name__}"
    return None


def _layers(network: StagedNet) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Layers without others inside, by path, each with what it gets, as far as that is one tensor."""
    found: list[tuple[str, nn.Module, Tensor]] = []

    def note(path: str) -> Callable[[nn.Module, tuple], None]:
        return lambda layer, given: (
            found.append((path, layer, given[0]))
            if len(given) == 1 and isinstance(given[0], Tensor)
            else None
        )

    leaves = [(path, layer) for path, layer in network.named_modules() if not list(layer.children())]
    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in leaves]
    network(torch.zeros(EXAMPLES, *network.input_shape))
    for hook in hooks:
        hook.remove()
    yield from found


FORMATS = {
    "torch.export": Format("student.pt2", True, _write_program("torch.export", _as_pt2), _read_pt2),
    "onnx": Format("student.onnx", True, _write_program("onnx", _as_onnx), _read_onnx),
    "checkpoint": Format("student.pth", False, _write_checkpoint, _read_weights(".pth")),
    "safetensors": Format("exported.safetensors", False, _write_safetensors, _read_weights(".safetensors")),
}
