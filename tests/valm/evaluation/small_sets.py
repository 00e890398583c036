"""Every evaluation set with a few rows, in files like the real ones."""

import json
from pathlib import Path

from valm.evaluation.sets import SETS


def write_sets(root: Path) -> None:
    things = ["banana yellow", "apple red", "sky blue", "cloud white"]
    contents = {
        "memory_color": "Index,Descriptor,Item,Color\n"
        + "\n".join(f"{i},a,{','.join(row.split())}" for i, row in enumerate(things)),
        "color_terms": "object,color\n" + "\n".join(",".join(row.split()) for row in things),
        "relative_size": "bus cat\ncat fly\nbus fly",
        "sst2": "1 lovely .\n0 dull .\n1 a joy .",
        "mpqa": "very good\nfine",
        "ag_news": '"1","The match was won."\n"2","Shares fell, again."',
        "dbpedia": '"1","A painter."\n"2","An oak, a tree."',
        "lambada": "\n".join(json.dumps({"text": line}) for line in ("the sky is blue", "this is a red apple")),
        "wikitext103": " = Title = \n One line . \n\n = = Part = = \n Another . \n = Second = \n Third . ",
    }
    for name in ("vicomte_color", "object_shape", "vicomte_material", "vicomte_size"):
        answer = {"vicomte_color": "red", "object_shape": "round", "vicomte_material": "wood", "vicomte_size": "ant"}
        contents[name] = "\n".join(json.dumps({"sub": thing, "obj": answer[name]}) for thing in ("desk", "bus"))
    for name, content in contents.items():
        file = root / SETS[name].file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    (root / "nlu/mpqa.neg").write_text("awful")
    (root / "nlu/agnews_meta.txt").write_text("1: Sports\n2: Business\n#train: 9")
    (root / "nlu/dbpedia_meta.txt").write_text("1: Artist\n2: Plant")
