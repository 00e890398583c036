"""The gradients of a step of two processes that share the model by `fully_shard`; one process has no images.

python -m torch.distributed.run --nproc-per-node 2 -m tests.valm.training.sharded
"""

import datetime

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.tolerance import assert_agree
from tests.valm.training.documents import TOKENIZER, Vectors, documents
from tests.valm.training.test_train import augmented
from valm.model.augment import fusion_module
from valm.training.collate import Collator


def batch(rank):
    made = documents(count=2, seed=rank)
    if rank == 0:
        made = [document | {"image_ids": np.full_like(document["image_ids"], -1)} for document in made]
    return Collator(TOKENIZER, Vectors())(made)


def with_biases():
    model = augmented().requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in fusion_module(model).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model, whole = with_biases(), with_biases()
    for part in (fusion_module(model), *model.model.layers):  # the fusion separately, as a policy by size does
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(**batch(dist.get_rank())).loss.backward()
    for rank in range(2):
        (whole(**batch(rank)).loss / 2).backward()
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert_agree(parameter.grad.full_tensor(), expected[name].grad, name)
    assert expected[next(name for name in expected if "image_fusion.proj" in name)].grad.any()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
