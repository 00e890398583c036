"""Where texts or images are encoded, and by which CLIP: options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.errors import ValmError
from valm.options import check_fields, option

if TYPE_CHECKING:
    import torch

    from valm.store.shards import Runner


CLIP_HELP = (
    "folder or name of the CLIP, if it has moved since the knowledge base was built; --allow-download loads it from "
    "the hub that the knowledge base names"
)
QUERY_DTYPES = ("float32", "bfloat16", "int8")  # precisions of CLIP's text tower


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where shards are encoded and written. Its fields are options; their help explains them."""

    device: str = option("where models run: cpu, cuda, cuda:1, ...; auto is a GPU if torch finds one, else cpu", "auto")
    ray: str | None = option(
        "run on a Ray cluster: auto, HOST:PORT, or local for only this machine; all machines must see the same files "
        "under the same paths",
        metavar="ADDRESS",
    )
    cpus: int = option("with --ray, cores of each task, which also gets a GPU if --device is a GPU", 1, least=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def opened_device(self) -> torch.device:
        """The device; on a cluster, the device of each task.

        Raises:
            ValmError: there is no such device, or a task has no such device.
        """
        from valm.clip.device import open_device

        device = open_device(self.device)
        if self.ray is not None and device.index:
            raise ValmError(f"--device {device} with --ray: a task has only one GPU, its first: give --device cuda")
        return device

    def runner(self) -> Runner:
        """The runner that writes the shards, here or on the Ray cluster. Errors are those of `RayRun`."""
        if self.ray is None:
            from valm.store.shards import run_here

            return run_here
        from valm.store.ray import RayRun

        return RayRun(self.ray, cpus=self.cpus, gpus=int(self.opened_device().type != "cpu"))
