"""What tests read of the README and of docs/: the fenced blocks."""

import re
from pathlib import Path

from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language, without their fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def lines_of(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without their comments, in order."""
    lines = "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [told for line in lines if (told := re.sub(r"(^|\s+)# .*|\s+#$", "", line).strip())]
