import argparse
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import valm_kernels
from tests.valm.cli.commands import STEPS, run
from tests.valm.evaluation.small_sets import write_sets
from valm import __version__
from valm.cli import build_parser, main


@pytest.mark.parametrize(
    "command",
    [
        "kb build pictures --clip clip",
        "kb add kb pictures",
        "clip train pictures --model ViT-B-32",
        "retrieve corpus.txt --kb kb",
    ],
)
def test_what_one_process_does_is_refused_to_several(command, tmp_path, monkeypatch, error_of):
    """As torchrun launches them: each would write the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    name = re.match("(kb |clip )?[a-z]+", command).group()
    said = f"valm {name} runs in one process, but 2 were launched: start it without torchrun"
    assert said in error_of(*command.split(), "--out", "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_itself_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "valm", "kb", "info", tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("valm: error: ")


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is told")
def test_memory_that_is_freed_is_used_again():
    """A command that takes and frees 50 MB again and again has no page faults each time."""
    code = """
import ctypes, resource, sys, torch
from valm.cli import M_MMAP_THRESHOLD, keep_freed_memory
if not ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30):
    sys.exit("refused")
keep_freed_memory()
for n in range(11):
    if n == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(12_500_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "refused" in done.stderr:
        pytest.skip("this glibc is too old")
    assert done.returncode == 0, done.stderr
    faults = float(done.stdout)
    assert faults < 0.1 * 50_000_000 / os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("command", [["explain", "model", "\udcff"], ["kb", "info", "a\udcff"], ["--port=\ud800"]])
def test_an_argument_that_is_not_utf8_is_one_sentence(error_of, command):
    error = error_of(*command)
    assert error.count("\n") == 1 and error.startswith("valm: error: the argument '") and "is not UTF-8 text" in error


def test_what_standard_output_cannot_encode_is_escaped(copy_of, monkeypatch):
    """As where the locale is C and Python was told not to take UTF-8 for it."""
    kb = copy_of("kb") / "kb"
    kb = kb.rename(kb.with_name("caf\u00e9"))
    printed = []
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert run("kb", "info", kb, *options) == 0
        printed.append(sys.stdout.buffer.getvalue().decode("ascii"))
    assert r"caf\xe9" in printed[0]
    assert json.loads(printed[1])["path"] == str(kb)


def test_a_panic_of_a_tokenizer_is_one_sentence(capfd, monkeypatch, world, tmp_path):
    """A regex whose matching takes too long makes the tokenizer panic, in an exception that is no Exception."""
    model = shutil.copytree(world / "gpt2", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    pattern = {"pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Split"} | pattern
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run("generate", model, "a" * 200 + "b", "--max-new-tokens", 1) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("valm: error: a tokenizer stopped; ")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"valm {__version__}\n"
    assert __version__ == valm_kernels.__version__


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a closed pipe is a signal or an error by system")
def test_a_closed_pipe_is_no_error(world):
    command = f"{sys.executable} -m valm kb search {world / 'kb'} sea; echo $? >&2"
    done = subprocess.run(f"({command}) | true", shell=True, capture_output=True, text=True)
    assert done.stderr == "0\n"


def test_quiet_shows_no_progress(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_DISABLE", "0")  # which the command changes, and which is as it was after the test
    build = ["kb", "build", world / "pictures", "--clip", world / "clip", "--out"]
    assert run(*build, tmp_path / "kb") == 0
    assert "encode" in capfd.readouterr().err
    assert run("--quiet", *build, tmp_path / "quiet") == run(*build, tmp_path / "behind", "--quiet") == 0
    assert capfd.readouterr().err == ""


def every_command(parser, words=()):
    """Every command with the words that call it."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield " ".join(words), parser
    for group in groups:
        for name, command in group.choices.items():
            yield from every_command(command, (*words, name))


COMMANDS = list(every_command(build_parser()))


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda it: it if isinstance(it, str) else "")
def test_help_says_what_each_option_means_and_its_default_once(name, command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.endswith(f"\n\nexample:\n  {command.example}\n")
    for action in command._actions:
        assert action.help or action.nargs == argparse.REMAINDER, f"{name} {action.option_strings or action.dest}"
        shown = command._get_formatter()._expand_help(action) if action.help else ""
        assert shown.count("(default: ") <= 1 and "(default: None)" not in shown, shown


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda it: it if isinstance(it, str) else "")
def test_examples_are_commands(name, command):
    words = shlex.split(command.example)
    assert words[: 1 + len(name.split())] == ["valm", *name.split()]
    assert build_parser().parse_args(words[1:]).run is not None


@pytest.mark.slow
def test_examples_run(world, base, tmp_path, monkeypatch, output_of):
    """One after the other, in a folder with what their words name."""
    write_sets(tmp_path / "sets")
    linked = {"pictures": "pictures", "more-pictures": "pictures", "base": "base", "smollm2": "base"}
    for name, there in linked.items():
        (tmp_path / name).symlink_to(world / there)
    (tmp_path / "other-kb").symlink_to("kb")  # of the same CLIP
    (tmp_path / "corpus.txt").write_text("the color of the sky is blue")
    monkeypatch.chdir(tmp_path)
    more = {"clip train": ["--steps", 1], "train": STEPS, "eval": ["--limit", 1]}
    more["pictures"] = ["--clip", world / "clip", "--steps", 1]
    for name, command in COMMANDS:
        if name not in ("serve", "lm-eval"):  # which runs until it is stopped, and which needs an extra
            output_of(*shlex.split(command.example)[1:], *more.get(name, []))
    for made in ("clip", "kb", "larger-kb", "unique-kb", "retrieved", "model", "found.png", "report", "sky.html"):
        assert Path(made).exists(), made


def test_what_is_not_there_is_said_before_torch_is_imported(tmp_path):
    """Whose import takes seconds."""
    corpus, out = str(tmp_path / "corpus.txt"), ["--out", str(tmp_path / "out")]
    wrong = [
        ["train", "none", *out],
        ["train", corpus, "--kb", "none", *out],
        ["train", "--retrieval", "none", *out],
        ["train", corpus, "--lr", "nan", *out],
        ["retrieve", corpus, "--kb", "none", *out],
        ["kb", "build", "none", "--clip", "x", *out],
        ["kb", "index", "none"],
        ["kb", "search", "none", "x"],
        ["clip", "train", "none", "--model", "small", *out],
        ["clip", "check", "none", "--clip", "x"],
        ["pictures", "none", "--model", "x", *out],
    ]
    (tmp_path / "corpus.txt").write_text("a dog")
    code = f"import sys; from valm.cli import main; print([main(words) for words in {wrong}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[1] * len(wrong)} False\n"


def test_no_more_commands_and_options():
    """Those that a user meets: positional ones too, without --help and the Trainer's own fields."""
    commands = dict(every_command(build_parser()))
    options = [action for command in commands.values() for action in command._actions if action.dest != "help"]
    assert len(commands) <= 18 and len(options) <= 169


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("genrate model text", "valm has no command genrate, did you mean generate?"),
        ("kb buidl", "valm kb has no command buidl, did you mean build?"),
        ("clip zzz", "valm clip has no command zzz: give one of train, check"),
        ("--verson", "valm has no option --verson, did you mean --version?"),
        ("generate model text --max-new-tokenz=3", "valm generate has no option --max-new-tokenz, did you mean --max-"),
        ("generate model text --zzz", "valm generate has no option --zzz"),
        ("kb build images --clip clip --outt kb", "valm kb build has no option --outt, did you mean --out?"),
        ("train corpus.txt --out model --layerz 3", "valm train has no option --layerz, did you mean --layer?"),
    ],
)
def test_a_command_or_option_that_there_is_not_is_one_sentence(error_of, words, message):
    error = error_of(*words.split())
    assert error.startswith(f"valm: error: {message}") and error.count("\n") == 1


def test_what_looks_like_an_option_may_be_a_text(error_of, tmp_path):
    for words in (["--beems and pillars"], ["--", "--beems"]):
        assert "there is no checkpoint folder" in error_of("generate", tmp_path / "none", *words)


@pytest.mark.parametrize("words", [[], ["kb"], ["clip"]], ids=str)
def test_without_a_command_there_is_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and out.startswith(f"usage: {' '.join(['valm', *words])}") and not err
