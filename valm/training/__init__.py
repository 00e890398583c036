"""Training: `trainer` makes a transformers Trainer for models that take images."""

from valm.training.train import trainer, training_arguments

__all__ = ["trainer", "training_arguments"]
