"""Trains as one of several processes, and writes the documents read and the losses into a folder as JSON.

python -m torch.distributed.run --nproc-per-node 2 -m tests.valm.training.process FOLDER FIELDS
"""

import json
import sys
from pathlib import Path

import torch

from tests.valm.training.documents import TOKENIZER, Read, documents, new_model, new_trainer

STEPS = 50


def unequal_documents(count, seed=0):
    """Documents of 3 to 12 tokens, not ordered by length."""
    made = documents(count=count, seed=seed)
    for number, document in enumerate(made):
        for name, values in document.items():
            document[name] = values[: 3 + 5 * number % 10]
    return made


def train(folder, fields):
    """Trains 50 steps of four documents in all, evaluates on seven, and writes the model and `process-RANK.json`."""
    dataset = Read(unequal_documents(21))
    model = new_model(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    resume = fields.pop("resume_from_checkpoint", None)
    made = new_trainer(
        folder, model=model, dataset=dataset, eval_dataset=unequal_documents(7, seed=1), max_steps=STEPS, **fields
    )
    dataset.read.clear()
    result = made.train(resume_from_checkpoint=resume)
    read = dataset.read[:]
    evaluated = made.evaluate()
    made.write(folder / "model", TOKENIZER)
    found = {
        "read": read,
        "steps": result.global_step,
        "losses": made.losses(),
        "eval_loss": evaluated["eval_loss"],
        "processes": made.args.world_size,
    }
    (folder / f"process-{made.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), json.loads(sys.argv[2]))
