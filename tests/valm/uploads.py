"""Records what would be uploaded to the Hugging Face Hub, which no test reaches."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from valm.model.card import MARKER
from valm.retrieval.source import RetrievalSource

# A private folder of the user.
SECRET = "secret-project"


# Files of the Trainer, which name the output folder (docs/how-to/sharing.md); valm does not control them.
OF_TRAINER = ("training_args.bin", "trainer_state.json")


class Uploads(dict[str, bytes]):
    """Replaces the Hub: the content of each file that would be uploaded, by repository and name.

    Attributes:
        options: the options of the repositories that would be created.
        card: the repository's README.md; None for no file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.options: list[dict[str, object]] = []
        self.card: str | None = None
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "create_commit", self.create_commit)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(huggingface_hub, "upload_folder", self.upload_folder)
        monkeypatch.setattr(ModelCard, "load", self.load_card)

    def create_repo(self, repo_id: str, **options: object) -> RepoUrl:
        self.options.append(options)
        return RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else f'me/{repo_id}'}")

    def create_commit(self, repo_id: str, operations: list, **options: object) -> None:
        for operation in operations:
            self[f"{repo_id}/{operation.path_in_repo}"] = Path(operation.path_or_fileobj).read_bytes()

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        path_in_repo: str = ".",
        ignore_patterns: list[str] | None = None,
        run_as_future: bool = False,
        **options: object,
    ) -> Future[None] | None:
        names = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self[(Path(repo_id) / path_in_repo / name).as_posix()] = (Path(folder_path) / name).read_bytes()
        done: Future[None] = Future()
        done.set_result(None)
        return done if run_as_future else None

    def load_card(self, repo_id: str, **options: object) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError(f"{repo_id} has no README.md")
        return ModelCard(self.card)

    def check(self, folder: str, source: RetrievalSource, *secrets: str) -> None:
        """Checks that `folder` of a repository contains weights, and a config and a card that identify the images.
        Checks that no uploaded file except OF_TRAINER contains SECRET or one of `secrets`."""
        assert any(name.startswith(f"{folder}/") and name.endswith(".safetensors") for name in self)
        config = self.get(f"{folder}/config.json", self.get(f"{folder}/image_fusion.json", b""))
        card = self[f"{folder}/README.md"]
        assert b'"retrieval"' in config and MARKER.encode() in card
        for sha256 in (source.knowledge_base_sha256, source.clip_sha256):
            assert str(sha256).encode() in config and str(sha256).encode() in card
        for name, content in self.items():
            if name.endswith(OF_TRAINER):
                continue
            for secret in (SECRET, *secrets):
                assert secret.encode() not in content and secret not in name, f"{name} has {secret}"
