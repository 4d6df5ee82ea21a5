"""Where Hydra looks for plugins: a sweeper, for sakd/sweeps, and sums of distillers as files."""

from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class Sweeper(BasicSweeper):
    """Every combination, as Hydra's own; each cell is composed and checked once, before any is launched."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(None, params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from sakd.configuration.compose import launcher_node
        from sakd.configuration.fits import check_node
        from sakd.sweeps.launchers import is_launcher

        self.config, self.launcher = config, None
        launcher = launcher_node(config.hydra)
        if not is_launcher(launcher.get("_target_")):
            check_node(launcher, "hydra.launcher", leave=())
            super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        from sakd import sweep_page
        from sakd.configuration.compose import sweep_of
        from sakd.runs import Run
        from sakd.signals import told_if_finished
        from sakd.sweeps import here, launch, plan, report
        from sakd.sweeps.plan import PlannedRun, check_parts

        def is_finished() -> bool:
            return all((Run(config).folder / "result.json").exists() for _, config in sweep.cells)

        sweep = sweep_of(self.config, arguments)
        if self.launcher is None:
            planned = plan(sweep)
            with told_if_finished(is_finished):
                standings = launch(planned)
            if standings is not None:
                shown = sweep_page.update(planned.cells, report.states_of(planned, standings))
                report.conclude_launch(planned, standings, shown)
            return []
        if isinstance(self.launcher, BasicLauncher):
            with told_if_finished(is_finished):
                here.train(sweep, sweep_page.update)
            return []
        # A launcher that is neither ours nor Hydra's own gets the cells one by one.
        check_parts([PlannedRun(Run(config), (), overrides) for overrides, config in sweep.cells])
        cells = [list(overrides) for overrides, _ in sweep.cells]
        for result in (results := self.launcher.launch(cells, initial_job_idx=0)):
            _ = result.return_value  # raises what a cell raised
        return [results]


class Sums(ConfigSource):
    """Files of distillers' sums, ``distiller/at+sp``; see sakd/configuration/sums.py."""

    @staticmethod
    def scheme() -> str:
        return "sums"

    def load_config(self, config_path: str) -> ConfigResult:
        from sakd.configuration import sums

        repository = GlobalHydra.instance().config_loader().repository
        options = [
            name
            for name in repository.get_group_options(sums.GROUP)
            if not sums.is_sum(f"{sums.GROUP}/{name}")
        ]
        config = OmegaConf.create(sums.sum_of(config_path, repository.load_config, options))
        return ConfigResult(self.provider, self.full_path(), config, {"package": None})

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        from sakd.configuration import sums

        return sums.is_sum(config_path)

    def available(self) -> bool:
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class SumsPath(SearchPathPlugin):
    """Lets Hydra look there after all written files."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sakd", "sums://")
