"""On a Ray cluster of several nodes on this machine; a node is a group of processes that can be killed."""

import contextlib
import os
import pickle
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.valm.store.manifests import contents
from tests.valm.tiny_clip import TEXTS
from valm.cli import main
from valm.corpus.retrieved import retrieve_corpus
from valm.corpus.texts import read_documents
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval.context import ContextEncoder
from valm.retrieval.ray_index import ShardedIndex
from valm.retrieval.retriever import Retriever
from valm.store import ray as ray_run
from valm.store.ray import RayRun
from valm.store.shards import ProgressBar
from valm_kernels import FlatIPIndex

# A node with its workers must fit beside everything else on a small machine.
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.mark.slow  # ray comes with the extra `check`
def test_wrong_addresses_and_numbers(make_kb):
    pytest.importorskip("ray", reason="needs ray: install valm[ray]")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        free = listening.getsockname()[1]
    for address, reason in ((f"127.0.0.1:{free}", "refused"), ("somewhere", "Invalid address format")):
        with pytest.raises(ValmError, match=rf"no Ray cluster at '{address}': .*{reason}"):
            RayRun(address)
    with pytest.raises(ValmError, match="actors must be from 1 to the 3 images"):
        ShardedIndex(make_kb(3), 4, "auto")


def test_what_a_task_is_sent(clip, make_kb, tmp_path, monkeypatch):
    """Also where the knowledge base was opened by a relative path: another machine has another working directory."""
    kb = make_kb(6)
    monkeypatch.chdir(kb.path.parent)
    retriever = Retriever(ContextEncoder(clip), ImageKnowledgeBase.open(kb.path.name), 2)
    sent = pickle.dumps(retriever)
    monkeypatch.chdir(tmp_path)
    ids = clip.tokenizer(TEXTS[:1], return_tensors="pt").input_ids
    for found, expected in zip(pickle.loads(sent)(ids), retriever(ids), strict=True):
        assert torch.equal(found, expected)


def test_without_ray_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[ray\]'"):
        RayRun("auto")


@pytest.fixture(scope="module")
def cluster():
    """A head without cores of its own, where the driver is."""
    ray = pytest.importorskip("ray", reason="needs ray: install valm[ray]")
    from ray.cluster_utils import Cluster

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {**NODE, "num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(cluster.address, log_to_driver=False)
            torch.set_num_threads(1)  # as many as a task with one core has
            yield cluster
        finally:
            torch.set_num_threads(threads)
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def add_node(cluster):
    """Adds nodes to the cluster, which are gone after the test."""
    yield lambda **options: cluster.add_node(**{**NODE, **options})
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def killing(cluster, node, folder, pattern):
    """Kills `node` as soon as `folder` has a file like `pattern`, which must be before the block ends."""
    ended = threading.Event()
    killed = threading.Event()

    def kill():
        while not ended.wait(0.01):
            if any(Path(folder).glob(pattern)):
                cluster.remove_node(node, allow_graceful=False)
                killed.set()
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
        assert killed.is_set()
    finally:
        ended.set()
        thread.join()


def work_that_fails(number, part, progress):
    if part == "waits":
        time.sleep(100)
    if part == "crashes":
        os._exit(1)
    raise ValmError("this part is wrong")


@pytest.mark.slow
def test_what_ray_gives_up_is_one_sentence(cluster, add_node, make_kb, monkeypatch):
    monkeypatch.setattr(ray_run, "MAX_RETRIES", 0)
    add_node(), add_node(num_cpus=2)
    for room, message in (
        ({"cpus": 3}, "no machine of the Ray cluster has the 3 cores and 0 GPUs"),
        ({"cpus": 2, "gpus": 1}, "the 2 cores and 1 GPUs that a task reserves: lower --cpus"),
    ):
        with pytest.raises(ValmError, match=message):
            RayRun("auto", **room)
    for part, message in (
        ("crashes", r"^Ray gave up on a shard: .*\(WorkerCrashedError\)\. Once"),
        ("fails", "^this part is wrong$"),
    ):
        with pytest.raises(ValmError, match=message), ProgressBar("x", " x", None, False) as bar:
            # not two that fail: a task that ends as it is cancelled may end this process, by a race in Ray 2.60
            RayRun("auto")(work_that_fails, enumerate([part, "waits"]), bar)
    kb = make_kb(4)
    shutil.rmtree(kb.path)
    index = ShardedIndex(kb, 1, "auto")
    with pytest.raises(
        ValmError, match=rf"^Ray gave up on a search actor: .*no knowledge base at {kb.path}.*ActorDied"
    ):
        index.search(torch.ones(1, kb.dim), 1)


@pytest.mark.slow
def test_a_corpus_retrieval_and_its_search_while_a_node_is_killed(cluster, add_node, clip, make_kb, tmp_path):
    import ray

    kb = make_kb(40)
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS * 100))

    def retrieve(name, index=None, **options):
        retriever = Retriever(ContextEncoder(clip), kb, 4, index)
        documents = read_documents([tmp_path / "corpus.txt"])
        return retrieve_corpus(documents, retriever, tmp_path / name, part_bytes=1000, progress=False, **options)

    here = retrieve("here")
    # without any of them there is a core for a task beside the two actors: it would wait for one forever
    nodes = {node.node_id: node for node in (add_node(num_cpus=2), add_node(num_cpus=2), add_node())}
    with pytest.raises(ValmError, match=r"40 actors of 1 cores leave no room .* room for \d actors: use fewer"):
        ShardedIndex(kb, 40, "auto")
    index = ShardedIndex(kb, 2, "auto")
    victim = nodes[ray.get(index._actors[0].__ray_call__.remote(lambda actor: ray.get_runtime_context().get_node_id()))]
    queries = torch.nn.functional.normalize(torch.randn(7, 3, kb.dim), dim=-1)
    expected = FlatIPIndex(kb.vectors()).search(queries, 30)
    found = index.search(queries, 30)  # more than the 20 rows of an actor
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    with killing(cluster, victim, tmp_path / "there", "shard-00003.json"):
        there = retrieve("there", index, run=RayRun("auto"))
    assert len(there.manifest["shards"]) > 10
    assert contents(there.path) == contents(here.path)
    assert torch.equal(index.search(queries, 30).indices, expected.indices)


@pytest.mark.slow
def test_the_commands(add_node, clip, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 40), (50 * number, 100, 0)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS))
    clip.save(tmp_path / "clip")

    def run(*arguments):
        assert main([str(argument) for argument in arguments]) == 0

    add_node(num_cpus=4)  # an actor of the test before may still hold a core
    kb = tmp_path / "kb"
    run("kb", "build", tmp_path / "pictures", "--clip", tmp_path / "clip", "--out", kb, "--ray", "auto")
    retrieve = ["retrieve", tmp_path / "corpus.txt", "--kb", kb, "-k", 2, "--out"]
    run(*retrieve, tmp_path / "there", "--ray", "auto", "--search-actors", 2)
    assert "2 documents" in capsys.readouterr().out
    run(*retrieve, tmp_path / "here")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
