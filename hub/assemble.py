"""Assembles valm_kernels as a kernel of a kernel hub: `make hub-kernel`, or python -m hub.assemble FOLDER.

The folder is both a project for kernel-builder (build.toml, CARD.md, flake.nix, torch-ext/) and, under build/, what
kernel-builder makes of a kernel without native code, so that `kernels.get_local_kernel` loads it. The layout is that of
https://huggingface.co/docs/kernels/kernel-requirements.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

HUB = Path(__file__).parent
PACKAGE = HUB.parent / "valm_kernels"
# As in build.toml, which Python 3.10 cannot read; a test compares them.
NAME, VERSION, LICENSE, BACKENDS = "valm-kernels", 0, "mit", ("cpu", "cuda")
MODULE = NAME.replace("-", "_")

# Earlier versions of `kernels` look for a folder of the kernel's name.
NAMED_FOLDER = '''"""The kernel one folder up, for versions of `kernels` that look for it here."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location(f"{__name__}_kernel", Path(__file__).parent.parent / "__init__.py")
sys.modules[_spec.name] = _kernel = module_from_spec(_spec)
_spec.loader.exec_module(_kernel)
globals().update(vars(_kernel))
'''


def assemble(folder: Path) -> None:
    """Writes the kernel into `folder`.

    Raises:
        FileExistsError: there is such a file or folder.
    """
    folder.mkdir(parents=True)
    for name in ("build.toml", "CARD.md", "flake.nix"):
        shutil.copy(HUB / name, folder)
    copy_sources(folder / "torch-ext" / MODULE)
    for backend in BACKENDS:
        write_variant(folder / "build" / f"torch-{backend}", backend)
    shutil.copy(HUB / "CARD.md", folder / "build")


def copy_sources(folder: Path) -> None:
    """The modules of valm_kernels and what cards have measured: no native code, no bytecode."""
    for file in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("measured_*.json")]:
        target = folder / file.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def write_variant(folder: Path, backend: str) -> None:
    """A build of the kernel for one backend."""
    copy_sources(folder)
    (folder / MODULE).mkdir()
    (folder / MODULE / "__init__.py").write_text(NAMED_FOLDER)
    files = {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in sorted(file for file in folder.rglob("*") if file.is_file())
    }
    content = hashlib.sha256(b"".join(name.encode() + digest for name, digest in files.items())).hexdigest()
    metadata = {
        # also the module's name in a process, and so the operators' namespace
        "id": f"_{MODULE}_{backend}_{content[:12]}",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in files.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m hub.assemble FOLDER")
    try:
        assemble(Path(sys.argv[1]))
    except FileExistsError:
        raise SystemExit(f"{sys.argv[1]} exists: remove it, or name a new folder") from None
    print(f"{NAME} for the backends {', '.join(BACKENDS)}: {sys.argv[1]}")


if __name__ == "__main__":
    main()
