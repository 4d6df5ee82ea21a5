"""Where Hydra looks for sweepers; what ours does is in sakd/sweeps."""

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class Sweeper(BasicSweeper):
    """Every combination, as Hydra's own; each cell is composed and checked once, before any is launched."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(None, params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from sakd.configuration.fits import check_node
        from sakd.sweeps.launchers import is_launcher

        self.config, self.launcher = config, None
        if not is_launcher(config.hydra.launcher._target_):
            check_node(OmegaConf.to_container(config.hydra.launcher), "hydra.launcher")
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        from sakd.configuration.compose import sweep_of
        from sakd.runs import Run
        from sakd.sweeps import here, launch, plan, report
        from sakd.sweeps.plan import PlannedRun, check_parts

        sweep = sweep_of(self.config, arguments)
        if self.launcher is None:
            planned = plan(sweep)
            standings = launch(planned)
            if standings is not None:
                report.conclude_launch(planned, standings)
            return []
        if isinstance(self.launcher, BasicLauncher):
            here.train(sweep)
            return []
        # A launcher that is neither ours nor Hydra's own gets the cells one by one.
        check_parts([PlannedRun(Run(config), (), overrides) for overrides, config in sweep.cells])
        cells = [list(overrides) for overrides, _ in sweep.cells]
        for result in (results := self.launcher.launch(cells, initial_job_idx=0)):
            _ = result.return_value  # raises what a cell raised
        return [results]
