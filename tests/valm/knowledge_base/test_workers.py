"""Worker processes end when the process that started them is killed."""

import signal
import subprocess
import sys

import pytest

from tests.valm.killed import is_running, still_running

# A DataLoader whose workers have more to say than their pipes hold, and whose main process reads one batch only.
LOADER = """
import sys, time
import torch
from torch.utils.data import DataLoader
from valm.knowledge_base.workers import end_with_parent
if sys.argv[1] == "elsewhere":
    sys.platform = "elsewhere"
data = [torch.zeros(100_000) for _ in range(64)]
as_bytes = lambda batch: batch[0].numpy().tobytes()  # through a pipe; tensors go through shared memory
batches = iter(DataLoader(data, 1, collate_fn=as_bytes, num_workers=2, worker_init_fn=end_with_parent))
next(batches)
print(*[worker.pid for worker in batches._workers], flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_workers_end_with_their_parent(platform):
    with subprocess.Popen([sys.executable, "-c", LOADER, platform], stdout=subprocess.PIPE, text=True) as main:
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        main.send_signal(signal.SIGKILL)
    assert not still_running(workers)
