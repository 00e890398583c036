import json
import os
import shutil
import subprocess
import sys
import tarfile

import datasets
import pytest
from PIL import Image

from tests.valm.cli.commands import THINGS, run, wrong_inputs
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval import index_tuning


def test_kb_info_names_size_and_encoder(world, output_of):
    out = output_of("kb", "info", world / "kb")
    assert "6 images, 6 with captions, thumbnails" in out
    assert "16 dimensions" in out and "made of: folder, written 20" in out
    assert "the CLIP tiny" in out
    facts = json.loads(output_of("kb", "info", world / "kb", "--json"))
    files = [file for file in (world / "kb").iterdir() if file.is_file() and file.name != "manifest.json"]
    assert facts["images"] == facts["captions"] == 6 and facts["thumbnails"] and facts["skipped"] == 0
    assert facts["bytes"] == sum(file.stat().st_size for file in files)


def test_kb_info_does_not_wait_for_torch(world):
    code = "import sys; from valm.cli import main; main(['kb', 'info', sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, world / "kb"], capture_output=True, text=True, check=True)
    assert "6 images" in done.stdout and done.stdout.endswith("False\n")


def test_a_build_of_what_is_there_says_so(world, output_of):
    build = ["kb", "build", world / "pictures", "--clip", world / "clip", "--out", world / "kb"]
    assert output_of(*build) == f"{world / 'kb'} is complete: 6 images; nothing to do\n"


def test_kb_search_lists_the_nearest_pictures(world, output_of):
    lines = output_of("kb", "search", world / "kb", "the apple", "-k", "3").splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    assert all(line.split()[1].removesuffix(".png") in THINGS for line in lines)


def test_kb_search_says_how_many_images_there_are(world, capsys, error_of, monkeypatch):
    search = ["kb", "search", world / "kb", "the apple", "-k", 100_000]
    assert run(*search) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6 and f"{world / 'kb'} contains 6 images, fewer than -k 100,000" in err
    monkeypatch.setattr("valm.retrieval.retriever.MAX_TOPK", 5)
    said = f"k must be from 1 to 5, got 100,000: a search returns no more of the 6 images of {world / 'kb'}"
    assert said in error_of(*search)


def test_kb_search_finds_by_a_picture(world, output_of):
    image = ["--image", world / "pictures" / "sea.png"]
    found = json.loads(output_of("kb", "search", world / "kb", *image, "-k", 2, "--json"))
    assert found[0]["uri"] == "sea.png" and len(found) == 2
    assert found[0]["score"] == pytest.approx(1, abs=1e-3) and found[0]["caption"] == "a sea"


def test_kb_search_shortens_captions(world, tmp_path, output_of):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    for name in THINGS:
        (tmp_path / "pictures" / f"{name}.txt").write_text("long " * 100)
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    lines = output_of("kb", "search", tmp_path / "kb", "long").splitlines()
    assert len(lines) == len(THINGS) and all(len(line) < 130 and line.endswith("…") for line in lines)


