"""What conf/ offers, and where it lies; needs no package."""

from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.parent
INSTALLED = Path(__file__).parent.parent / "conf"  # a wheel has it within the package, and the sweeps in it
CONF, SWEEPS = (
    (INSTALLED, INSTALLED / "sweeps") if INSTALLED.is_dir() else (CHECKOUT / "conf", CHECKOUT / "sweeps")
)
NETWORK = "network"
NETWORKS = ("student", "teacher")  # a file of a network makes it available as both


def folder_of(group: str) -> Path:
    """The folder with a group's own files."""
    if group == SWEEPS.name:
        return SWEEPS
    return CONF / (NETWORK if group in NETWORKS else group)


def choices(group: str) -> list[str]:
    """Names of a group's files, also in its folders, as a command line has them.

    Hydra lists its own, and those of other packages and folders.
    """
    folder = folder_of(group)
    return [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
