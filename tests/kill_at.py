"""Real kills at exact moments.

python kill_at.py module:function NUMBER before|after OVERRIDE…      (launches with these overrides)
"""

import importlib
import os
import signal
import sys
from functools import reduce
from pathlib import Path


def kill_at(place: str, number: int, when: str, by: signal.Signals = signal.SIGKILL) -> None:
    """This process gets the signal ``by`` just before or after the function at ``place`` ("module:name") is
    called for that time."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments, **keys):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), by)
        result = original(*arguments, **keys)
        if calls == number and when == "after":
            os.kill(os.getpid(), by)
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    kill_at(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    import launch

    launch.run()
