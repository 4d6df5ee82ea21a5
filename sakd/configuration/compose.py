"""Configurations composed from a command line, one or a sweep's hundreds.

Hydra's errors are told as ours.
"""

import copy
import itertools
import multiprocessing
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from sakd import credentials
from sakd.configuration.arguments import as_typed, refuse_merged, understood, warn_of_two_values
from sakd.configuration.check import check, check_numbers
from sakd.configuration.groups import CONF, choices
from sakd.configuration.identity import digest, flatten
from sakd.configuration.prerequisites import Config
from sakd.configuration.rates import asks_for_rates, with_rates
from sakd.errors import ConfigError, SakdError, did_you_mean
from sakd.process import uncollected
from sakd.signals import as_by_default

PATHS = (  # keys with paths, which may begin with ~
    *(("dataset", "root"), ("student", "checkpoint"), ("teacher", "checkpoint")),
    *(("teacher", "training", "checkpoint"), ("runs",)),
)
CELLS_WORTH_A_POOL = 64  # fewer are composed sooner than processes start

QUOTES = """Quotes hold a value together: 'key={a: 1}', and text with signs of its own: 'key="a=b,c"'"""

# What Hydra raises for what a user wrote, in a command or in a file.
HYDRAS = (HydraException, ValueError, YAMLError)

Overrides = tuple[str, ...]
T = TypeVar("T")


def register_resolvers() -> None:
    """Register the functions that interpolations in ``conf/`` call.

    ``${times:a,b}`` multiplies; ``${share_of:n,[0.5, …]}`` gives whole numbers at those shares of n;
    ``${last_of:path}`` is its last part; ``${folders_in:path,10}`` is how many are in it, or the number where
    there is no such folder; ``${choose:name,{at: 2.0, …},1.0}`` is the table's value for a name,
    or the last where it has none, and refused where there is no last; ``${without_password:uri}`` is a URI as
    it may be shown.
    """
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("without_password", credentials.remember, replace=True)
    OmegaConf.register_new_resolver("share_of", _share_of, replace=True)
    OmegaConf.register_new_resolver("last_of", lambda path: Path(path).absolute().name, replace=True)
    OmegaConf.register_new_resolver("folders_in", _folders_in, replace=True)
    OmegaConf.register_new_resolver("choose", _choose, replace=True)


def register_plugins() -> None:
    """Register our plugins with Hydra, which sees none of an editable installation.

    After it has looked for others: it runs what it finds anew, so that there would be two of each.
    """
    plugins = Plugins.instance()
    from hydra_plugins.sakd.plugins import PLUGINS

    for plugin in PLUGINS:
        plugins.register(plugin)


def _choose(name: str, table: Mapping[str, Any], *otherwise: Any) -> Any:
    if name not in table and not otherwise:
        near = did_you_mean(name, table)
        raise ConfigError(f"found no value for {name!r}, expected one of {', '.join(table)}.{near}")
    return table[name] if name in table else otherwise[0]


def _share_of(whole: int, shares: Sequence[float]) -> ListConfig:
    return OmegaConf.create([round(share * whole) for share in shares])


