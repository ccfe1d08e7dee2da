"""A real, if untrained, model, and small shards of coloured squares with captions and classes."""

import io
import json

import pytest
import torch
from PIL import Image
from webdataset.writer import TarWriter

from pretrain.evaluate.judge import Judge
from pretrain.testing import untrained_judge

COLOURS = {"red": (220, 20, 30), "green": (20, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(scope="session")
def judge() -> Judge:
    return untrained_judge()


@pytest.fixture(scope="session")
def write_shard():
    """A tar of noisy squares; what is beside the images is for the caller to say, sample by sample."""

    def write(path, count, *, beside, damaged=()):
        with TarWriter(str(path)) as tar:
            for place in range(count):
                colour = list(COLOURS)[place % len(COLOURS)]
                noise = torch.randint(0, 30, (24, 24, 3), generator=torch.Generator().manual_seed(place))
                pixels = (torch.tensor(COLOURS[colour]) + noise).clamp(max=255).to(torch.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels.numpy()).save(stream, "PNG")
                png = stream.getvalue()[:60] if place in damaged else stream.getvalue()
                record = json.dumps(beside(place, colour)).encode()
                tar.write({"__key__": f"{place:09d}", "png": png, "json": record})
        return str(path)

    return write
