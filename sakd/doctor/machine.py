"""Python, packages, PyTorch and GPUs of this machine."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from sakd.configuration import build
from sakd.process import tf32

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # of a gradient around 0.05, summed in another order


def check_python() -> tuple[str, str]:
    return "ok", f"{platform.python_version()}, {sys.executable}, {platform.platform()}"


def check_packages() -> tuple[str, str]:
    """Compare what is installed with what sakd needs, and what these need of each other.

    So torchvision of another torch is found, which imports, and fails once it is used.
    """
    try:
        needed = _requirements("sakd")
    except PackageNotFoundError:
        return "warn", "sakd is not installed, so that what it needs is not known; expected pip install -e ."
    names = [requirement.name for requirement in needed]
    wrong = _unmet("sakd", needed)
    for name in names:
        if _installed(name) is not None:
            wrong += _unmet(name, [own for own in _requirements(name) if own.name in names])
    if wrong:
        return "fail", "; ".join(wrong)
    return "ok", f"sakd {version('sakd')} and the {len(names)} packages that it needs go together"


def _requirements(package: str) -> list[Requirement]:
    found = [Requirement(line) for line in requires(package) or []]
    return [own for own in found if own.marker is None or own.marker.evaluate({"extra": ""})]


def _unmet(package: str, needed: list[Requirement]) -> list[str]:
    found = {own.name: _installed(own.name) for own in needed}
    return [
        f"{own.name}: found {found[own.name] or 'none'}, expected {own.specifier} for {package}"
        for own in needed
        if found[own.name] is None or not own.specifier.contains(found[own.name], prereleases=True)
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_torch() -> tuple[str, str]:
    """Carry out a convolution and its gradients, and exchange an array with NumPy."""
    import torch

    gradient = _gradient(torch.device("cpu"))
    torch.from_numpy(gradient.numpy())
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return "ok", f"{torch.__version__}, {cuda}; threads: {torch.get_num_threads()}"


def check_cuda(asked: str) -> tuple[str, str]:
    """Carry out the same on each GPU, and compare. Raises ConfigError where there is no device ``asked``."""
    import torch

    build.device(asked)
    if not torch.cuda.is_available():
        found = _by_the_driver()
        if found:
            why = f"the driver has {found}, and PyTorch {torch.__version__} sees none"
            return (
                "fail",
                f"{why}; expected a PyTorch for this driver, and CUDA_VISIBLE_DEVICES unset or right",
            )
        return "ok", "no GPU; runs train on the CPU"
    expected, told = _gradient(torch.device("cpu")), []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        found = _gradient(device).cpu()
        name = torch.cuda.get_device_name(device)
        if not torch.allclose(found, expected, **TOLERANCE):
            return "fail", f"{device} ({name}): found another gradient of a convolution than the CPU's"
        free, total = torch.cuda.mem_get_info(device)
        told.append(f"{device} {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, a step computed")
    return "ok", "; ".join(told)


def _gradient(device: "torch.device") -> "torch.Tensor":  # noqa: F821
    """Gradient of a convolution's weights [4, 3, 3, 3], the same on each device but for rounding."""
    import torch

    images = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8).to(device)
    weights = torch.linspace(-1, 1, 4 * 3 * 3 * 3).view(4, 3, 3, 3).to(device).requires_grad_()
    with tf32(False):
        torch.nn.functional.conv2d(images, weights, padding=1).relu().mean().backward()
    return weights.grad


def _by_the_driver() -> str:
    """The GPUs that the driver lists, whether PyTorch sees them or not; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ", ".join(listed.stdout.split("\n")).strip(", ") if listed.returncode == 0 else ""
