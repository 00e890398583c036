"""The `valm` command: each subcommand is a few lines over the library."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Idle OpenMP threads spin by default, and on few cores keep any other process's work, and so each other, from running.
# Sleeping costs some speed where the cores are all ours; set the variable to "active" for that. The runtime reads it
# once, when torch is imported, so it stands before everything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from valm.errors import ValmError


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own). Returns the exit status: 0, or 1 after one sentence
    on stderr that says what was wrong with the input."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValmError, ImportError, OSError) as error:
        print(f"valm: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("valm: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="valm", description="A language model that looks at pictures while it reads.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(group, name: str, run, help: str) -> argparse.ArgumentParser:
        added = group.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    demo = command(
        commands, "demo", run_demo, "train and evaluate a small VaLM and its text-only twin on real pictures"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of results, report and models")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--eval-data",
        type=Path,
        default=os.environ.get("VALM_EVAL_DATA"),
        help="folder of the evaluation sets, for MemoryColor (default: the variable VALM_EVAL_DATA)",
    )

    kb = commands.add_parser("kb", help="build, inspect and search an image knowledge base")
    kb_commands = kb.add_subparsers(required=True, metavar="COMMAND")
    build = command(kb_commands, "build", run_kb_build, "encode a folder of pictures into a knowledge base")
    build.add_argument("folder", type=Path, help="where the pictures are")
    build.add_argument(
        "--format",
        choices=["pictures", "webdataset", "embeddings"],
        default="pictures",
        help="pictures with captions beside them or in a captions table; tar files as img2dataset writes them; "
        "embeddings that --clip has made, in clip-retrieval's layout",
    )
    build.add_argument("--clip", required=True, help="CLIP folder, hf-hub:ORGANISATION/MODEL or ARCHITECTURE:WEIGHTS")
    build.add_argument("--out", type=Path, required=True, help="folder of the knowledge base; a killed build goes on")
    build.add_argument("--captions", type=Path, help="table of captions, where it is not beside the pictures")
    build.add_argument("--batch-size", type=positive, default=64)
    build.add_argument("--thumbnails", type=int, default=64, help="longer side of the pictures kept; 0 keeps none")
    info = command(kb_commands, "info", run_kb_info, "what a knowledge base holds")
    info.add_argument("kb", type=Path)
    verify = command(kb_commands, "verify", run_kb_verify, "read a whole knowledge base and compare its checksums")
    verify.add_argument("kb", type=Path)
    merge = command(kb_commands, "merge", run_kb_merge, "join knowledge bases of one CLIP")
    merge.add_argument("parts", type=Path, nargs="+", metavar="KB")
    merge.add_argument("--out", type=Path, required=True, help="folder of the joined knowledge base")
    search = command(kb_commands, "search", run_kb_search, "the pictures nearest to a text")
    search.add_argument("kb", type=Path)
    search.add_argument("text")
    search.add_argument("--clip", help="the CLIP, where it is no longer where the knowledge base found it")
    search.add_argument("-k", type=positive, default=8, help="how many pictures")
    search.add_argument("--sheet", type=Path, help="also draw what was found into this picture file")

    train = command(commands, "train", run_train, "train a VaLM, or without --kb its text-only twin GPT-2*")
    train.add_argument("corpus", type=Path, help="text file, one document a line")
    train.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    train.add_argument("--kb", type=Path, help="knowledge base; without it the model sees no pictures")
    train.add_argument("--clip", help="the CLIP whose tokenizer the model reads with (default: that of --kb)")
    train.add_argument("-k", "--images", type=positive, default=4, help="pictures a token sees")
    train.add_argument("--query", choices=["eot", "state"], default="eot", help="kind of the retrieval query")
    train.add_argument("--layers", type=positive, default=12)
    train.add_argument("--width", type=positive, default=768)
    train.add_argument("--heads", type=positive, default=12)
    train.add_argument("--context", type=positive, default=512, help="most tokens of a document")
    train.add_argument("--steps", type=positive, default=1000)
    train.add_argument("--batch-size", type=positive, default=16, help="documents a step")
    train.add_argument("--lr", type=float, default=5e-4)
    train.add_argument("--seed", type=int, default=0)

    evaluate = command(commands, "eval", run_eval, "ask a checkpoint for the colours of things")
    evaluate.add_argument("model", type=Path, help="checkpoint folder")
    evaluate.add_argument("--memory-color", type=Path, help="memory_color_data.csv")
    evaluate.add_argument("--color-terms", type=Path, help="color-concrete-objects.csv")
    evaluate.add_argument("--protocol", choices=["fair", "published"], default="fair")
    evaluate.add_argument("--out", type=Path, help="write all answers to this JSON file")
    add_retrieval(evaluate)

    generate = command(commands, "generate", run_generate, "continue a text")
    generate.add_argument("model", type=Path, help="checkpoint folder")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=positive, default=20)
    generate.add_argument("--beams", type=positive, default=1)
    generate.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    generate.add_argument("--seed", type=int, default=0, help="of --sample")
    add_retrieval(generate)
    return parser


def add_retrieval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kb", type=Path, help="another knowledge base than the checkpoint was trained with")
    parser.add_argument("--clip", help="the CLIP, where it is no longer where the knowledge base found it")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def run_demo(arguments: argparse.Namespace) -> None:
    from valm.demo.run import run_demo

    run_demo(arguments.out, seed=arguments.seed, eval_data=arguments.eval_data)


def run_kb_build(arguments: argparse.Namespace) -> None:
    from valm.retrieval.builders import build_from_embeddings, build_from_folder, build_from_webdataset
    from valm.retrieval.clip import Clip

    if arguments.captions is not None and arguments.format != "pictures":
        raise ValmError(f"--captions is for --format pictures; {arguments.format} bring their own")
    source = (arguments.folder, arguments.out, Clip.load(arguments.clip))
    encoding = {"batch_size": arguments.batch_size, "thumbnails": arguments.thumbnails}
    if arguments.format == "embeddings":
        kb = build_from_embeddings(*source)
    elif arguments.format == "webdataset":
        kb = build_from_webdataset(*source, **encoding)
    else:
        kb = build_from_folder(*source, **encoding, captions=arguments.captions)
    print_kb(kb)


def run_kb_info(arguments: argparse.Namespace) -> None:
    from valm.retrieval.knowledge_base import ImageKnowledgeBase

    print_kb(ImageKnowledgeBase.open(arguments.kb))


def run_kb_verify(arguments: argparse.Namespace) -> None:
    from valm.retrieval.knowledge_base import ImageKnowledgeBase

    kb = ImageKnowledgeBase.open(arguments.kb)
    damaged = kb.verify()
    if damaged:
        raise ValmError(f"{arguments.kb} is damaged, build it again: {', '.join(damaged)}")
    print(f"{arguments.kb}: all {len(kb):,} pictures are as they were written")


def run_kb_merge(arguments: argparse.Namespace) -> None:
    from valm.retrieval.builders import merge

    print_kb(merge(arguments.parts, arguments.out))


def print_kb(kb) -> None:
    clip = kb.manifest["clip"]
    print(f"{kb.path}: {len(kb):,} pictures, {kb.dim} dimensions, {kb.manifest['dtype']}")
    print(f"encoded by the CLIP {clip['name']}, weights {clip['weights_hash'][:12]}")
    skipped = kb.skipped()
    if skipped:
        print(f"{len(skipped)} pictures could not be read:")
        for picture in skipped:
            print(f"  {picture['uri']}: {picture['reason']}")


def run_kb_search(arguments: argparse.Namespace) -> None:
    from valm.retrieval.contact_sheet import contact_sheet
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.knowledge_base import ImageKnowledgeBase
    from valm.retrieval.retriever import Retriever

    kb = ImageKnowledgeBase.open(arguments.kb)
    retriever = Retriever(ContextEncoder(kb.load_clip(arguments.clip)), kb, k=1)
    results = retriever.search(arguments.text, arguments.k)
    for score, item in results:
        caption = item.caption.splitlines()[0] if item.caption else ""
        print(f"{score:7.4f}  {item.uri}  {caption}")
    if arguments.sheet is not None:
        try:
            contact_sheet(kb, results, arguments.text).save(arguments.sheet)
        except ValueError as error:  # a file name whose ending Pillow does not know
            raise ValmError(f"cannot write the picture {arguments.sheet}: {error}") from error


def run_train(arguments: argparse.Namespace) -> None:
    import torch

    from valm.checkpoint import save_retrieval
    from valm.config import ValmConfig
    from valm.files import writable_folder
    from valm.model import VaLMForCausalLM
    from valm.retrieval.cache import retrieve_corpus
    from valm.retrieval.clip import Clip
    from valm.retrieval.context import ContextEncoder
    from valm.retrieval.knowledge_base import ImageKnowledgeBase
    from valm.retrieval.retriever import Retriever
    from valm.tokenizer import clip_tokenizer
    from valm.training.collate import tokenize_documents
    from valm.training.train import train

    try:
        texts = arguments.corpus.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValmError(f"the corpus {arguments.corpus} is not UTF-8 text: {error}") from error
    if any(writable_folder(arguments.out).iterdir()):
        raise ValmError(f"the output folder {arguments.out} is not empty; choose another")
    kb = ImageKnowledgeBase.open(arguments.kb) if arguments.kb else None
    if kb is not None:
        clip = kb.load_clip(arguments.clip)
        tokenizer = clip.tokenizer
    else:
        tokenizer = Clip.load(arguments.clip).tokenizer if arguments.clip else clip_tokenizer()
    config = ValmConfig(
        vocab_size=len(tokenizer),
        n_positions=arguments.context,
        n_layer=arguments.layers,
        n_embd=arguments.width,
        n_head=arguments.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        image_dim=kb.dim if kb is not None else arguments.width,
        num_images=arguments.images if kb is not None else 0,
    )
    documents = tokenize_documents(texts, tokenizer, arguments.context)
    dataset = [{"input_ids": document} for document in documents]
    if kb is not None:
        retriever = Retriever(ContextEncoder(clip, query=arguments.query), kb, arguments.images)
        dataset = retrieve_corpus(documents, retriever, arguments.out / "retrieval")
    torch.manual_seed(arguments.seed)
    losses = train(
        VaLMForCausalLM(config),
        dataset,
        kb,
        arguments.out,
        tokenizer=tokenizer,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        seed=arguments.seed,
        row_length=arguments.context,
    )
    if kb is not None:
        save_retrieval(arguments.out, retriever)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; written to {arguments.out}")


def load_model(arguments: argparse.Namespace):
    from valm.checkpoint import load_checkpoint

    return load_checkpoint(arguments.model, kb=arguments.kb, clip=arguments.clip)


def run_eval(arguments: argparse.Namespace) -> None:
    from valm.evaluation.color import evaluate_color, load_color_terms, load_memory_color
    from valm.files import write_json

    sets = {}
    if arguments.memory_color:
        sets["MemoryColor"] = load_memory_color(arguments.memory_color)
    if arguments.color_terms:
        sets["ColorTerms"] = load_color_terms(arguments.color_terms)
    if not sets:
        raise ValmError("nothing to evaluate: give --memory-color or --color-terms, or both")
    model, tokenizer = load_model(arguments)
    results = {}
    for name, items in sets.items():
        result = evaluate_color(model, tokenizer, items, protocol=arguments.protocol, progress=name)
        results[name] = result.to_json()
        print(f"{name}, {len(items)} things, {len(result.prompts)} prompts, {arguments.protocol} protocol")
        print(f"  accuracy            {result.accuracy}  (95 % interval over things)")
        if result.vote is not None:
            print(f"  vote of the prompts {result.vote}")
            print(f"  calibrated          {result.calibrated}")
            print(f"  calibrated vote     {result.calibrated_vote}")
        print(
            f"  always {result.majority_answer!r}{'':<{max(0, 11 - len(result.majority_answer))}} {result.majority:.3f}"
        )
    if arguments.out:
        write_json(arguments.out, results)


def run_generate(arguments: argparse.Namespace) -> None:
    import torch

    model, tokenizer = load_model(arguments)
    torch.manual_seed(arguments.seed)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    tokens = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=arguments.max_new_tokens,
        num_beams=arguments.beams,
        do_sample=arguments.sample,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
