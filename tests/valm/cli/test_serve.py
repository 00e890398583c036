"""`valm serve` and the commands that ask it, on a Ray cluster of this machine."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

from tests.valm.cli.commands import SIZE, run
from tests.valm.retrieval.test_ray_server import K, padded_left, same
from valm.clip import Clip
from valm.errors import ValmError
from valm.knowledge_base.store import ImageKnowledgeBase
from valm.retrieval import ray_server
from valm.retrieval.context import ContextEncoder
from valm.retrieval.ray_server import RetrievalServer
from valm.retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="needs ray: install valm[ray]")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("RAY_worker_niceness", "0")
        head = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patched.setenv("RAY_ADDRESS", cluster.address)
        try:
            ray.init(cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def serve(cluster, tmp_path):
    """Starts `valm serve` in a process of its own and waits until it serves."""
    started = []

    def start(*arguments):
        with open(tmp_path / "log", "w") as log:
            command = [sys.executable, "-m", "valm", "serve", *map(str, arguments), "--ray", "auto"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        started.append(process)
        line = process.stdout.readline()
        assert "is served: give other commands --kb ray:" in line, (tmp_path / "log").read_text()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_crashes_and_one_that_ends(serve, world):
    import ray

    with pytest.raises(ValmError, match=r"there is no server 'colours'; start it with `valm serve KB --name colours`"):
        RetrievalServer("colours")
    process = serve(world / "kb", "--name", "colours")
    with pytest.raises(ValmError, match="has a server 'colours' already: give another name"):
        RetrievalServer.start(world / "kb", "colours", "auto")
    with pytest.raises(ValmError, match="no machine of the Ray cluster has the 1 cores and 1 GPUs"):
        RetrievalServer.start(world / "kb", "on-gpu", "auto", gpus=1)
    clip, kb = Clip.load(world / "clip"), ImageKnowledgeBase.open(world / "kb")
    ids, mask = padded_left(clip.tokenizer, (world / "corpus.txt").read_text().splitlines())
    expected = Retriever(ContextEncoder(clip), kb, K)(ids, mask)
    served = RetrievalServer("colours").retriever(clip.tokenizer, K)
    same(served(ids, mask), expected)

    actor = ray.get_actor("colours", namespace=ray_server.NAMESPACE)
    os.kill(ray.get(actor.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)
    served.cache.clear()
    same(served(ids, mask), expected)  # Ray has started it again, and asks again
    same(pickle.loads(pickle.dumps(served))(ids, mask), expected)

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    served.cache.clear()
    gone = r"^the server 'colours' is gone \(\w+\); start it with `valm serve KB --name colours` and run this again$"
    with pytest.raises(ValmError, match=gone):
        served(ids, mask)


@pytest.mark.slow
def test_the_commands(serve, world, tmp_path, capsys):
    serve(world / "kb")

    def printed(*arguments):
        assert run(*arguments) == 0
        return capsys.readouterr().out

    ask = ["eval", world / "valm", "--memory-color", world / "colors.csv", "--random-images"]
    generate = ["generate", world / "valm", "the color of the", "--beams", 2]
    for command in (generate, ask):
        served, local = (printed(*command, "--kb", kb) for kb in ("ray:kb", world / "kb"))
        assert served.replace("ray:kb", str(world / "kb")) == local
    train = ["train", "--retrieval", world / "retrieval", "--validation", 0.3, "--colors", world / "colors.csv", *SIZE]
    losses = [
        printed(*train, "--out", tmp_path / name, "--kb", kb).partition(";")[0]
        for name, kb in (("local", world / "kb"), ("served", "ray:kb"))
    ]
    assert losses[0] == losses[1] and "at the last" in losses[0]
    assert run("train", world / "corpus.txt", "--kb", "ray:kb", "--out", tmp_path / "corpus") == 1
    assert "run `valm retrieve` first, and give --retrieval" in capsys.readouterr().err
    assert run(*ask, "--query-dtype", "bfloat16", "--kb", "ray:kb") == 1
    assert "the CLIP of ray:kb and its precision are the server's" in capsys.readouterr().err
    assert run(*ask, "--cost", "--kb", "ray:kb") == 1
    assert "--cost times retrieval in this process: give a folder as --kb, not ray:kb" in capsys.readouterr().err
    assert run(*train, "--out", tmp_path / "blind", "--kb", "ray:kb", "--twin", "blind") == 1
    assert "a server searches by CLIP's queries, and this model is blind" in capsys.readouterr().err