def _folders_in(path: str, otherwise: int) -> int:
    """How many folders that are not hidden are in one."""
    try:
        with os.scandir(os.path.expanduser(path)) as entries:
            return sum(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    except OSError:  # the reader says what it misses, before anything is trained
        return otherwise


def resolve(cfg: DictConfig) -> Config:
    """The composed configuration as plain values, checked.

    Raises ConfigError naming the key at fault.
    """
    try:
        # Before any is computed with.
        check_numbers(lambda key, otherwise: OmegaConf.select(cfg, key, default=otherwise))
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        told = str(error).splitlines()[0].removeprefix("ConfigError raised while resolving interpolation: ")
        raise ConfigError(f"{key}{told}") from error
    for *parents, key in PATHS:
        node = _find(config, ".".join(parents), {}) if parents else config
        if isinstance(node, dict) and isinstance(node.get(key), str):
            node[key] = os.path.expanduser(node[key])
    check(config)
    config = with_rates(config)
    if (uri := config["tracking"].get("uri")) is not None:
        config["tracking"]["uri"] = credentials.remember(uri)
        credentials.revealed(config["tracking"]["uri"])
    return config


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with other values for keys that it has, by dotted path, checked.

    Raises KeyError where they cannot just be put there.
    """
    config = _copied(config)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = config
        for key in parents:
            node = node[key] if isinstance(node, dict) else {}
        if isinstance(node[leaf], dict) or isinstance(value, (dict, list, str)):
            raise KeyError(path)  # nodes are merged, and text may hold an interpolation: for Hydra to do
        node[leaf] = value
    check_numbers(partial(_find, config))
    check(config)
    return config


def _copied(node: Any) -> Any:
    """A copy of plain values, in a tenth of the time that copy.deepcopy takes for them."""
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    return [_copied(value) for value in node] if isinstance(node, list) else node


def _find(node: Any, path: str, otherwise: Any) -> Any:
    """The value at a dotted path, or ``otherwise`` where there is none."""
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return otherwise
        node = node[key]
    return node


def compose_one(overrides: Sequence[str]) -> Config:
    """The configuration that `python launch.py` would run with these overrides.

    Raises ConfigError for a mistake in them.
    """
    with _hydra():
        try:
            cfg = _composed(understood(overrides))
        except HYDRAS as error:
            raise ConfigError(explain(error)) from error
        return resolve(cfg)


def _composed(overrides: Sequence[str]) -> DictConfig:
    cfg = compose("config", list(overrides), return_hydra_config=True)
    refuse_merged(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@dataclass(frozen=True)
class Sweep:
    """Cells of a multirun, by overrides and resolved configuration, and how they are to be launched."""

    cells: list[tuple[Overrides, Config]]
    launcher: dict[str, object]
    overrides: Overrides  # as typed


@contextmanager
def _hydra() -> Iterator[None]:
    """Set up Hydra, which is there already within launch.py."""
    register_resolvers()
    register_plugins()
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def sweep(overrides: Sequence[str]) -> Sweep:
    """The sweep that `python launch.py -m` would run with these overrides.

    Raises ConfigError for a mistake in any cell.
    """
    with _hydra():
        try:
            loader = GlobalHydra.instance().config_loader()
            warn_of_two_values(overrides)
            master = loader.load_configuration(
                "config", understood(overrides, multirun=True), RunMode.MULTIRUN
            )
        except HYDRAS as error:
            raise ConfigError(explain(error)) from error
        return sweep_of(master, overrides)


def sweep_of(master: DictConfig, overrides: Sequence[str]) -> Sweep:
    """The sweep of a configuration that Hydra composed of what all its cells share.

    Raises ConfigError for a mistake in any cell.
    """
    with _hydra():
        try:
            lines = expand(
                master.hydra.sweeper.params or {}, OmegaConf.to_container(master.hydra.overrides.task)
            )
            with _files_read_once(), uncollected():
                cells = compose_cells(lines, OmegaConf.to_container(master.hydra.overrides.hydra))
        except HYDRAS as error:
            raise ConfigError(explain(error)) from error
        # Cells may have been composed in other processes, and of a file's password these alone know.
        credentials.remember(OmegaConf.select(master, "tracking.uri") or "")
        try:
            launcher = launcher_node(master.hydra, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}") from error
        return Sweep(cells, launcher, tuple(map(as_typed, overrides)))


def launcher_node(hydra: DictConfig, resolve: bool = False) -> dict[str, object]:
    """The keys and values of ``hydra.launcher``. Raises ConfigError where it has none."""
    if not isinstance(hydra.launcher, DictConfig):
        raise ConfigError(f"hydra.launcher: found {hydra.launcher!r}, expected keys and values")
    return OmegaConf.to_container(hydra.launcher, resolve=resolve)


def expand(params: Mapping[str, object], arguments: Sequence[str]) -> list[Overrides]:
    """Combinations of all that is swept by a sweep file's ``params`` and the command line's ``arguments``.

    Where both have a key, the command line alone counts. Raises ConfigError for a key that is swept over
    nothing.
    """
    if not isinstance(params, Mapping):
        raise ConfigError(f"hydra.sweeper.params: found {params!r}, expected keys and values to sweep over")
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    own = understood([f"{key}={value}" for key, value in params.items()])
    parsed = parser.parse_overrides([*own, *understood(arguments)])
    for override in parsed:
        if override.is_sweep_override() and not list(override.sweep_string_iterator()):
            key, _, value = override.input_line.partition("=")
            raise ConfigError(f"{key}: found {value}, which is no value at all, expected some to sweep over")
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return [tuple(line) for line in batch]


# A sweep's cells are what ``compose_one`` makes of each. It takes a tenth of a second each time, so:
#
#   1. Lines that are the same are composed once.
#   2. Cells that differ in the values of the same keys alone are composed once, without these values, which
#      are set afterwards. Such a key is no group, is nowhere added or removed, and nothing above or below it
#      is overridden.
#   3. They are resolved once, too, and the values put into copies, where nothing is computed from these keys.
#   4. Wherever that fails, the cell is composed alone, so that its error is the one that a user knows.
#   5. Cells that are the same run, as all spot modes are with distiller=none, come once, by the first line.
def compose_cells(lines: Sequence[Overrides], shared: Sequence[str]) -> list[tuple[Overrides, Config]]:
    """Lines with their resolved configurations. ``shared``: overrides that stand before each line."""
    lines = list(dict.fromkeys(lines))
    parser = OverridesParser.create()
    # Thousands of lines combine a few dozen texts.
    texts = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    known = dict(zip(texts, parser.parse_overrides(texts), strict=True))
    parsed = {line: [known[text] for text in line] for line in lines}
    swept = _swept_keys(list(parsed.values()))
    alike: dict[Overrides, list[tuple[Overrides, list[Override]]]] = defaultdict(list)
    for line, own in parsed.items():
        shape = tuple(each.key_or_group if each.key_or_group in swept else each.input_line for each in own)
        alike[shape].append((line, [each for each in own if each.key_or_group in swept]))
    tasks = [
        (tuple(text for text in shape if text not in swept), shared, members)
        for shape, members in alike.items()
    ]
    by_line = {cell[0]: cell for cells in _in_processes(_compose_group, tasks, len(lines)) for cell in cells}
    distinct = {_run_of(by_line[line][1]): by_line[line] for line in reversed(lines)}
    return list(distinct.values())[::-1]


class _FilesReadOnce(ConfigRepository):
    """Hydra's repository of configurations, which reads each file once.

    Hydra's own reads it anew for each composition.
    """

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.known: dict[str, bytes] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Composing changes what it gets, so each gets its own: pickled, in a fifth of the time of a copy."""
        if config_path not in self.known:
            self.known[config_path] = pickle.dumps(super().load_config(config_path))
        return pickle.loads(self.known[config_path])

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FilesReadOnce":
        """A copy that shares what was read.

        Hydra takes one for each composition, in which it may look elsewhere.
        """
        own = memo[id(self)] = copy.copy(self)  # some sources know their repository
        own.sources = copy.deepcopy(self.sources, memo)
        return own


@contextmanager
def _files_read_once() -> Iterator[None]:
    loader = GlobalHydra.instance().config_loader()
    before = loader.repository
    loader.repository = _FilesReadOnce(loader.config_search_path)
    try:
        yield
    finally:
        loader.repository = before


def _in_processes(function: Callable[..., T], tasks: Sequence[tuple], cells: int) -> list[T]:
    """Call ``function`` with each task's arguments, and list what it returns.

    As many processes as there are cores do it where that pays.
    """
    processes = min(os.cpu_count() or 1, len(tasks))
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if cells < CELLS_WORTH_A_POOL or processes == 1 or not can_fork:
        return list(itertools.starmap(function, tasks))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), as_by_default) as pool:
        chunk = max(1, len(tasks) // (8 * processes))
        return list(pool.map(function, *zip(*tasks, strict=True), chunksize=chunk))


def _run_of(config: Config) -> tuple[str, str]:
    return config["runs"], digest(config)


def _swept_keys(lines: Sequence[Sequence[Override]]) -> set[str]:
    """Keys whose values differ between cells and can be set afterwards (case 2)."""
    groups = set(GlobalHydra.instance().config_loader().list_groups(""))
    texts: dict[str, set[str]] = defaultdict(set)
    plain: dict[str, bool] = defaultdict(lambda: True)
    for override in itertools.chain.from_iterable(lines):
        key = override.key_or_group
        texts[key].add(override.input_line)
        plain[key] &= (
            override.type == OverrideType.CHANGE and "/" not in key and "@" not in override.input_line
        )
    swept = {key for key, seen in texts.items() if len(seen) > 1 and plain[key] and key not in groups}
    return {key for key in swept if not any(_related(key, other) for other in texts if other != key)}


def _related(key: str, other: str) -> bool:
    return f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}.")


