"""`tidal_dist.load`. Importing this costs nothing: PyTorch comes with the first call."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tidal_dist.loaded import Tidal


def load(path: str | Path, device: str = "auto", dtype: "str | torch.dtype | None" = None) -> "Tidal":
    """Open an exported model: `tidal_dist.load("exported").generate("12 + 34 =")`.

    Args:
        path: the folder that `tidal export` wrote.
        device: "cpu", "cuda", "cuda:1" ...; "auto": a GPU if there is one.
        dtype: of the weights and of the arithmetic: "fp32", "bf16" or "fp16"; none: as they are stored.

    Raises:
        UserError: the folder holds no whole export, or there is no such device or dtype.
    """
    from tidal_dist.loaded import open_export

    return open_export(path, device, dtype)
