"""Print a job for Kubernetes: `python -m launch.recipes jobset --config configs/1b.yaml --nodes 4 > jobset.yaml`.

`job`: an indexed Job and its Service, which any cluster has; `jobset`: starts all pods again together, and needs the
JobSet controller; `mpijob`: Kubeflow's, with ssh between the pods. Overrides of the configuration come behind `--`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from data_pipeline.errors import UserError
from tidal_dist.cluster import recipes
from tidal_dist.cluster.recipes import Recipe, Volume
from tidal_dist.cluster.supervisor import USER_ERROR
from tidal_dist.commands.output import check_range
from tidal_dist.config import load_config

KINDS = {"job": recipes.job, "jobset": recipes.jobset, "mpijob": recipes.mpijob}


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    default = Recipe()
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("kind", choices=KINDS)
    arguments.add_argument("--config", default=default.config, help="YAML file of the run, here and in the image")
    arguments.add_argument("--name", default=default.name, help="of the job and its pods")
    arguments.add_argument("--nodes", type=int, default=default.nodes, help="pods")
    arguments.add_argument("--gpus", type=int, default=default.gpus, help="of each pod; 0: one rank on its CPUs")
    arguments.add_argument("--image", default=default.image, help="has this repository and what it needs")
    arguments.add_argument("--folder", default=default.folder, help="where the image has the repository")
    arguments.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="that all pods can write; once or more (default: tidal-runs:runs)",
    )
    arguments.add_argument("--shm-gb", type=int, default=default.shm_gb, help="memory of a pod for /dev/shm")
    arguments.add_argument("--restarts", type=int, default=default.restarts, help="of the whole job at most")
    arguments.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every rank")
    arguments.add_argument("overrides", nargs="*", metavar="section.key=value", help="override the configuration")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; 0, or 2 for an error the user can mend."""
    arguments = parser().parse_intermixed_args(argv)
    try:
        recipe = _recipe(arguments)
        config = load_config(recipe.config, recipe.overrides)
        recipe.check(config)
        print(as_yaml(KINDS[arguments.kind](recipe, config)), end="")
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def _recipe(arguments: argparse.Namespace) -> Recipe:
    check_range("--nodes", arguments.nodes, 1, float("inf"))
    check_range("--gpus", arguments.gpus, 0, 256)
    return Recipe(
        config=arguments.config,
        overrides=tuple(arguments.overrides),
        name=arguments.name,
        nodes=arguments.nodes,
        gpus=arguments.gpus,
        image=arguments.image,
        folder=arguments.folder,
        volumes=tuple(Volume(*_pair(v, ":", "--volume", "CLAIM:PATH")) for v in arguments.volume) or Recipe().volumes,
        shm_gb=arguments.shm_gb,
        restarts=arguments.restarts,
        variables=dict(_pair(v, "=", "--env", "NAME=VALUE") for v in arguments.env),
    )


def _pair(text: str, mark: str, option: str, form: str) -> tuple[str, str]:
    first, _, second = text.partition(mark)
    if not first or not second:
        raise UserError(f"{option} {text}: write {form}")
    return first, second


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """The documents of one file, scripts as blocks of lines."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it is read."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_Dumper.add_representer(str, _Dumper.represent_str)


if __name__ == "__main__":
    sys.exit(main())