def _compose_group(
    base: Overrides, shared: Sequence[str], members: Sequence[tuple[Overrides, list[Override]]]
) -> list[tuple[Overrides, Config]]:
    """Compose cells that have ``base`` in common (cases 2 to 4).

    ``members``: their lines, and what else these have.
    """
    composed = resolved = None
    cells = []
    for line, others in members:
        values = {override.key_or_group: override.value() for override in others}
        try:
            if composed is None:
                composed = _composed([*shared, *base])
            if resolved is None:
                config = resolve(_with_values(composed, values))
                if not asks_for_rates(composed) and not any(_computed_from(composed, key) for key in values):
                    resolved = config
            else:
                config = with_values(resolved, values)
        except SakdError as error:
            raise _of_cell(error, line) from error
        except (*HYDRAS, OmegaConfBaseException, KeyError):
            config = _composed_alone(line, shared)
        cells.append((line, config))
    return cells


def _with_values(cfg: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        OmegaConf.update(cfg, key, value, merge=True)
    return cfg


def _of_cell(error: SakdError, line: Overrides) -> SakdError:
    return type(error)(f"{error} (cell {' '.join(line)})")


def _computed_from(cfg: DictConfig, key: str) -> bool:
    """True if an interpolation may read ``key``.

    That is one with the name of its root or its leaf in it, or with a computed name; of one that begins where
    it stands, any name of the key's.
    """
    names = key.split(".")
    texts = [
        str(value) for _, value in flatten(OmegaConf.to_container(cfg, resolve=False)) if "${" in str(value)
    ]
    return any(
        "${$" in text or any(name in text for name in (names if "${." in text else (names[0], names[-1])))
        for text in texts
    )


def _composed_alone(line: Overrides, shared: Sequence[str]) -> Config:
    try:
        return compose_one([*shared, *line])
    except SakdError as error:
        raise _of_cell(error, line) from error


def completions(arguments: Sequence[str], begun: str) -> list[str]:
    """How an argument behind ``arguments`` may go on of which ``begun`` is typed, as Hydra tells shells."""
    with _hydra():
        try:
            line = " ".join([*arguments, begun])
            return BashCompletion(GlobalHydra.instance().config_loader())._query("config", line)
        except HYDRAS:
            return []  # in the middle of a line nothing is said of its mistakes


def explain(error: Exception) -> str:
    """Hydra's message about an error, with the nearest key or value that there is."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}: found {error.problem} in line {mark.line + 1}, expected YAML"
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        found = f"found {value!r}, which Hydra cannot read" if equals else "found no value"
        return f"{key}: {found}; expected {key}=VALUE. {QUOTES}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, word = (
            error.missing_cfg_file.rpartition("/")
            if _is_hydras(error)
            else error.missing_cfg_file.partition("/")
        )
        options = sorted({*(error.options or ()), *choices(group)}) if word else []
        expected = f"; expected one of {', '.join(options)}.{did_you_mean(word, options)}" if options else ""
        return f"{lines[0]}{expected}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None:
        siblings = [] if cause.parent_node is None else [key for key in cause.parent_node if key != "hydra"]
        where = f"{cause.full_key}" if cause.full_key else str(cause.key)
        if cause.key in siblings:  # it is the value that does not fit
            return f"{where}: {str(cause).splitlines()[0]}"
        near = did_you_mean(cause.key, siblings) or _elsewhere(str(cause.key), cause.parent_node)
        named = (
            f"expected one of {', '.join(siblings)}" if siblings else f"{where.rpartition('.')[0]} has none"
        )
        return f"no key '{where}'; {named}.{near}"
    return " ".join(lines)


def _elsewhere(key: str, node: Any) -> str:
    """A hint at a key of that name in another node, the nearest to the root: ``lr`` is ``optimizer.lr``."""
    if not OmegaConf.is_config(node):
        return ""
    root = OmegaConf.to_container(node._get_root(), resolve=False)
    paths = [path for path, _ in flatten(root) if path.endswith(f".{key}") and not path.startswith("hydra.")]
    return f" Did you mean '{min(paths, key=lambda path: path.count('.'))}'?" if paths else ""


def _is_hydras(error: MissingConfigException) -> bool:
    return error.missing_cfg_file.startswith("hydra/")
