"""Imports follow the arrows of the design: valm's folders use only those below them, valm_kernels knows no valm."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import valm_kernels

ROOT = Path(__file__).parent.parent
# Folders and modules of valm from the top down. One may import from its own layer and from those below.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"pictures"},
    {"evaluation", "explain", "serving", "training"},
    {"model"},
    {"corpus"},
    {"retrieval"},
    {"knowledge_base"},
    {"clip"},
    {"store"},
    {"options"},
    {"errors", "progress", "text"},
]
LAYER = {unit: number for number, layer in enumerate(LAYERS) for unit in layer}
# valm/__init__.py names the public API and imports it when it is asked for.
LAYER["__init__"] = 0


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every module of a package with its file, by its full name; a package by its own, without `.__init__`."""
    names = {}
    for file in (root / package).rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports(file: Path, late: bool = True) -> Iterator[str]:
    """What a file imports, `from a import b` as "a.b"; where `late`, also inside functions and for type checkers.

    In valm imports have the full name. In valm_kernels they are relative, because a kernel hub gives each copy of it a
    name of its own, and begin with a dot here.
    """
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if late or not (for_types or isinstance(node, ast.FunctionDef | ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))


def unit(name: str) -> str:
    """The folder or module right below valm: "store" of "valm.store.shards.Runner"."""
    return name.split(".")[1] if "." in name else "__init__"


def wrong_arrows(root: Path) -> list[str]:
    found = []
    for name, file in sorted(modules(root, "valm").items()):
        for target in imports(file):
            if target.partition(".")[0] != "valm":
                continue
            if unit(target) not in LAYER or LAYER[unit(target)] < LAYER[unit(name)]:
                found.append(f"{name} imports {target}")
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """Which modules of valm each of them imports."""
    files = modules(root, "valm")
    arrows = {}
    for name, file in files.items():
        targets = {t if t in files else t.rpartition(".")[0] for t in imports(file)}
        arrows[name] = targets & files.keys()
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle of imports, empty where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def folders(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders, without the imports inside each."""
    between: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        if name != "valm":
            between.setdefault(unit(name), set()).update(unit(t) for t in targets if unit(t) != unit(name))
    return between


def private_imports(root: Path) -> set[str]:
    """What valm imports of valm_kernels beside its public names."""
    public = {f"valm_kernels.{name}" for name in valm_kernels.__all__} | {"valm_kernels"}
    # how files are written and read and threads share an object, in both; and what is for text towers alone, which is
    # no public operation
    files = ("valm_kernels.atomic_files", "valm_kernels.checksums", "valm_kernels.json_files")
    shared = (
        *files,
        "valm_kernels.memory_maps",
        "valm_kernels.locks",
        "valm_kernels.int8_rows",
        "valm_kernels.text_blocks",
    )
    found = {target for file in modules(root, "valm").values() for target in imports(file)}
    return {t for t in found if t.partition(".")[0] == "valm_kernels" and not t.startswith(shared)} - public


def test_every_arrow_points_down():
    assert wrong_arrows(ROOT) == []
    units = {unit(name) for name in modules(ROOT, "valm")} - {"__init__"}
    assert units <= LAYER.keys(), "name its place in LAYERS"


def test_no_circles():
    """Not even by an import inside a function. `valm` itself names its public modules for type checkers."""
    arrows = graph(ROOT)
    assert circle(folders(arrows)) == []
    assert circle({name: targets for name, targets in arrows.items() if name != "valm"}) == []


def test_imports_of_valm_have_the_full_name():
    names = {target for file in modules(ROOT, "valm").values() for target in imports(file)}
    assert [name for name in names if name.startswith(".")] == []


def test_the_kernels_know_no_valm_and_not_their_own_name():
    names = {target for file in modules(ROOT, "valm_kernels").values() for target in imports(file)}
    assert [name for name in names if name.partition(".")[0] in ("valm", "valm_kernels")] == []


def test_the_kernels_are_imported_with_torch_alone():
    """What a kernel hub asks for. Triton is in a folder that is imported when it is used, files are numpy's."""
    allowed = {"triton": {"triton"}, "storage.py": {"numpy"}}
    for file in modules(ROOT, "valm_kernels").values():
        here = allowed.get(file.parent.name, allowed.get(file.name, set()))
        packages = {name.partition(".")[0] for name in imports(file, late=False) if not name.startswith(".")}
        assert packages - sys.stdlib_module_names <= {"torch"} | here, file


def test_valm_uses_the_public_names_of_the_kernels():
    assert private_imports(ROOT) == set()


@pytest.fixture
def planted(tmp_path):
    """Writes a small valm: file -> content."""

    def plant(files: dict[str, str]) -> Path:
        for name, content in files.items():
            (tmp_path / "valm" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "valm" / name).write_text(content)
        return tmp_path

    return plant


def test_a_planted_arrow_up_is_found(planted):
    root = planted(
        {
            "cli/kb.py": "from valm.store.shards import Runner",
            "store/shards.py": "def late():\n    import valm.cli.kb",
            "clip/clip.py": "from valm.nowhere import x",
            "model/gpt2.py": "from valm import Clip",
        }
    )
    assert wrong_arrows(root) == [
        "valm.clip.clip imports valm.nowhere.x",
        "valm.model.gpt2 imports valm.Clip",
        "valm.store.shards imports valm.cli.kb",
    ]


def test_planted_circles_are_found(planted):
    root = planted({"training/a.py": "from valm.explain.b import x", "explain/c.py": "from valm.training import a"})
    planted({"explain/b.py": "y = 1"})
    assert wrong_arrows(root) == [] and circle(graph(root)) == []
    assert set(circle(folders(graph(root)))) == {"explain", "training"}
    planted({"store/a.py": "import valm.store.b", "store/b.py": "from valm.store.a import x"})
    for found in ("from valm.store.a import x", "def f():\n    from valm.store.a import x"):
        planted({"store/b.py": found})
        assert set(circle(graph(root))) == {"valm.store.a", "valm.store.b"}


def test_a_planted_private_import_is_found(planted):
    root = planted({"model/gpt2.py": "from valm_kernels import ip_topk\nfrom valm_kernels.topk.cpu import search"})
    assert private_imports(root) == {"valm_kernels.topk.cpu.search"}
