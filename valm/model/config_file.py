"""What the config.json of a model with images says to transformers, and the file that an adapter has instead."""

from __future__ import annotations

from contextvars import ContextVar

# Of a VaLM, and of a decoder that `valm.augment` made one that takes images.
MODEL_TYPE = "valm"

# Of an adapter (`valm.model.adapter`), whose base model has the config.
ADAPTER_FILE = "image_fusion.json"

# The entry of a config in which transformers looks for the name of its weights. In the file of a model with images it
# has this sentence, so a class of transformers raises it instead of loading the model without its images.
WEIGHTS_KEY = "transformers_weights"
NO_WEIGHTS = (
    "this model takes images, which only its own class reads: load it by valm.load or, after `import valm`, by "
    "AutoModelForCausalLM"
)

# Whether a class that takes images is reading the weights, and not another class that was given its config.
reads_images: ContextVar[bool] = ContextVar("reads_images", default=False)
