import io
import json
from argparse import Namespace

import pytest
from transformers import GenerationMixin

from tests.valm.cli.commands import run, wrong_inputs
from valm.cli.generate import chosen_prompts
from valm.model.checkpoint import load


@pytest.mark.parametrize("options", [[], ["--temperature", "1", "--seed", "3"]])
def test_generate_continues_the_prompt(world, output_of, options):
    said = output_of("generate", world / "valm", "the color of the apple", "--max-new-tokens", 4, *options)
    assert said.startswith("the color of the apple")


def test_the_likeliest_token_is_the_models_own(copy_of, output_of):
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
            texts[-1].append(output_of(*ask, *options))
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
    cut = f"the model reads 32 tokens: the prompt is cut to its first token and its last {room - 1}"
    left = 32 - min(words + 1, room)
    assert (cut in err) == (words + 1 > room)
    assert (f"the model reads 32 tokens: the continuation is at most {left} tokens long" in err) == (new > left)


def test_images_only_from_a_score_on(world, tmp_path):
    """What the model says follows the images that are left."""
    ask = ["explain", world / "valm", "the color of the apple is", "--out", tmp_path / "page.html"]

    def page(*options):
        assert run(*ask, *options) == 0
        return (tmp_path / "page.html").read_text()

    whole, same, without = page(), page("--min-score", "-1"), page("--min-score", "2")
    assert whole == same != without
    assert run("generate", world / "valm", "the sea", "--max-new-tokens", 2, "--min-score", "0.5") == 0
    with pytest.warns(UserWarning, match="--min-score has no effect on .*gpt2, which retrieves no images"):
        assert run("generate", world / "gpt2", "the sea", "--max-new-tokens", 2, "--min-score", "0.5") == 0


@pytest.fixture
def generated(world, output_of):
    """The results of `valm generate --json`."""
    command, new = ("generate", world / "valm"), ("--max-new-tokens", 3, "--json")
    return lambda *options: json.loads(output_of(*command, *options, *new))


def test_the_images_are_listed_below_the_text(world, output_of):
    ask = ["the color of the apple", "--max-new-tokens", 3]
    text, *images = output_of("generate", world / "valm", *ask).splitlines()
    assert text.startswith("the color of the apple")
    assert images and all(".png  a " in line and "  seen for: " in line for line in images)
    assert len(output_of("generate", world / "gpt2", *ask).splitlines()) == 1


def test_the_images_of_a_new_token_are_those_it_was_predicted_from(world, generated):
    (result,) = generated("the color of the apple")
    model, tokenizer = load(world / "valm")
    found = model.retriever([result["text"]])
    ids = found.image_ids[found.image_index[0]].tolist()
    prompt = len(tokenizer("the color of the apple")["input_ids"])
    assert len(result["tokens"]) == 3
    for place, token in enumerate(result["tokens"], prompt - 1):
        assert [image["id"] for image in token["images"]] == ids[place]
        assert token["images"][0]["score"] == pytest.approx(found.scores[0, place, 0].item())


def test_another_number_of_images(generated):
    for k in (1, 5):
        (result,) = generated("the sea", "-k", k)
        assert [len(token["images"]) for token in result["tokens"]] == [k] * 3


def test_a_prompt_ends_at_a_line_break_alone(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("the\u2028sea\x0cis\r\nthe apple\rred\n".encode())
    found = chosen_prompts(Namespace(prompt=None, prompts=tmp_path / "prompts.txt"))
    assert found == ["the\u2028sea\x0cis", "the apple", "red"]


def test_prompts_come_from_a_file_or_standard_input(generated, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the sea\n\nthe apple\n")
    found = generated("--prompts", tmp_path / "prompts.txt")
    assert [result["prompt"] for result in found] == ["the sea", "the apple"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the sea\nthe apple"))
    assert generated("--prompts", "-") == found


def test_temperature_and_top_p_sample(generated):
    def texts(*options):
        return [generated("the color of the", *options, "--seed", seed)[0]["text"] for seed in range(4)]

    greedy, hot = texts(), texts("--temperature", 50)
    assert len(set(greedy)) == 1 and len(set(hot)) == 4
    assert texts("--temperature", 50) == hot
    assert texts("--top-p", 1e-6) == greedy  # the likeliest token alone


def test_sampling_draws_from_all_tokens(generated, monkeypatch):
    """transformers' own default is the 50 likeliest."""
    seen = []
    generate = GenerationMixin.generate

    def recorded(model, *arguments, **options):
        seen.append(options.get("top_k"))
        return generate(model, *arguments, **options)

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    for options in (("--temperature", 1), ("--temperature", 2), ("--top-p", 1), ()):
        generated("the sea", *options)
    assert seen == [0, 0, 0, None]


VALM, GPT2 = "generate {world}/valm ", "generate {world}/gpt2 x "


@wrong_inputs(
    {
        "generate {tmp}/none x": "no checkpoint folder {tmp}/none",
        "generate {world}/kb x": "is no checkpoint",
        VALM: "give either a prompt or --prompts FILE",
        VALM + "x --prompts -": "give either a prompt or --prompts FILE",
        VALM + "--prompts {tmp}/empty.txt": "{tmp}/empty.txt contains no prompt",
        VALM + "--prompts {tmp}/none": "{tmp}/none: No such file",
        VALM + "x -k 7": "from 1 to the 6 images of",
        VALM + "x --min-score nan": "min_score must be a finite number",
        GPT2 + "-k 2": "retrieves no images",
        GPT2 + "--kb {world}/kb": "sees no images",
    }
)
def test_wrong_input_is_one_sentence(sentence, command, message):
    sentence(command, message)


def test_a_config_of_another_model_is_one_sentence(copy_of, error_of):
    model = copy_of("gpt2") / "gpt2"
    config = json.loads((model / "config.json").read_text())
    config["base_config"]["n_embd"] = 64
    (model / "config.json").write_text(json.dumps(config))
    assert "do not fit its config.json" in error_of("generate", model, "x")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", [1, "x"]),
        ("generation_config.json", "bos_token_id", {"a": 1}),
        ("generation_config.json", "pad_token_id", "x"),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "model_max_length", [5]),
    ],
)
def test_a_field_of_another_type_is_one_sentence(copy_of, error_of, name, key, value):
    model = copy_of("gpt2") / "gpt2"
    config = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(config | {key: value}))
    error = error_of("generate", model, "the sea")
    assert str(model) in error and error.count("\n") == 1
    assert key in error or "cannot be read" in error  # of a pad_token_id transformers itself complains
