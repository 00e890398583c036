import torch
import torch.nn.functional as F

from benchmarks.valm import tower_noise
from valm_kernels import FlatIPIndex

IMAGES, DIM = 50, 8


class Encoder:
    """The query of a token is the vector of its id, read token by token with `noise`."""

    def __init__(self, noise: float):
        generator = torch.Generator().manual_seed(0)
        self.table = F.normalize(torch.randn(100, DIM, generator=generator), dim=-1)
        self.noise = noise * torch.randn(100, DIM, generator=generator)

    def __call__(self, ids):
        return self.table[ids]

    def new_cache(self, batch):
        return None

    def step(self, ids, cache):
        return (self.table + self.noise)[ids]


def measured(noise: float) -> tuple[float, float, float]:
    vectors = F.normalize(torch.randn(IMAGES, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
    ids = torch.arange(100).reshape(2, 50)
    return tower_noise.measured(Encoder(noise), ids, FlatIPIndex(vectors), vectors)


def test_without_noise_no_image_changes():
    eps, closer, changed = measured(0)
    assert eps < 1e-6 and closer == changed == 0


def test_images_change_within_the_noise_only():
    eps, closer, changed = measured(0.01)
    assert 0.01 < eps < 0.2 and 0 < changed < closer < 1
