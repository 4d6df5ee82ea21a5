"""A composed configuration becomes a tracked run of a trainer: `python launch.py`, and `sakd launch`."""

import logging
import os
import re
import sys
from shlex import quote
from traceback import walk_tb

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from yaml import YAMLError

from sakd.configuration import Config, without_effect
from sakd.configuration.arguments import refuse_merged, understood, warn_of_two_values
from sakd.configuration.compose import explain, launcher_node, register_plugins, register_resolvers, resolve
from sakd.configuration.fits import check_node
from sakd.configuration.groups import CONF
from sakd.credentials import hidden, remember_typed
from sakd.errors import ConfigError, SakdError, in_one_line
from sakd.process import set_up
from sakd.runs import Run
from sakd.runs.optimized import is_share_of_images, optimized
from sakd.runs.tracking import Delivery, open_command, page_of
from sakd.signals import ended_in_order, told_if_finished
from sakd.terminal import show_result, start_logging

log = logging.getLogger("sakd")

MULTIRUN = {"-m", "--multirun"}


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float:
    """Carry out one run, or show the result of a finished one; returns what ``optimized_metric`` names.

    That is for sweepers that look for better values, such as Optuna's.
    """
    try:
        _check_mode(HydraConfig.get())
        config = resolve(cfg)
        _check_direction(HydraConfig.get(), config)
        for line in without_effect(config, HydraConfig.get().overrides.task):
            log.warning("%s: without effect, distiller=none learns from no teacher", line)
        run = Run(config)
        result = run.result()
        with told_if_finished(lambda: (run.folder / "result.json").exists()):
            if result is None:
                from sakd.runs.job import execute  # torch loads only for a run that is not finished

                result = execute(config)
            else:
                log.info("finished before")
                Delivery().catch_up(run)
        epochs = run.metrics()
        found = optimized(config, result, epochs)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            # By a foreign launcher: Hydra tells of the first failure only, and only at the end.
            log.error("%s failed: %s", " ".join(HydraConfig.get().overrides.task), error)
        elif isinstance(error, SakdError):
            sys.exit(hidden(f"error: {error}"))  # here: what passes Hydra gets a line of Hydra's before it
        raise
    uri = config["tracking"].get("uri")
    see_it = None if uri is None else open_command(uri)
    show_result(result, str(run.folder), see_it, epochs, _pictures(run))
    if uri is not None and (address := page_of(run.folder, uri)):
        log.info("its page: %s", address)
    return found


def _pictures(run: Run) -> str | None:
    """The command that shows who was kept where, if the run has a record of it."""
    recorded = (run.folder / "spots.npz").exists()
    return f"sakd spots {quote(str(run.folder))} --output pictures" if recorded else None


def _check_mode(hydra_config: DictConfig) -> None:
    """Raise ConfigError where what is for a sweep's cells would end as one run, here and now.

    Also where files were merged that cannot be.
    """
    refuse_merged(hydra_config.runtime.choices)
    sweep, launcher = (hydra_config.runtime.choices.get(group) for group in ("sweeps", "hydra/launcher"))
    if hydra_config.mode == RunMode.RUN and (sweep is not None or launcher != "basic"):
        found = f"hydra/launcher: found {launcher}" if sweep is None else f"sweeps: found {sweep}"
        raise ConfigError(f"{found} for one run, expected -m before it, for a sweep's cells")
    check_node(launcher_node(hydra_config), "hydra.launcher", leave=())


def _check_direction(hydra_config: DictConfig, config: Config) -> None:
    """Raise ConfigError where a sweeper would look for the worst: Optuna's minimizes unless it is told."""
    direction = str(hydra_config.get("sweeper", {}).get("direction")).rpartition(".")[2]
    if direction == "minimize" and is_share_of_images(config):
        raise ConfigError(
            f"hydra.sweeper.direction: found minimize, expected maximize for "
            f"{config.get('optimized_metric') or 'accuracy'}, or another optimized_metric"
        )


def run() -> None:
    """Run ``main``; what the user can mend ends as one message and exit code 1."""
    register_resolvers()
    register_plugins()
    sys.argv[1:] = map(remember_typed, sys.argv[1:])
    start_logging()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the handlers below whole
    set_up()
    try:
        with ended_in_order("the same command goes on from the last checkpoint"):
            warn_of_two_values(sys.argv[1:])
            # Between overrides, argparse would not know what comes behind it.
            sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)
            sys.argv[1:] = understood(sys.argv[1:], multirun=not MULTIRUN.isdisjoint(sys.argv))
            main()
    except SakdError as error:
        sys.exit(hidden(f"error: {error}"))
    except (HydraException, YAMLError) as error:
        sys.exit(hidden(f"error: {explain(error)}"))
    except Exception as error:
        if not _is_of_the_command_line(error):
            raise
        if "'sakd.sweeps." in str(error):  # only our sweeper hands cells over to our launchers
            sys.exit("error: hydra/launcher: found one for sweeps of hydra/sweeper=sakd, expected basic")
        sys.exit(hidden(f"error: {in_one_line(error)}; found in {' '.join(sys.argv[1:])}"))


def _is_of_the_command_line(error: Exception) -> bool:
    """True for what Hydra raises while it composes: of some arguments it only asserts that they fit.

    Also for what a foreign sweeper or launcher raises outside of runs, of its own keys.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    modules = [frame.f_globals["__name__"] for frame in frames]
    by_hydra = modules[-1].partition(".")[0] in ("hydra", "omegaconf")
    by_plugin = any(re.match(r"hydra_plugins\.(?!sakd\b)", module) for module in modules)
    return (by_hydra or by_plugin) and all(frame.f_code is not main.__wrapped__.__code__ for frame in frames)
