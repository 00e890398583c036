import json
import os
import shutil
import subprocess
import sys
import tarfile

import datasets
import pytest
from PIL import Image

from tests.valm.cli.commands import THINGS, run
from tests.valm.tiny_clip import make_clip
from valm.clip.tokenizer import clip_tokenizer, prune_tokenizer
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval import index_tuning


def test_kb_info_names_size_and_encoder(world, capsys):
    assert run("kb", "info", world / "kb") == 0
    out = capsys.readouterr().out
    assert "6 images, 6 with captions, thumbnails" in out
    assert "16 dimensions" in out and "made of: folder, written 20" in out
    assert "the CLIP tiny" in out


def test_kb_info_as_json(world, capsys):
    assert run("kb", "info", world / "kb", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    files = [file for file in (world / "kb").iterdir() if file.is_file() and file.name != "manifest.json"]
    assert facts["images"] == facts["captions"] == 6 and facts["thumbnails"] and facts["skipped"] == 0
    assert facts["bytes"] == sum(file.stat().st_size for file in files)


def test_kb_info_does_not_wait_for_torch(world):
    code = "import sys; from valm.cli import main; main(['kb', 'info', sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, world / "kb"], capture_output=True, text=True, check=True)
    assert "6 images" in done.stdout and done.stdout.endswith("False\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["kb", "build", "no", "--clip", "x", "--out", "kb"],
        ["kb", "index", "no"],
        ["kb", "search", "no", "x"],
        ["clip", "train", "no", "--model", "small", "--out", "x"],
        ["clip", "check", "no", "--clip", "x"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_is_not_there_is_said_before_torch_is_imported(command, tmp_path):
    code = "import sys; from valm.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    where = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True, cwd=tmp_path, env=where
    )
    assert "no" in done.stderr and done.stdout == "False\n"


def test_a_build_of_what_is_there_says_so(world, capsys):
    build = ["kb", "build", world / "pictures", "--clip", world / "clip", "--out", world / "kb"]
    assert run(*build) == 0
    assert capsys.readouterr().out == f"{world / 'kb'} is complete: 6 images; nothing to do\n"


def test_kb_search_lists_the_nearest_pictures(world, capsys):
    assert run("kb", "search", world / "kb", "the apple", "-k", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    assert all(line.split()[1].removesuffix(".png") in THINGS for line in lines)


def test_kb_search_says_how_many_images_there_are(world, capsys, monkeypatch):
    assert run("kb", "search", world / "kb", "the apple", "-k", 100_000) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6 and f"{world / 'kb'} has 6 images, fewer than -k 100,000" in err
    monkeypatch.setattr("valm.retrieval.retriever.MAX_TOPK", 5)
    assert run("kb", "search", world / "kb", "the apple", "-k", 100_000) == 1
    error = f"k must be from 1 to 5, got 100,000: a search finds no more of the 6 images of {world / 'kb'}"
    assert error in capsys.readouterr().err


def test_kb_search_finds_by_a_picture(world, capsys):
    assert run("kb", "search", world / "kb", "--image", world / "pictures" / "sea.png", "-k", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["uri"] == "sea.png" and len(found) == 2
    assert found[0]["score"] == pytest.approx(1, abs=1e-3) and found[0]["caption"] == "a sea"


def test_kb_search_shortens_captions(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    for name in THINGS:
        (tmp_path / "pictures" / f"{name}.txt").write_text("long " * 100)
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    capsys.readouterr()
    assert run("kb", "search", tmp_path / "kb", "long") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(THINGS) and all(len(line) < 130 and line.endswith("…") for line in lines)


def test_kb_search_draws_a_contact_sheet(world, tmp_path):
    assert run("kb", "search", world / "kb", "the apple", "--sheet", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width > 400
    (tmp_path / "link.jpg").symlink_to("there.jpg")
    assert run("kb", "search", world / "kb", "the apple", "--sheet", tmp_path / "link.jpg") == 0
    assert (tmp_path / "link.jpg").is_symlink() and Image.open(tmp_path / "there.jpg").format == "JPEG"


def test_kb_merge(world, tmp_path, capsys):
    assert run("verify", world / "kb") == 0
    assert "all 6 images are as they were written" in capsys.readouterr().out
    assert run("kb", "merge", world / "kb", world / "kb", "--out", tmp_path / "both") == 0
    assert "12 images" in capsys.readouterr().out
    vectors = bytearray((tmp_path / "both" / "vectors-00001.npy").read_bytes())
    vectors[-1] ^= 1
    (tmp_path / "both" / "vectors-00001.npy").unlink()  # it is the file of world / "kb" too
    (tmp_path / "both" / "vectors-00001.npy").write_bytes(vectors)
    assert run("verify", tmp_path / "both") == 1
    assert "is damaged, build it again: vectors-00001.npy" in capsys.readouterr().err


def test_kb_index(copy_of, capsys):
    pytest.importorskip("faiss", reason="needs faiss: install valm[faiss]")
    root = copy_of("kb", "clip", "valm")
    assert run("kb", "index", root / "kb") == 0
    out = capsys.readouterr().out
    assert out.startswith("no index was built: it would save no time with 6 images (from 50,000 on it does, and --fact")
    assert "searched exactly" in out
    options = ["--factory", "IVF2,Flat", "-k", 1, "--target-recall", 1]
    assert run("kb", "index", root / "kb", *options) == 0
    out = capsys.readouterr().out
    assert "searched through the index IVF2,Flat, nprobe=" in out
    assert "eot queries at the tokens of captions of the images" in out
    assert run("kb", "info", root / "kb") == 0
    assert capsys.readouterr().out == out
    (root / "questions.txt").write_text("the color of the sea\n\nthe color of the coal\n")
    assert run("kb", "index", root / "kb", *options, "--queries", root / "questions.txt", "--query", "state") == 0
    assert "state queries at the tokens of questions.txt" in capsys.readouterr().out
    assert run("kb", "search", root / "kb", "the apple", "-k", 2) == 0
    assert run("generate", root / "valm", "the sea", "--max-new-tokens", 2) == 0
    (root / "kb" / "index.faiss").write_bytes(b"")
    for command in (["kb", "search", root / "kb", "the apple"], ["generate", root / "valm", "the sea"]):
        assert run(*command) == 1
        assert f"make it anew with `valm kb index {root / 'kb'}`" in capsys.readouterr().err.replace("valm/../", "")
    assert run("verify", root / "kb") == 1
    assert "index.faiss" in capsys.readouterr().err
    (root / "kb" / "index-0123456789abcdef.partial").mkdir()  # of a killed build
    assert run("kb", "index", root / "kb") == 0
    assert "searched exactly" in capsys.readouterr().out
    assert not list((root / "kb").glob("index*"))


def test_kb_build_from_archives(world, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "00000.tar", "w") as tar:
        for file in sorted((world / "pictures").iterdir()):
            tar.add(file, file.name)
    for source in ("tars", "tars/00000.tar"):
        build = ["kb", "build", tmp_path / source, "--clip", world / "clip", "--out", tmp_path / f"kb-{source[-3:]}"]
        assert run(*build, "--format", "webdataset") == 0
        assert "6 images" in capsys.readouterr().out


def test_kb_build_from_a_dataset(world, tmp_path, capsys):
    rows = {"picture": sorted(map(str, (world / "pictures").glob("*.png"))), "words": list(THINGS)}
    dataset = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "dataset")
    build = ["kb", "build", tmp_path / "dataset", "--clip", world / "clip", "--out", tmp_path / "kb"]
    build[2] = f"{tmp_path / 'dataset'}::test"
    assert run(*build, "--format", "dataset", "--columns", ",words") == 0  # the other one has images
    assert "6 images" in capsys.readouterr().out
    assert ImageKnowledgeBase.open(tmp_path / "kb").item(0).caption == "apple"
    for options, message in (
        (["--streaming"], "--streaming is for --format dataset, not for pictures"),
        (["--format", "dataset", "--captions", "x.csv"], "--captions is for --format pictures"),
        (["--format", "dataset", "--split", "x"], "has no option --split: a dataset is named with its split"),
    ):
        assert run(*build, *options) == 1
        assert message in capsys.readouterr().err
    build[2] = tmp_path / "dataset"
    assert run(*build, "--format", "dataset") == 1
    assert "has no split 'train', only test" in capsys.readouterr().err


def test_kb_build_from_a_table(world, tmp_path, capsys):
    rows = [f"{world / 'pictures' / name}.png\ta {name}" for name in THINGS]
    (tmp_path / "table.tsv").write_text("\n".join(["photo\tcaption", *rows, "none.png\tx"]))
    build = ["kb", "build", tmp_path / "table.tsv", "--clip", world / "clip", "--out", tmp_path / "kb"]
    assert run(*build, "--format", "csv", "--columns", "photo") == 0
    out = capsys.readouterr().out
    assert "6 images" in out and "none.png: it is no file" in out
    assert ImageKnowledgeBase.open(tmp_path / "kb").item(5).caption == "a snow"


def test_a_corrupt_picture_is_named_and_left_out(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "sea.png").write_bytes(b"not a picture")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    out = capsys.readouterr().out
    assert "5 images" in out and "sea.png" in out


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
        "; SVG is not read: draw it as PNG, such as by librsvg: rsvg-convert NAME.svg -o NAME.png",
        "1 of 6 images have no caption",
    ):
        assert remark in err
    (tmp_path / "pictures" / "more").symlink_to(world / "pictures")
    assert run(*build, "--out", tmp_path / "all") == 0
    assert "12 images" in capsys.readouterr().out


def test_of_many_corrupt_pictures_some_are_named(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    for number in range(12):
        (tmp_path / "pictures" / f"{number:02d}.png").write_bytes(b"not a picture")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    out = capsys.readouterr().out
    assert "12 images or captions could not be read" in out and "09.png" in out and "10.png" not in out
    assert f"and 2 more, in {tmp_path / 'kb'}/skipped-*.json" in out


def test_a_query_ends_at_a_line_break_alone(world, tmp_path, monkeypatch, capsys):
    def context_queries(encoder, texts):
        raise ValmError(f"read as {texts}")

    monkeypatch.setattr(index_tuning, "context_queries", context_queries)
    (tmp_path / "queries.txt").write_text("the\u2028sea\nthe sky")
    index = ["kb", "index", world / "kb", "--factory", "IVF1,Flat"]
    assert run(*index, "--queries", tmp_path / "queries.txt") == 1
    assert "read as ['the\\u2028sea', 'the sky']" in capsys.readouterr().err


def test_kb_add_joins_more_pictures(world, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "more" / "orange.png")
    (tmp_path / "more" / "bad.png").touch()
    add = ["kb", "add", world / "kb", tmp_path / "more", "--out", tmp_path / "kb"]
    assert run(*add) == 0
    out = capsys.readouterr().out
    assert "7 images, 1 of them new" in out and "1 images or captions could not be read:\n  bad.png: " in out
    kb = ImageKnowledgeBase.open(tmp_path / "kb")
    assert kb.item(6).uri == "orange.png" and kb.verify(progress=False) == []
    assert sorted(os.listdir(tmp_path)) == ["kb", "more"]
    assert run("kb", "info", tmp_path / "kb") == 0
    before = ImageKnowledgeBase.open(world / "kb").fingerprint
    assert f"made of: folder, added to the knowledge base {before[:12]}, written 20" in capsys.readouterr().out


def test_kb_add_encodes_as_the_knowledge_base_was(world, tmp_path):
    """Also one that was made of others."""
    build = ["kb", "build", world / "pictures", "--clip", world / "clip", "--thumbnails", 8, "--batch-size", 3]
    assert (
        run(*build, "--out", tmp_path / "kb") == run("kb", "dedupe", tmp_path / "kb", "--out", tmp_path / "once") == 0
    )
    assert run("kb", "merge", tmp_path / "once", world / "kb", "--out", tmp_path / "both") == 0
    assert run("kb", "add", tmp_path / "both", world / "pictures", "--out", tmp_path / "more") == 0
    kb = ImageKnowledgeBase.open(tmp_path / "more")
    assert kb.encoding == {"batch_size": 3, "thumbnails": 8}
    assert [kb.thumbnail(id).size for id in (0, 6, 12)] == [(8, 8), (40, 40), (8, 8)]


def test_kb_add_looks_at_its_output_before_it_encodes(world, copy_of, capsys, monkeypatch):
    root = copy_of("kb", "clip")
    (root / "file").touch()
    monkeypatch.setattr("valm.knowledge_base.encode.encode_records", lambda *_, **__: pytest.fail("it encodes"))
    for out, error in (
        ("kb", "holds another knowledge base: its after is not given"),
        ("clip", "is not empty (it has "),
        ("file", "file: File exists"),
    ):
        assert run("kb", "add", world / "kb", world / "pictures", "--out", root / out) == 1
        assert error in capsys.readouterr().err
    assert sorted(os.listdir(root)) == ["clip", "file", "kb"]


def test_a_killed_kb_add_goes_on(world, tmp_path, monkeypatch, capsys):
    """While it links what is there, and while it encodes."""
    add = ["kb", "add", world / "kb", world / "pictures", "--out", tmp_path / "kb"]
    for killed in ("valm.knowledge_base.build.link_shard", "valm.knowledge_base.build.write_shard"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(killed, lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("killed")))
            run(*add)
    assert run(*add) == 0
    assert len(ImageKnowledgeBase.open(tmp_path / "kb")) == 12 and os.listdir(tmp_path) == ["kb"]
    assert run(*add) == 0
    assert "kb is complete: 12 images; nothing to do" in capsys.readouterr().out


def test_pictures_that_are_there_twice(world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.copy(tmp_path / "pictures" / "sea.png", tmp_path / "pictures" / "zebra.png")
    assert run("kb", "build", tmp_path / "pictures", "--clip", world / "clip", "--out", tmp_path / "kb") == 0
    assert "1 images look to CLIP exactly as an earlier one" in capsys.readouterr().err
    assert run("kb", "dedupe", tmp_path / "kb", "--out", tmp_path / "once") == 0
    assert "6 images" in capsys.readouterr().out
    once, all_of_them = ImageKnowledgeBase.open(tmp_path / "once"), ImageKnowledgeBase.open(tmp_path / "kb")
    assert [once.item(id).uri for id in range(6)] == sorted(f"{name}.png" for name in THINGS)
    assert (once.vectors() == all_of_them.vectors()[:6]).all() and once.verify(progress=False) == []
    assert run("kb", "search", tmp_path / "once", "sea") == 0  # its CLIP is found from there


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    kb_build = ["kb", "build", "{world}/pictures", "--clip", "{world}/clip", "--out", "{tmp}/kb"]
    return {
        "folder of pictures missing": ([*kb_build[:2], "{tmp}/none", *kb_build[3:]], "no folder {tmp}/none"),
        "folder without pictures": ([*kb_build[:2], "{tmp}", *kb_build[3:]], "no images in {tmp}"),
        "no tar files": ([*kb_build, "--format", "webdataset"], "no tar files in {world}/pictures"),
        "no embeddings": ([*kb_build, "--format", "embeddings"], "no embeddings in {world}/pictures"),
        "no table": ([*kb_build, "--format", "csv"], "{world}/pictures is not a regular file"),
        "table without the column": (
            ["kb", "build", "{world}/sets/object_color/memory_color_data.csv", *kb_build[3:], "--format", "csv"],
            "starts with 'Index,Descriptor,Item,Color'; expected a header with a column image or file or",
        ),
        "column of pictures": (
            [*kb_build, "--columns", "x"],
            "--columns is for --format dataset or csv, not for pictures",
        ),
        "captions of archives": ([*kb_build, "--format", "webdataset", "--captions", "x.csv"], "--captions is for"),
        "sheet of no known kind": (
            ["kb", "search", "{world}/kb", "x", "--sheet", "{tmp}/sheet.abc"],
            "cannot write the picture {tmp}/sheet.abc: unknown file extension",
        ),
        "text and picture": (["kb", "search", "{world}/kb", "x", "--image", "y"], "give either a text or --image"),
        "picture that is none": (
            ["kb", "search", "{world}/kb", "--image", "{world}/sets/object_color/memory_color_data.csv"],
            "memory_color_data.csv: not a picture in one of the formats",
        ),
        "no such picture": (["kb", "search", "{world}/kb", "--image", "{tmp}/no.png"], "{tmp}/no.png: No such file"),
        "no such CLIP": ([*kb_build[:4], "{tmp}/none", *kb_build[5:]], "no CLIP at '{tmp}/none'"),
        "output holds something else": ([*kb_build[:-1], "{world}/clip"], "is not empty"),
        "no such knowledge base": (["kb", "info", "{tmp}/none"], "no knowledge base at {tmp}/none"),
        "index of no known kind": (["kb", "index", "{world}/kb", "--factory", "IFV1"], "the factory string 'IFV1'"),
        "index of too many cells": (
            ["kb", "index", "{world}/kb", "--factory", "IVF7,Flat"],
            "of 7 cells needs as many",
        ),
        "more images than a search finds": (
            ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat", "-k", "7"],
            "k must be from 1 to the 6 images of",
        ),
        "queries not text": (
            ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat", "--queries", "{world}/pictures/sea.png"],
            "sea.png is not UTF-8",
        ),
        "queries without text": (
            ["kb", "index", "{world}/kb", "--factory", "IVF1,Flat", "--queries", "{tmp}/empty.txt"],
            "no text to make queries of",
        ),
        "not a knowledge base": (["kb", "search", "{world}/clip", "x"], "is not a knowledge base"),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_a_knowledge_base_of_another_clip_is_one_sentence(sentence, tmp_path):
    make_clip(prune_tokenizer(clip_tokenizer(), ["another"]), seed=1).save(tmp_path / "other")
    sentence(["kb", "search", "{world}/kb", "x", "--clip", "{tmp}/other"], "was built with")


def test_a_knowledge_base_that_was_moved_says_how_to_find_its_clip(sentence, world, tmp_path, capsys):
    shutil.copytree(world / "kb", tmp_path / "kb")
    sentence(["kb", "search", "{tmp}/kb", "sea"], "give its folder or name (--clip)")
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