def test_kb_search_draws_a_contact_sheet(world, tmp_path):
    assert run("kb", "search", world / "kb", "the apple", "--sheet", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width > 400
    (tmp_path / "link.jpg").symlink_to("there.jpg")
    assert run("kb", "search", world / "kb", "the apple", "--sheet", tmp_path / "link.jpg") == 0
    assert (tmp_path / "link.jpg").is_symlink() and Image.open(tmp_path / "there.jpg").format == "JPEG"


def test_kb_index(copy_of, output_of, error_of):
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    root = copy_of("kb", "clip", "valm")
    index = ["kb", "index", root / "kb"]
    out = output_of(*index)
    assert out.startswith("no index was built: an index of 6 images would save no time (from 50,000 on it does;")
    assert "searched exactly" in out
    options = ["--factory", "IVF2,Flat", "-k", 1, "--target-recall", 1]
    out = output_of(*index, *options)
    assert "searched through the index IVF2,Flat, nprobe=" in out
    assert "eot queries at the tokens of captions of the images" in out
    assert output_of("kb", "info", root / "kb") == out
    (root / "questions.txt").write_text("the color of the sea\n\nthe color of the coal\n")
    out = output_of(*index, *options, "--queries", root / "questions.txt", "--query", "state")
    assert "state queries at the tokens of questions.txt" in out
    search, generate = ["kb", "search", root / "kb", "the apple", "-k", 2], ["generate", root / "valm", "the sea"]
    commands = search, [*generate, "--max-new-tokens", 2]
    for command in commands:
        assert run(*command) == 0
    (root / "kb" / "index.faiss").write_bytes(b"")
    for command in commands:
        assert f"make it again with `valm kb index {root / 'kb'}`" in error_of(*command).replace("valm/../", "")
    assert "index.faiss" in error_of("verify", root / "kb")
    (root / "kb" / "index-0123456789abcdef.partial").touch()  # of a killed build
    assert "searched exactly" in output_of(*index)
    assert not list((root / "kb").glob("index*"))


def test_kb_build_from_archives(world, tmp_path, output_of):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for file in sorted((world / "pictures").iterdir()):
            tar.add(file, file.name)
    for source in ("tars", "tars/00000.tar"):
        build = ["kb", "build", tmp_path / source, "--clip", world / "clip", "--out", tmp_path / f"kb-{source[-3:]}"]
        assert "6 images" in output_of(*build, "--format", "webdataset")


def test_kb_build_from_a_dataset(world, tmp_path, output_of, error_of):
    rows = {"picture": sorted(map(str, (world / "pictures").glob("*.png"))), "words": list(THINGS)}
    dataset = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "dataset")
    build = ["--format", "dataset", "--clip", world / "clip", "--out", tmp_path / "kb"]
    out = output_of("kb", "build", f"{tmp_path / 'dataset'}::test", *build, "--columns", ",words")
    assert "6 images" in out  # the column that is not named has images
    assert ImageKnowledgeBase.open(tmp_path / "kb").item(0).caption == "apple"
    assert "dataset (default:train): 'train'" in error_of("kb", "build", tmp_path / "dataset", *build)


def test_kb_build_from_a_table(world, tmp_path, output_of):
    rows = [f"{world / 'pictures' / name}.png\ta {name}" for name in THINGS]
    (tmp_path / "table.tsv").write_text("\n".join(["photo\tcaption", *rows, "none.png\tx"]))
    build = ["kb", "build", tmp_path / "table.tsv", "--clip", world / "clip", "--out", tmp_path / "kb"]
    out = output_of(*build, "--format", "csv", "--columns", "photo")
    assert "6 images" in out and "none.png: it is not a file" in out
    assert ImageKnowledgeBase.open(tmp_path / "kb").item(5).caption == "a snow"


def test_what_kb_build_passes_over_is_said(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "drawing.svg").touch()
    (tmp_path / "pictures" / "phone.HEIC").touch()
    (tmp_path / "pictures" / "sea.txt").unlink()
    build = ["kb", "build", tmp_path / "pictures", "--clip", world / "clip"]
    assert run(*build, "--out", tmp_path / "kb") == 0
    out, err = capsys.readouterr()
    assert "6 images, 5 with captions" in out
    for remark in (
        "files ignored: 1 .heic, 1 .svg; HEIC is not read: convert it to JPEG, such as by ImageMagick: magick NAME.he",
        "; SVG is not read: convert it to PNG, such as by librsvg: rsvg-convert NAME.svg -o NAME.png",
        "1 of 6 images have no caption",
    ):
        assert remark in err
    (tmp_path / "pictures" / "more").symlink_to(world / "pictures")
    assert run(*build, "--out", tmp_path / "all") == 0
    assert "12 images" in capsys.readouterr().out


def test_of_many_corrupt_pictures_some_are_named(world, tmp_path, output_of):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    for number in range(12):
        (tmp_path / "pictures" / f"{number:02d}.png").write_bytes(b"not a picture")
    out = output_of("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb")
    assert "6 images" in out and "12 images or captions could not be read" in out
    assert "09.png" in out and "10.png" not in out
    assert "and 2 more: `ImageKnowledgeBase.skipped()` lists all" in out


