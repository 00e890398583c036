import io
import json
from argparse import Namespace

import pytest
import torch
from transformers import GenerationMixin

from tests.valm.cli.commands import run
from valm.cli.generate import chosen_prompts
from valm.model.checkpoint import load


@pytest.mark.parametrize("options", [[], ["--temperature", "1", "--seed", "3"]])
def test_generate_continues_the_prompt(world, capsys, options):
    assert run("generate", world / "valm", "the color of the apple", "--max-new-tokens", 4, *options) == 0
    assert capsys.readouterr().out.startswith("the color of the apple")


def test_the_likeliest_token_is_the_models_own(copy_of, capsys):
    """Whatever the generation_config of its base says: only where a text ends is taken from it."""
    root = copy_of("valm", "kb", "clip")
    ask = ["generate", root / "valm", "the color of the apple", "--max-new-tokens", 8]
    texts = []
    for options in ([], ["--top-p", "1", "--seed", "3"], ["--temperature", "1.0", "--seed", "3"]):
        file = root / "valm" / "generation_config.json"
        config = json.loads(file.read_text())
        texts.append([])
        for changed in (
            {},
            {"repetition_penalty": 2.5, "top_p": 0.05, "temperature": 0.6, "top_k": 5, "do_sample": True},
            {"forced_eos_token_id": 3, "exponential_decay_length_penalty": [1, 9.0], "max_time": 1e-9},
            {"guidance_scale": 3.0, "return_dict_in_generate": True, "suppress_tokens": list(range(9, 40))},
        ):
            file.write_text(json.dumps(config | changed))
            assert run(*ask, *options) == 0
            texts[-1].append(capsys.readouterr().out)
        file.write_text(json.dumps(config))
    assert all(len(set(one)) == 1 and len(one) == 4 for one in texts)
    assert texts[1] == texts[2]


@pytest.mark.parametrize(("words", "new"), [(60, 4), (29, 4), (60, 1000), (1, 1000)])
def test_a_prompt_longer_than_the_context_is_shortened(world, capsys, words, new):
    prompt = " ".join(["apple"] * words)
    assert run("generate", world / "valm", prompt, "--max-new-tokens", new) == 0
    out, err = capsys.readouterr()
    room = max(32 - new, 16)
    assert out.startswith(" ".join(["apple"] * min(words, room - 1)))
    assert (f"the model reads 32 tokens: the prompt is cut to its first token and its last {room - 1}" in err) == (
        words + 1 > room
    )
    left = 32 - min(words + 1, room)
    assert (f"the model reads 32 tokens: the continuation has {left} at most" in err) == (new > left)


def test_the_text_tower_in_another_precision(world, capsys, monkeypatch):
    assert run("generate", world / "valm", "the sea", "--max-new-tokens", 2, "--query-dtype", "bfloat16") == 0
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert run("generate", world / "valm", "the sea", "--query-dtype", "int8") == 1
    assert "this processor has no AVX-512 VNNI" in capsys.readouterr().err
    model, _ = load(world / "valm", query_dtype=torch.bfloat16)
    assert model.retriever.encoder.tower.dtype == torch.bfloat16


def test_images_only_from_a_score_on(world, tmp_path, capsys):
    """What the model says follows the images that are left."""
    ask = ["explain", world / "valm", "the color of the apple is", "--out", tmp_path / "page.html"]

    def page(*options):
        assert run(*ask, *options) == 0
        return (tmp_path / "page.html").read_text()

    whole, same, without = page(), page("--min-score", "-1"), page("--min-score", "2")
    assert whole == same != without
    generate = ["generate", world / "valm", "the color of the apple", "--max-new-tokens", 4]
    assert run(*generate, "--min-score", "0.5") == 0
    capsys.readouterr()
    assert run(*generate, "--min-score", "nan") == 1
    assert "min_score must be a finite number" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="--min-score changes nothing of .*gpt2, which retrieves no images"):
        assert run("generate", world / "gpt2", "the sea", "--max-new-tokens", 2, "--min-score", "0.5") == 0


