"""The device that a name stands for."""

import torch

from tidal_dist.errors import UserError


def available_device(name: str, where: str) -> str:
    """The name of a device that works here; "auto" is a GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device; `where` says who asked for it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} {name}: not available ({reason}); try {where} cpu") from None
    return name
