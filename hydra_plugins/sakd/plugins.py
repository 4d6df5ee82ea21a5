"""Where Hydra looks for launchers and sweepers; what they do is in sakd/sweeps."""

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _Launcher(Launcher):
    """Takes a whole planned sweep."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing: cells come composed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise TypeError("found another sweeper, expected hydra/sweeper=sakd")


class SlurmLauncher(_Launcher):
    """`hydra/launcher=slurm`"""


class LocalLauncher(_Launcher):
    """`hydra/launcher=local`"""


class Sweeper(BasicSweeper):
    """Every combination, as Hydra's own; each cell is composed and checked once, before any is launched."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(None, params)

    def sweep(self, arguments: list[str]) -> Any:
        from sakd.configuration.compose import sweep_of

        planned = sweep_of(self.config, arguments)
        if isinstance(self.launcher, _Launcher):
            from sakd.sweeps import launch, plan

            return launch(plan(planned))
        cells = [list(overrides) for overrides, _ in planned.cells]
        for result in (results := self.launcher.launch(cells, initial_job_idx=0)):
            _ = result.return_value  # raises what a cell raised
        return [results]
