"""Rows about what is installed on hosts, and how it is set: Python, project, packages, configuration, environment."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tidal_dist.cluster.preflight.rows import EVERYWHERE, Facts, Row, usual

# With another version of these, ranks do not understand each other.
_MUST_AGREE = ("torch", "deepspeed")
_PROGRAMS = {"pdsh": "pdsh", "slurm": "srun"}
_SHOWN_CHARACTERS = 60


def launcher_rows(launcher: str, hosts: int) -> Iterator[Row]:
    """Whether what starts ranks on other hosts is there, here."""
    program = _PROGRAMS.get(launcher, "mpirun")
    if hosts > 1 and shutil.which(program) is None:
        remedy = f"install {program}, or choose another --launcher"
        yield Row(
            EVERYWHERE, "launcher", "fail", f"no {program} here, with which --launcher {launcher} starts ranks", remedy
        )


def python_rows(versions: Mapping[str, str], executable: str) -> Iterator[Row]:
    """versions: of the Python that is started on each host."""
    most = usual(versions)
    for host, version in versions.items():
        if version == most:
            yield Row(host, "python", "ok", version)
            continue
        minor = [part.rsplit(".", 1)[0] for part in (version, most)]
        yield Row(
            host,
            "python",
            "fail" if minor[0] != minor[1] else "warn",
            f"{executable} is Python {version}, on most hosts {most}",
            f"install Python {most} and the same packages there, at the same path",
        )


def project_rows(facts: Facts, folder: str) -> Iterator[Row]:
    """folder: where the project is here."""
    found = {host: fact["project"] for host, fact in facts.items()}
    hashes = {host: project["hash"] for host, project in found.items() if "hash" in project}
    for host, project in found.items():
        remedy = f"`rsync -a --delete {folder}/ {host}:{folder}/`, or install the same version there"
        if problem := project.get("problem"):
            yield Row(host, "project", "fail", f"is missing: {problem}", remedy)
        elif project["hash"] != usual(hashes):
            text = f"another version: {_version(project)} in {project['place']}, on most hosts {usual(hashes)[:12]}"
            yield Row(host, "project", "fail", text, remedy)
        else:
            yield Row(host, "project", "ok", _version(project))


def _version(project: Mapping[str, Any]) -> str:
    return f"{project['version'] or 'not installed'}, source {project['hash'][:12]}"


def package_rows(facts: Facts) -> Iterator[Row]:
    """One row for each package that is another on some host, one for each host where all are as usual."""
    names = sorted({name for fact in facts.values() for name in fact["packages"]})
    most = {name: usual({host: fact["packages"].get(name) for host, fact in facts.items()}) for name in names}
    for host, fact in facts.items():
        odd = [name for name in names if fact["packages"].get(name) != most[name]]
        for name in odd:
            version = fact["packages"].get(name)
            yield Row(
                host,
                "packages",
                "fail" if name in _MUST_AGREE or version is None else "warn",
                f"{name} {version or 'is missing'}, on most hosts {most[name] or 'it is missing'}",
                f"`pip install {name}=={most[name]}` there" if most[name] else f"`pip uninstall {name}` there",
            )
        if not odd:
            shown = [f"{name} {most[name]}" for name in _MUST_AGREE if most.get(name)]
            others = sum(most[name] is not None for name in names) - len(shown)
            yield Row(host, "packages", "ok", ", ".join([*shown, f"{others} others alike"]))


def torch_rows(facts: Facts) -> Iterator[Row]:
    """Whether PyTorch starts, and what it finds."""
    found = {host: fact["torch"] for host, fact in facts.items()}
    kinds = {host: (torch["cuda"], torch["nccl"]) for host, torch in found.items() if "problem" not in torch}
    for host, torch in found.items():
        if problem := torch.get("problem"):
            yield Row(host, "torch", "fail", f"does not start: {problem}", "install the same torch there anew")
            continue
        cuda, nccl = kinds[host]
        if kinds[host] != usual(kinds):
            most = usual(kinds)
            text = f"CUDA {cuda}, NCCL {nccl}; on most hosts CUDA {most[0]}, NCCL {most[1]}"
            yield Row(
                host, "torch", "fail", text, "install the same build of torch on all hosts, and look at the driver"
            )
        elif cuda and not torch["devices"]:
            text = f"built for CUDA {cuda}, but finds no GPU"
            yield Row(host, "torch", "warn", text, "if there should be one: driver and CUDA_VISIBLE_DEVICES there")
        else:
            text = f"CUDA {cuda}, NCCL {nccl}, {torch['devices']} GPUs" if cuda else "for CPUs"
            yield Row(host, "torch", "ok", text)


def config_rows(facts: Facts, config_file: str) -> Iterator[Row]:
    """Whether every host reads the same configuration."""
    found = {host: fact["reads"] for host, fact in facts.items()}
    projects = {host: fact["project"].get("hash") for host, fact in facts.items()}
    hashes = {host: reads["config"] for host, reads in found.items() if "config" in reads}
    for host, reads in found.items():
        if problem := reads.get("config_problem") or reads.get("problem"):
            if projects[host] != usual(projects):
                continue  # another version of the project does not know what it is asked
            yield Row(host, "config", "fail", problem, f"have the project and {config_file} alike on all hosts")
        elif reads["config"] != usual(hashes):
            text = f"{config_file} is another there: {reads['config'][:12]}, on most hosts {usual(hashes)[:12]}"
            yield Row(host, "config", "fail", text, f"copy {config_file} there")
        else:
            yield Row(host, "config", "ok", reads["config"][:12])


def environment_rows(facts: Facts) -> Iterator[Row]:
    """Variables that ranks would have on some hosts otherwise than on most."""
    names = sorted({name for fact in facts.values() for name in fact["environment"]})
    values = {name: {host: fact["environment"].get(name) for host, fact in facts.items()} for name in names}
    for host, fact in facts.items():
        odd = [name for name in names if fact["environment"].get(name) != usual(values[name])]
        for name in odd:
            here, most = (_shown(value) for value in (values[name][host], usual(values[name])))
            remedy = f"set {name} in .deepspeed_env, or alike in the shell's start files there"
            yield Row(host, "environment", "warn", f"{name} {here}; on most hosts {most}", remedy)
        if not odd:
            yield Row(host, "environment", "ok", f"{len(names)} variables alike")


def _shown(value: str | None) -> str:
    if value is None:
        return "is not set"
    return f"is {value if len(value) <= _SHOWN_CHARACTERS else value[:_SHOWN_CHARACTERS] + '...'}"


def env_file_row(host: str, lacking: Sequence[str], differing: Sequence[str]) -> Row:
    """The launcher's own file. lacking: variables that it does not have. differing: lines that say something else."""
    if differing:
        return Row(host, "env file", "warn", "; ".join(differing), "remove these lines, or mean them")
    if lacking:
        text = f".deepspeed_env lacks {', '.join(lacking)}: `tidal launch` hands them on, `deepspeed` does not"
        return Row(host, "env file", "ok", f"{text} (--fix writes them)")
    return Row(host, "env file", "ok", ".deepspeed_env has what ranks need")
