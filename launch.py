"""The one entry point: a composed configuration becomes networks, distillers, a spot mode and a trainer, in a tracked run.

    python launch.py student=vgg8 distiller=sp spot_mode=fixed epochs=10
    python launch.py -m distiller=kd,fitnet,at,sp,pkt spot_mode=fixed,adaptive seed=0,1,2

The same command again resumes a run, or shows its result once it is finished.
"""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sakd import config as configuration
from sakd.allocation import keep_freed_memory
from sakd.errors import SakdError, did_you_mean
from sakd.runs import Run
from sakd.terminal import show_result, start_logging
from sakd.tracking import mirrored, start_mirror

log = logging.getLogger("sakd")

CONF = Path(__file__).parent / "conf"


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """One run."""
    try:
        config = configuration.resolve(cfg)
        run = Run(config)
        result = run.result()
        if result is None:
            from sakd.job import execute  # torch and the rest load only for a run that is not finished

            result = execute(config)
        else:
            log.info("finished before")
            if not mirrored(run.folder, config):
                with run.locked():
                    start_mirror(run.folder, config).close("FINISHED")
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # Hydra tells of the first failure only, and only at the end
            log.error("%s failed: %s", " ".join(HydraConfig.get().overrides.task), error)
        raise
    show_result(result, str(run.folder), config["tracking"].get("uri"))


def choices(group: str) -> list[str]:
    """The files of a group under conf/, also those in its folders, as a command line names them. Hydra lists its own."""
    folder = CONF / group
    return [] if group == "hydra" else [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]


def explain(error: HydraException) -> str:
    """Hydra's message, with the nearest key or value that there is."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, word = error.missing_cfg_file.partition("/")
        options = sorted({*(error.options or ()), *choices(group)})
        return f"{lines[0]}; expected one of {', '.join(options)}.{did_you_mean(word, options)}"
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None:
        siblings = [] if cause.parent_node is None else [key for key in cause.parent_node if key != "hydra"]
        where = f"{cause.full_key}" if cause.full_key else str(cause.key)
        return f"no key '{where}'; expected one of {', '.join(siblings)}.{did_you_mean(cause.key, siblings)}"
    return " ".join(lines)


def run() -> None:
    """Run ``main``; what the user can mend ends as one message and exit code 1."""
    configuration.register_resolvers()
    start_logging()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the handlers below whole
    # Idle OpenMP threads give way soon: where runs share cores, spinning ones make them several times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    keep_freed_memory()
    try:
        main()
    except SakdError as error:
        sys.exit(f"error: {error}")
    except HydraException as error:
        sys.exit(f"error: {explain(error)}")
    except KeyboardInterrupt as interruption:
        name = str(interruption) or "SIGINT"
        log.warning("interrupted (%s); the same command goes on from the last checkpoint", name)
        sys.exit(130)


if __name__ == "__main__":
    run()
