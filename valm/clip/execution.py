"""Where texts or images are encoded, and by which CLIP: options that are the same in every command that has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from valm.errors import ValmError
from valm.options import check_fields, option

if TYPE_CHECKING:
    import torch

    from valm.store.shards import Runner


CLIP_HELP = (
    "the CLIP, where it is no longer where the knowledge base found it; with --allow-download it comes from the hub "
    "that the knowledge base names"
)
QUERY_DTYPES = ("float32", "bfloat16", "int8")  # precisions of CLIP's text tower


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where shards are encoded and written. Its fields are options, whose help says what they are."""

    device: str = option("where the models run: cpu, cuda, cuda:1, ...; auto takes a GPU where torch has one", "auto")
    ray: str | None = option(
        "do it on a Ray cluster: auto, HOST:PORT, or local for one of this machine; all its machines must see the same "
        "files under the same paths",
        metavar="ADDRESS",
    )
    cpus: int = option("with --ray, cores of each task; it has a GPU too if --device is one", 1, least=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def opened_device(self) -> torch.device:
        """The device, on a cluster that of each task.

        Raises:
            ValmError: there is no such device, or no task has it.
        """
        from valm.clip.device import open_device

        device = open_device(self.device)
        if self.ray is not None and device.index:
            raise ValmError(f"--device {device} with --ray: a task has one GPU, which is its first: give --device cuda")
        return device

    def runner(self) -> Runner:
        """What writes the shards.

        Raises:
            ImportError, ValmError: as `RayRun` does.
        """
        if self.ray is None:
            from valm.store.shards import run_here

            return run_here
        from valm.store.ray import RayRun

        return RayRun(self.ray, cpus=self.cpus, gpus=int(self.opened_device().type != "cpu"))