def test_a_query_ends_at_a_line_break_alone(world, tmp_path, monkeypatch, error_of):
    def context_queries(encoder, texts):
        raise ValmError(f"read as {texts}")

    monkeypatch.setattr(index_tuning, "context_queries", context_queries)
    (tmp_path / "queries.txt").write_text("the\u2028sea\nthe sky")
    error = error_of("kb", "index", world / "kb", "--factory", "IVF1,Flat", "--queries", tmp_path / "queries.txt")
    assert "read as ['the\\u2028sea', 'the sky']" in error


def test_kb_add_joins_more_pictures(world, tmp_path, output_of):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "more" / "orange.png")
    (tmp_path / "more" / "bad.png").touch()
    out = output_of("kb", "add", world / "kb", tmp_path / "more", "--out", tmp_path / "kb")
    assert "7 images, 1 of them new" in out and "1 images or captions could not be read:\n  bad.png: " in out
    kb = ImageKnowledgeBase.open(tmp_path / "kb")
    assert kb.item(6).uri == "orange.png" and kb.verify(progress=False) == []
    assert sorted(os.listdir(tmp_path)) == ["kb", "more"]
    before = ImageKnowledgeBase.open(world / "kb").fingerprint[:12]
    made_of = f"made of: folder, added to the knowledge base {before}, written 20"
    assert made_of in output_of("kb", "info", tmp_path / "kb")


def test_kb_add_encodes_as_the_knowledge_base_was(world, tmp_path, output_of):
    """Also one that was made of others."""
    build = ["kb", "build", world / "pictures", "--clip", world / "clip", "--thumbnails", 8, "--batch-size", 3]
    assert run(*build, "--out", tmp_path / "kb") == 0
    assert run("kb", "dedupe", tmp_path / "kb", "--out", tmp_path / "once") == 0
    assert "12 images" in output_of("kb", "merge", tmp_path / "once", world / "kb", "--out", tmp_path / "both")
    assert run("kb", "add", tmp_path / "both", world / "pictures", "--out", tmp_path / "more") == 0
    kb = ImageKnowledgeBase.open(tmp_path / "more")
    assert kb.encoding == {"batch_size": 3, "thumbnails": 8}
    assert [kb.thumbnail(id).size for id in (0, 6, 12)] == [(8, 8), (40, 40), (8, 8)]


def test_kb_add_looks_at_its_output_before_it_encodes(world, copy_of, error_of, monkeypatch):
    root = copy_of("kb", "clip")
    (root / "file").touch()
    monkeypatch.setattr("valm.knowledge_base.encode.encode_records", lambda *_, **__: pytest.fail("it encodes"))
    for out, error in (
        ("kb", "holds another knowledge base: its after is not given"),
        ("clip", "is not empty (it contains "),
        ("file", "file: File exists"),
    ):
        assert error in error_of("kb", "add", world / "kb", world / "pictures", "--out", root / out)
    assert sorted(os.listdir(root)) == ["clip", "file", "kb"]


def test_a_killed_kb_add_goes_on(world, tmp_path, monkeypatch, output_of):
    """While it links what is there, and while it encodes."""
    add = ["kb", "add", world / "kb", world / "pictures", "--out", tmp_path / "kb"]
    for killed in ("os.link", "valm.store.shards.write_shard"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(killed, lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("killed")))
            run(*add)
    assert run(*add) == 0
    assert len(ImageKnowledgeBase.open(tmp_path / "kb")) == 12 and os.listdir(tmp_path) == ["kb"]
    assert "kb is complete: 12 images; nothing to do" in output_of(*add)


def test_pictures_that_are_there_twice(world, tmp_path, capsys, output_of):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.copy(tmp_path / "pictures" / "sea.png", tmp_path / "pictures" / "zebra.png")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    assert "1 images have the same CLIP vector as an earlier image" in capsys.readouterr().err
    assert "6 images" in output_of("kb", "dedupe", tmp_path / "kb", "--out", tmp_path / "once")
    once, all_of_them = ImageKnowledgeBase.open(tmp_path / "once"), ImageKnowledgeBase.open(tmp_path / "kb")
    assert [once.item(id).uri for id in range(6)] == sorted(f"{name}.png" for name in THINGS)
    assert (once.vectors() == all_of_them.vectors()[:6]).all() and once.verify(progress=False) == []
    assert run("kb", "search", tmp_path / "once", "sea") == 0  # its CLIP is found from there


