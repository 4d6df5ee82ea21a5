"""What conf/ offers; needs no package."""

from pathlib import Path

CONF = Path(__file__).parent.parent.parent / "conf"


def choices(group: str) -> list[str]:
    """Names of a group's files under conf/, also in its folders, as a command line has them.

    Hydra lists its own.
    """
    folder = CONF / group
    return [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
