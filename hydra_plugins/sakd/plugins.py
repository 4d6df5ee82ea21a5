"""Where Hydra looks for plugins: a sweeper, for sakd/sweeps, and files that lie elsewhere or nowhere.

The latter are networks as student and teacher, sweeps, and sums of distillers.
"""

from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from sakd.configuration.groups import CONF, NETWORK, NETWORKS, SWEEPS


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


class AmongOthers(ConfigSource):
    """Files that are made of, or found among, those of all other sources, which ``repository`` has."""

    repository: ConfigRepository

    def available(self) -> bool:
        return True


class Sums(AmongOthers):
    """Files of distillers' sums, ``distiller/at+sp``; see sakd/configuration/sums.py."""

    @staticmethod
    def scheme() -> str:
        return "sums"

    def load_config(self, config_path: str) -> ConfigResult:
        from sakd.configuration import sums

        options = [
            name
            for name in self.repository.get_group_options(sums.GROUP)
            if not sums.is_sum(f"{sums.GROUP}/{name}")
        ]
        config = OmegaConf.create(sums.sum_of(config_path, self.repository.load_config, options))
        return ConfigResult(self.provider, self.full_path(), config, {"package": None})

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        from sakd.configuration import sums

        return sums.is_sum(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class Elsewhere(AmongOthers):
    """Groups whose files lie elsewhere: sweeps, and as student and teacher the networks of all sources."""

    @staticmethod
    def scheme() -> str:
        return "elsewhere"

    def load_config(self, config_path: str) -> ConfigResult:
        sources, path = self._place(config_path)
        return next(source for source in sources if source.is_config(path)).load_config(path)

    def is_group(self, config_path: str) -> bool:
        sources, path = self._place(config_path)
        return config_path == "" or any(source.is_group(path) for source in sources)

    def is_config(self, config_path: str) -> bool:
        sources, path = self._place(config_path)
        return any(source.is_config(path) for source in sources)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else [SWEEPS.name, *NETWORKS]
        sources, path = self._place(config_path)
        found = [source.list(path, results_filter) for source in sources if source.is_group(path)]
        return sorted({name for names in found for name in names})

    def _place(self, path: str) -> tuple[Sequence[ConfigSource], str]:
        """The sources that may have the file or group, and its path there."""
        group, slash, name = path.partition("/")
        if group in NETWORKS:
            return self.repository.get_sources(), f"{NETWORK}{slash}{name}"
        if group == SWEEPS.name:
            return [FileConfigSource(self.provider, str(SWEEPS.parent))], path
        return [], path


class SearchPath(SearchPathPlugin):
    """Lets Hydra look there after all written files, and in the folder ``conf`` where it is called."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path("conf").absolute()
        if own.is_dir() and own != CONF:
            search_path.append("conf of the working directory", f"file://{own}")
        search_path.append("sakd", f"{Sums.scheme()}://")
        search_path.append("sakd", f"{Elsewhere.scheme()}://")


def _tell_sources_of_others() -> None:
    """Let sources know their repository: Hydra makes a new one, with other sources, for hydra.searchpath."""
    original = ConfigRepository.initialize_sources
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def initialize_sources(self: ConfigRepository, config_search_path: ConfigSearchPath) -> None:
        original(self, config_search_path)
        for source in self.sources:
            if isinstance(source, AmongOthers):
                source.repository = self

    ConfigRepository.initialize_sources = initialize_sources


_tell_sources_of_others()  # here, since jobs of other launchers import this, and make no search path anew
PLUGINS = (Sweeper, Sums, Elsewhere, SearchPath)