OUT = "--clip {world}/clip --out {tmp}/kb "
BUILD, TABLE = "kb build {world}/pictures " + OUT, "{world}/sets/object_color/memory_color_data.csv"
SEARCH, INDEX = "kb search {world}/kb ", "kb index {world}/kb --factory "


@wrong_inputs(
    {
        "kb build {tmp}/none " + OUT: "{tmp}/none: No such file or directory",
        "kb build {tmp} " + OUT: "no images in {tmp}",
        BUILD + "--format webdataset": "no tar files in {world}/pictures",
        BUILD + "--format embeddings": "no embeddings in {world}/pictures",
        BUILD + "--format csv": "{world}/pictures: Is a directory",
        f"kb build {TABLE} {OUT}--format csv": "starts with 'Index,Descriptor,Item,Color', expected a header with",
        BUILD + "--columns x": "--columns is for --format dataset or csv, not for pictures",
        BUILD + "--streaming": "--streaming is for --format dataset, not for pictures",
        BUILD + "--format webdataset --captions x.csv": "--captions is for --format pictures",
        BUILD + "--format dataset --captions x.csv": "--captions is for --format pictures",
        BUILD + "--clip {tmp}/none": "no CLIP at '{tmp}/none'",
        BUILD + "--out {world}/clip": "is not empty",
        SEARCH + "x --sheet {tmp}/sheet.abc": "cannot write the picture {tmp}/sheet.abc: unknown file extension",
        SEARCH + "x --image y": "give either a text or --image",
        SEARCH + f"--image {TABLE}": "memory_color_data.csv: not a picture in one of the formats",
        SEARCH + "--image {tmp}/no.png": "{tmp}/no.png: No such file",
        "kb search {world}/clip x": "is not a knowledge base",
        "kb info {tmp}/none": "no knowledge base at {tmp}/none",
        INDEX + "IFV1": "the factory string 'IFV1'",
        INDEX + "IVF7,Flat": "of 7 cells needs as many",
        INDEX + "IVF1,Flat -k 7": "k must be from 1 to the 6 images of",
        INDEX + "IVF1,Flat --queries {world}/pictures/sea.png": "sea.png is not UTF-8",
        INDEX + "IVF1,Flat --queries {tmp}/empty.txt": "no text to make queries from",
    }
)
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


def test_a_knowledge_base_of_another_clip_is_one_sentence(sentence, tmp_path):
    make_clip(prune_tokenizer(clip_tokenizer(), ["another"]), seed=1).save(tmp_path / "other")
    sentence(SEARCH + "x --clip {tmp}/other", "was built with")


def test_a_knowledge_base_that_was_moved_says_how_to_find_its_clip(sentence, world, tmp_path):
    shutil.copytree(world / "kb", tmp_path / "kb")
    sentence("kb search {tmp}/kb sea", "give its folder or name (--clip)")
    assert run("kb", "search", tmp_path / "kb", "sea", "--clip", world / "clip") == 0


def test_what_is_in_a_knowledge_base_does_not_steer_the_terminal(world, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "pictures" / "a\x1b[2J\n.png")
    (tmp_path / "pictures" / "a\x1b[2J\n.txt").write_text("red \x1b]0;title\x07\x9b2J")
    (tmp_path / "pictures" / "b\x1b[2J.png").write_text("no picture")
    build = ["kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb"]
    assert run(*build) == run("kb", "search", tmp_path / "kb", "red") == 0
    assert run("kb", "info", tmp_path / "no\x1b[2J\nwhere") == 1
    out, err = capsys.readouterr()
    assert r"a\x1b[2J\n.png" in out and r"red \x1b]0;title\x07" in out and r"b\x1b[2J.png" in out
    assert r"no\x1b[2J\nwhere" in err
    assert all(c.isprintable() or c in "\n\r" for c in out + err)
