"""Turns the folders below FOLDER that commit ad5fab6 wrote (a demo's output, a study's) into today's format, in place.

    python -m tests.record.convert FOLDER

Knowledge bases and corpora get their manifest's checksum, models and adapters today's config, weights and places. A
faiss index is not converted: build it again. Nothing else reads these formats, and this is deleted again in the commit
after it.
"""

import json
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from valm.model.config import NO_WEIGHTS, WEIGHTS_KEY
from valm_kernels.checksums import file_sha256, json_sha256

# Entries of an old ValmConfig that are the fusion's now.
RENAMED = {
    "image_dim": "image_dim",
    "num_images": "num_images",
    "fusion_layer": "layer",
    "fusion_scale": "fusion_scale",
    "blind": "blind",
    "image_logit_bias_init": "logit_bias",
    "image_score_scale_init": "score_scale",
    "min_score": "min_score",
}
LAYERS_THAT_DROP = ("NemotronForCausalLM", "StableLmForCausalLM")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(root: Path) -> None:
    renamed: dict[str, str] = {}  # fingerprints of knowledge bases
    manifests = sorted(root.rglob("manifest.json"), key=lambda file: read(file).get("format") != "valm knowledge base")
    for file in manifests:
        convert_store(file, renamed)
    for file in sorted(root.rglob("config.json")):
        if read(file).get("model_type") == "valm":
            convert_model(file, renamed)
    for file in sorted(root.rglob("image_fusion.json")):
        convert_adapter(file, renamed)
    for file in sorted(root.rglob("run.json")):
        file.rename(file.with_name("_run.json"))


def convert_store(file: Path, renamed: dict[str, str]) -> None:
    manifest = read(file)
    if "shards" not in manifest or "sha256" in manifest:
        return
    before = file_sha256(file)
    if manifest["format"] == "valm knowledge base":
        manifest["clip"].setdefault("weight_files", {})
    plan = manifest["plan"]
    plan["knowledge_base"] = renamed.get(plan.get("knowledge_base"), plan.get("knowledge_base"))
    manifest["plan"] = {name: value for name, value in plan.items() if value is not None}
    manifest["sha256"] = renamed[before] = json_sha256(manifest)
    write(file, manifest)
    print(file)


def convert_model(file: Path, renamed: dict[str, str]) -> None:
    config = read(file)
    if "base_config" in config:
        base, fusion = config["base_config"], config["fusion"]
    else:
        fusion = {new: config.pop(old) for old, new in RENAMED.items()}
        config.pop("query_clip", None)
        base = config | {"model_type": "gpt2"}
        head_dim = base["n_embd"] // base["n_head"]
        fusion |= {"architecture": "VaLMForCausalLM", "unfreeze": "all", "width": base["n_embd"]}
        fusion |= {"heads": base["n_head"], "kv_heads": base["n_head"], "key_dim": head_dim, "value_dim": head_dim}
        fusion |= {"norm_eps": base["layer_norm_epsilon"]}
    fusion = of_today(fusion)
    base.pop(WEIGHTS_KEY, None)
    no_weights = {WEIGHTS_KEY: NO_WEIGHTS} if fusion["num_images"] > 0 else {}
    content = {"model_type": "valm", **no_weights, "base_config": base | no_weights, "fusion": fusion}
    if (retrieval := move_note(file.parent, renamed)) is not None:
        content["retrieval"] = retrieval
    write(file, content)
    for weights in file.parent.glob("model*.safetensors"):
        convert_weights(weights, fusion)
    print(file)


def convert_adapter(file: Path, renamed: dict[str, str]) -> None:
    found = read(file)
    if found["format_version"] != 1:
        return
    fusion, base = of_today(found["fusion"]), found["base"]
    retrieval = move_note(file.parent, renamed)
    if base is not None and (file.parent / base).exists():
        places = file.with_name("_retrieval.json")
        write(places, (read(places) if places.exists() else {}) | {"base": base})
        base = None
    write(file, {"format_version": 2, "base": base, "fusion": fusion, "retrieval": retrieval})
    convert_weights(file.with_suffix(".safetensors"), fusion)
    print(file)


def of_today(fusion: dict[str, Any]) -> dict[str, Any]:
    if fusion.pop("fingerprint", None) is not None:
        raise SystemExit("an adapter or model of before the sketch is not converted: save it by ad5fab6 first")
    return fusion | {"layer_drops_images": fusion["architecture"] in LAYERS_THAT_DROP}


def move_note(folder: Path, renamed: dict[str, str]) -> dict[str, Any] | None:
    """Divides retrieval.json into what identifies the images, which is returned, and where they are."""
    file = folder / "retrieval.json"
    if not file.exists():
        return None
    note = read(file)
    note.pop("index", None)
    places = {name: note.pop(name) for name in ("knowledge_base", "clip") if name in note}
    if "knowledge_base" in places:
        note["knowledge_base_name"] = Path(places["knowledge_base"]).name
        note["knowledge_base_sha256"] = renamed.get(note["knowledge_base_sha256"], note["knowledge_base_sha256"])
    write(folder / "_retrieval.json", places)
    file.unlink()
    return note


def convert_weights(file: Path, fusion: dict[str, Any]) -> None:
    """Stores the bias of the scores and their scale as differences from their initial values."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name in list(tensors):
        last = name.rpartition(".")[2]
        if "image_fusion." in name and last in ("logit_bias", "score_scale"):
            tensors[f"{name}_delta"] = tensors.pop(name) - fusion[last]
    save_file(tensors, file, metadata)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