def generate_json(world, capsys, *options):
    assert run("generate", world / "valm", *options, "--max-new-tokens", 3, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_images_are_listed_below_the_text(world, capsys):
    assert run("generate", world / "valm", "the color of the apple", "--max-new-tokens", 3) == 0
    text, *images = capsys.readouterr().out.splitlines()
    assert text.startswith("the color of the apple")
    assert images and all(".png  a " in line and "  seen for: " in line for line in images)
    assert run("generate", world / "gpt2", "the color of the apple", "--max-new-tokens", 3) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_images_of_a_new_token_are_those_it_was_predicted_from(world, capsys):
    (result,) = generate_json(world, capsys, "the color of the apple")
    model, tokenizer = load(world / "valm")
    found = model.retriever([result["text"]])
    ids = found.image_ids[found.image_index[0]].tolist()
    prompt = len(tokenizer("the color of the apple")["input_ids"])
    assert len(result["tokens"]) == 3
    for place, token in enumerate(result["tokens"], prompt - 1):
        assert [image["id"] for image in token["images"]] == ids[place]
        assert token["images"][0]["score"] == pytest.approx(found.scores[0, place, 0].item())


def test_another_number_of_images(world, capsys):
    for k in (1, 5):
        (result,) = generate_json(world, capsys, "the sea", "-k", k)
        assert [len(token["images"]) for token in result["tokens"]] == [k] * 3


def test_a_prompt_ends_at_a_line_break_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("the\u2028sea\x0cis\r\nthe apple\rred\n".encode())
    found = chosen_prompts(Namespace(prompt=None, prompts=tmp_path / "prompts.txt"))
    assert found == ["the\u2028sea\x0cis", "the apple", "red"]


def test_prompts_come_from_a_file_or_standard_input(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the sea\n\nthe apple\n")
    found = generate_json(world, capsys, "--prompts", tmp_path / "prompts.txt")
    assert [result["prompt"] for result in found] == ["the sea", "the apple"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\nthe apple"))
    assert generate_json(world, capsys, "--prompts", "-") == found


def test_temperature_and_top_p_sample(world, capsys):
    ask = ("the color of the", "--max-new-tokens", 6)

    def texts(*options):
        return [generate_json(world, capsys, *ask, *options, "--seed", seed)[0]["text"] for seed in range(4)]

    greedy, hot = texts(), texts("--temperature", 50)
    assert len(set(greedy)) == 1 and len(set(hot)) == 4
    assert texts("--temperature", 50) == hot
    assert texts("--top-p", 1e-6) == greedy  # the likeliest token alone


def test_sampling_draws_from_all_tokens(world, capsys, monkeypatch):
    """transformers' own default is the 50 likeliest."""
    seen = []
    generate = GenerationMixin.generate

    def recorded(model, *arguments, **options):
        seen.append(options.get("top_k"))
        return generate(model, *arguments, **options)

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    for options in (("--temperature", 1), ("--temperature", 2), ("--top-p", 1), ()):
        generate_json(world, capsys, "the sea", "--max-new-tokens", 1, *options)
    assert seen == [0, 0, 0, None]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--temperature", "0"], "0 is not a number above 0"),
        (["--temperature", "nan"], "nan is not a number above 0"),
        (["--top-p", "1.5"], "1.5 is not above 0 and at most 1"),
        (["-k", "0"], "0 is not at least 1"),
    ],
)
def test_values_out_of_range_are_refused(option, message, capsys):
    with pytest.raises(SystemExit):
        run("generate", "model", "x", *option)
    assert message in capsys.readouterr().err


def test_checkpoint_and_knowledge_base_move_together(copy_of, capsys):
    root = copy_of("valm", "kb", "clip")
    assert run("generate", root / "valm", "the sea", "--max-new-tokens", 2) == 0


def wrong_inputs():
    """name -> (arguments, what the sentence must say); {world} and {tmp} are the folders."""
    return {
        "no such checkpoint": (["generate", "{tmp}/none", "x"], "no checkpoint folder {tmp}/none"),
        "not a checkpoint": (["generate", "{world}/kb", "x"], "is no checkpoint"),
        "no prompt": (["generate", "{world}/valm"], "give either a prompt or --prompts FILE"),
        "two prompts": (["generate", "{world}/valm", "x", "--prompts", "-"], "give either a prompt or --prompts FILE"),
        "no text": (["generate", "{world}/valm", "--prompts", "{tmp}/empty.txt"], "{tmp}/empty.txt has no prompt"),
        "no such prompts": (["generate", "{world}/valm", "--prompts", "{tmp}/none"], "{tmp}/none: No such file"),
        "more images than there are": (["generate", "{world}/valm", "x", "-k", "7"], "from 1 to the 6 images of"),
        "images for a model without": (["generate", "{world}/gpt2", "x", "-k", "2"], "retrieves no images"),
        "pictures for a model without": (["generate", "{world}/gpt2", "x", "--kb", "{world}/kb"], "sees no images"),
    }


def test_a_seed_below_0_is_no_traceback(world, capsys):
    with pytest.raises(SystemExit) as stop:
        run("generate", world / "valm", "x", "--seed", "-1")
    assert stop.value.code == 2 and "-1 is not from 0 to 4294967295" in capsys.readouterr().err


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_one_sentence(sentence, name):
    arguments, expected = wrong_inputs()[name]
    sentence(arguments, expected)


def test_a_config_of_another_model_is_one_sentence(copy_of, capsys):
    root = copy_of("gpt2")
    config = json.loads((root / "gpt2" / "config.json").read_text())
    (root / "gpt2" / "config.json").write_text(
        json.dumps(config | {"base_config": config["base_config"] | {"n_embd": 64}})
    )
    assert run("generate", root / "gpt2", "x") == 1
    assert "are not those of its config.json" in capsys.readouterr().err
