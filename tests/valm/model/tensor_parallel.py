"""Compares a step of an augmented model whose attention heads are divided among two processes with one process.

python -m torch.distributed.run --nproc-per-node 2 -m tests.valm.model.tensor_parallel FOLDER
"""

import datetime
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig

from tests.valm.model.decoders import IMAGE_DIM, IMAGES, augmented, random_ids, random_images, tiny_llama
from valm.errors import ValmError
from valm.model.adapter import save_adapter
from valm.model.augment import augment, fusion_module

DIVIDED = DistributedConfig(tp_plan="auto", tp_size=2)


def opened(folder, **arguments):
    """In float64, so that a wrong gradient does not pass as rounding."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **arguments)


def step(model):
    """The logits, and the gradients of the fusion by name."""
    ids, images = random_ids(2, 9), random_images(2, 9)
    out = model(ids, labels=ids, **images)
    out.loss.backward()
    return {"logits": out.logits} | {name: p.grad for name, p in fusion_module(model).named_parameters()}


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    if dist.get_rank() == 0:
        augmented().save_pretrained(f"{folder}/whole")
        tiny_llama().save_pretrained(f"{folder}/base")
    dist.barrier()
    model = opened(f"{folder}/whole", distributed_config=DIVIDED)
    assert isinstance(model.model.layers[1].self_attn.q_proj.weight, DTensor)
    torch.testing.assert_close(step(model), step(opened(f"{folder}/whole")))
    model.save_pretrained(f"{folder}/again")
    dist.barrier()
    torch.testing.assert_close(step(opened(f"{folder}/again")), step(opened(f"{folder}/whole")))

    with pytest.raises(ValmError, match=r"weight of the model is divided among processes .* before dividing it"):
        save_adapter(model, f"{folder}/adapter")
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", distributed_config=DIVIDED)
    with pytest.raises(ValmError, match=r"weight of the model is divided among processes .* before dividing it"):
        augment(base, IMAGE_DIM, IMAGES)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
