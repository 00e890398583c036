"""The pictures of `python -m studies.harm`."""

from studies import harm
from studies.color.questions import FLICKR_CAPTIONS


def test_a_killed_run_writes_its_pictures_again(tmp_path):
    captions = {"dog.jpg": ["A dog runs .", "A brown dog ."], "sea.jpg": ["The sea ."]}
    sources = tmp_path / "data" / FLICKR_CAPTIONS.parent / "images"
    sources.mkdir(parents=True)
    for image in captions:
        (sources / image).write_text(image)
    (tmp_path / "pictures.part").mkdir()
    (tmp_path / "pictures.part" / "dog.jpg").write_text("half")
    harm.write_pictures(tmp_path / "data", tmp_path / "pictures", list(captions), captions)
    written = {path.name: path.read_text() for path in sorted((tmp_path / "pictures").iterdir())}
    assert written == {
        "dog.jpg": "dog.jpg",
        "dog.txt": "A dog runs .\nA brown dog .",
        "sea.jpg": "sea.jpg",
        "sea.txt": "The sea .",
    }
