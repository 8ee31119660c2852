"""The environment that every rank needs, with the reason for each variable, and the file that takes it to other hosts.

The deepspeed launcher hands on only variables that begin with PYTHON, UCX, MV2 or MLFLOW, on GPUs also NCCL. The rest
comes from lines `NAME=value` in a file: `.deepspeed_env`, or as DS_ENV_FILE has it, in the home and the working folder.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.files import replace_file
from tidal_dist.config import Config
from tidal_dist.processes import LAUNCH_ID
from tidal_dist.training.interrupts import JOB_STARTED

ENV_FILE, ENV_FILE_NAME = "DS_ENV_FILE", ".deepspeed_env"

# What is set for a launch, by name.
SET = {
    LAUNCH_ID: "the processes of this launch are found by it on every host",
    JOB_STARTED: "the time limit counts from the first start, over restarts",
    "MASTER_ADDR": "where the ranks meet; this launcher does not tell them",
    "MASTER_PORT": "a port that is free there; this launcher does not tell them",
    "GLOO_SOCKET_IFNAME": "the network that reaches the other hosts; without it gloo may take 127.0.0.1",
    "NCCL_SOCKET_IFNAME": "the network that reaches the other hosts; without it NCCL takes the first one that it finds",
}

# What is handed on where it is set, by pattern; the first that fits counts.
FORWARDED = (
    ("PATH", "ninja and nvcc are found where DeepSpeed compiles its operators"),
    ("LD_LIBRARY_PATH", "libraries are found where they are found here"),
    ("CUDA_HOME", "DeepSpeed compiles its operators for this CUDA"),
    ("DS_ACCELERATOR", "all ranks compute on the same kind of device"),
    ("DS_*", "a setting of DeepSpeed"),
    ("OMP_*", "threads of a rank"),
    ("MKL_*", "threads of a rank"),
    ("CUDA_DEVICE_MAX_CONNECTIONS", "order of kernels on a GPU"),
    ("CUDA_LAUNCH_BLOCKING", "order of kernels on a GPU"),
    ("TORCH_*", "a setting of PyTorch"),
    ("TORCHINDUCTOR_*", "a setting of PyTorch's compiler"),
    ("TRITON_*", "a setting of PyTorch's compiler"),
    ("PYTORCH_*", "a setting of PyTorch's memory"),
    ("PYTHON*", "a setting of Python"),
    ("GLOO_*", "a setting of gloo"),
    ("NCCL_*", "a setting of NCCL"),
    ("UCX_*", "a setting of the network"),
    ("FI_*", "a setting of the network"),
    ("TOKENIZERS_PARALLELISM", "threads of the tokenizer"),
    ("HF_*", "a folder or setting of Hugging Face's libraries"),
    ("TMPDIR", "temporary files lie where they lie here"),
)

# What readers of shards in an object store need besides.
_STORES = (
    ("AWS_*", "the shards are in an object store"),
    ("GOOGLE_*", "the shards are in an object store"),
    ("AZURE_*", "the shards are in an object store"),
    ("http_proxy", "the way to the object store"),
    ("https_proxy", "the way to the object store"),
    ("no_proxy", "the way to the object store"),
)

# Variables of a process or a place, and secrets, which the command line of the launcher would show to everybody.
_LEFT_OUT = ("*SECRET*", "*TOKEN", "*_KEY", "*PASSWORD*", ENV_FILE, "PYTHONSTARTUP", "PYTHONINSPECT", "TORCHELASTIC_*")


def reason_for(name: str) -> str:
    """Why a variable is in the environment of ranks."""
    patterns = [*SET.items(), *FORWARDED, *_STORES]
    return next((reason for pattern, reason in patterns if fnmatchcase(name, pattern)), f"from {ENV_FILE_NAME}")


def environment_for(
    config: Config, interface: str | None = None, variables: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What every rank should have.

    Args:
        interface: the network that reaches the other hosts; none: there are none, or each rank finds its own.
        variables: of this process.
    """
    patterns = FORWARDED + (_STORES if "://" in config.data.shards else ())
    found = {name: value for name, value in sorted(variables.items()) if value and _fits(name, patterns)}
    binaries = str(Path(sys.executable).parent)
    if binaries not in found.get("PATH", "").split(os.pathsep):
        found["PATH"] = os.pathsep.join([binaries, *filter(None, [found.get("PATH")])])
    if interface:
        found = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} | found
    return found


def patterns_to_compare() -> tuple[list[str], list[str]]:
    """Patterns of variables that all hosts should have alike, and of those among them that nobody must see."""
    return [pattern for pattern, _ in FORWARDED], list(_LEFT_OUT)


def withheld(config: Config, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Names of secrets that ranks may need, but that are not handed on; each host must have its own."""
    patterns = ("HF_*", "AWS_*", "GOOGLE_*", "AZURE_*") if "://" in config.data.shards else ("HF_*",)
    return sorted(n for n in variables if any(fnmatchcase(n, p) for p in patterns) and _is_left_out(n))


def _fits(name: str, patterns: Sequence[tuple[str, str]]) -> bool:
    return not _is_left_out(name) and any(fnmatchcase(name, pattern) for pattern, _ in patterns)


def _is_left_out(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LEFT_OUT)


def env_files(variables: Mapping[str, str] = os.environ) -> list[Path]:
    """The files that the launcher reads, those that are there; what a later one says counts."""
    name = variables.get(ENV_FILE, ENV_FILE_NAME)
    found = [folder / name for folder in (Path("~").expanduser(), Path.cwd())]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def read_env_file(path: Path) -> dict[str, str]:
    """The lines of a file as they are, by variable; the shells of other hosts will read them.

    Raises:
        UserError: the launcher could not read it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read ({getattr(error, 'strerror', error)})") from None
    found = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            raise UserError(f"{path}:{number}: {line!r}: write NAME=value, with no comments or empty lines")
        found[name.strip()] = value.strip()
    return found


def kept_lines(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The lines of all files that the launcher reads, by variable.

    Raises:
        UserError: of `read_env_file`.
    """
    return {name: value for path in env_files(variables) for name, value in read_env_file(path).items()}


def write_env_file(path: Path, environment: Mapping[str, str], kept: Mapping[str, str] | None = None) -> None:
    """Write a file from which every rank gets `environment` with the pdsh launcher.

    Args:
        kept: lines of `read_env_file`, which stay as they are and come before what `environment` says.

    Raises:
        UserError: a value cannot be handed on, or the file cannot be written.
    """
    lines = {name: _line_value(name, value) for name, value in environment.items()} | dict(kept or {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(f"{name}={value}\n" for name, value in lines.items()).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from None


def _line_value(name: str, value: str) -> str:
    """The value such that the launcher's double quotes, pdsh's placeholders and a shell leave it as it was."""
    if value != value.strip() or "\n" in value:
        raise UserError(f"{name}={value!r}: no launcher hands on line breaks, or spaces at an end; unset it here")
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")


def differences(environment: Mapping[str, str], kept: Mapping[str, str]) -> list[str]:
    """Where lines of a user's file say something else, for people."""
    return [
        f"{name}={kept[name]} as in {ENV_FILE_NAME}; without that it would be {value}"
        for name, value in environment.items()
        if name in kept and kept[name] != _line_value(name, value)
    ]
