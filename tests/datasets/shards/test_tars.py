import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.decode import decode
from datasets.errors import UserError
from datasets.loader import Feed, Loader, evaluation_batches
from datasets.mixture import Account
from datasets.shards.tars import Tars
from datasets.sources import open_source
from datasets.tokens import TrainedBPE
from datasets.views import Augment, fixed_view

ROOT = Path(__file__).parents[3]
TOKENIZER = TrainedBPE.train(["picture 1", "shade 2"] * 3, vocabulary=270, context_length=16)


def jpeg(shade, *, height=30, width=40):
    ramp = np.linspace(shade, 255, width).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.tile(ramp[None, :, None], (height, 1, 3))).save(file, "JPEG", quality=95)
    return file.getvalue()


def pack(path, members):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first, count, **record):
    for key in range(first, first + count):
        captions = [f"picture {key}", f"shade {key}"]
        yield f"{key:09d}.jpg", jpeg(key)
        yield f"{key:09d}.txt", captions[0].encode()
        yield f"{key:09d}.json", json.dumps({"captions": captions, **record}).encode()


def opened(patterns):
    return Tars(str(patterns))


@pytest.fixture
def shards(tmp_path):
    pack(tmp_path / "00000.tar", pairs(0, 5))
    pack(tmp_path / "00001.tar", pairs(5, 3))
    return tmp_path / "*.tar"


def read(source, index, *, augment=None, seed=(0, 0, 0)):
    return source.read(index, seed=seed, resolution=16, augment=augment)


def view(source, seed, *, index=3, flip=True):
    image = read(source, index, augment=Augment(flip=flip), seed=seed).image
    assert image is not None
    return image


def test_samples_are_what_was_packed(shards):
    source = opened(shards)
    assert source.size == 8
    assert source.fields == {"image", "text"}
    for index in range(8):
        sample = read(source, index)
        assert sample.key == f"0000{index // 5}.tar/{index:09d}"
        assert sample.captions == source.captions(index) == (f"picture {index}", f"shade {index}")
        assert sample.fault is None
        expected = fixed_view(30, 40).pixels(decode(jpeg(index)), resolution=16)
        assert sample.image is not None
        assert torch.equal(sample.image, expected)


def test_views_are_drawn_by_the_key_alone(shards):
    source = opened(shards)

    assert torch.equal(view(source, (1, 2, 3)), view(source, (1, 2, 3)))
    assert not torch.equal(view(source, (1, 2, 3)), view(source, (1, 3, 3)))
    mirrored = {bool(view(source, (seed,))[0, 0].float().diff().mean() < 0) for seed in range(20)}
    assert mirrored == {False, True}  # the picture grows brighter from left to right
    unmirrored = [view(source, (seed,), flip=False) for seed in range(20)]
    assert all(image[0, 0].float().diff().mean() > 0 for image in unmirrored)


def test_threads_read_the_same(shards):
    source = opened(shards)
    with ThreadPoolExecutor(8) as threads:
        images = list(threads.map(lambda i: view(source, (i % 8,), index=i % 8), range(400)))
    assert len({image.numpy().tobytes() for image in images[:8]}) == 8
    assert all(torch.equal(image, images[i % 8]) for i, image in enumerate(images))


def test_pooled_sets_are_one_source_with_keys_apart(tmp_path):
    for maker in ("noto", "open"):
        pack(tmp_path / maker / "val" / "00000.tar", pairs(0, 2))
    source = opened(f"{tmp_path}/noto/val/*.tar,{tmp_path}/open/val/*.tar")
    assert [read(source, i).key for i in range(4)] == [
        f"{maker}/val/00000.tar/{key:09d}" for maker in ("noto", "open") for key in range(2)
    ]


def test_boxes_follow_the_view(tmp_path):
    boxes = [
        {"phrase": "left half", "box_xyxy": [0.0, 0.0, 0.5, 1.0], "caption_index": 1},
        {"phrase": "left rim", "box_xyxy": [0.0, 0.0, 0.125, 1.0]},
    ]
    source = opened(pack(tmp_path / "x.tar", pairs(0, 2, boxes=boxes)))
    assert source.fields == {"image", "text", "boxes"}
    (phrase,) = read(source, 0).phrases  # 30 x 40 pixels: 5 columns left of the central square hold the rim
    assert (phrase.text, phrase.caption) == ("left half", 1)
    assert phrase.box == pytest.approx((0, 0, 0.5, 1))


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path, shards):
    pack(tmp_path / "again" / "00000.tar", pairs(0, 5))
    pack(tmp_path / "other" / "00000.tar", pairs(1, 5))
    first, again, other = (opened(tmp_path / d / "00000.tar").fingerprint for d in ("", "again", "other"))
    assert first == again
    assert len({first, other, opened(shards).fingerprint}) == 3


BAD = {
    "cut.jpg": (jpeg(1)[:200], "truncated JPEG"),
    "text.jpg": (b"<html>not found</html>", "not a JPEG, PNG or WebP image"),
    "empty.jpg": (b"", "empty image"),
    "gif.png": (b"GIF89a" + bytes(50), "not a JPEG"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_masked_and_named(tmp_path, name):
    data, reason = BAD[name]
    members = [*pairs(0, 1), (name, data), (name[:-3] + "txt", b"a caption"), *pairs(1, 1)]
    source = opened(pack(tmp_path / "x.tar", members))
    sample = read(source, 1)
    assert sample.key == f"x.tar/{name[:-4]}"
    assert reason in str(sample.fault)
    assert (sample.image, sample.captions, sample.phrases) == (None, (), ())
    assert not read(source, 0).fault
    assert not read(source, 2).fault


def test_bad_captions_and_lone_members_keep_their_slots(tmp_path):
    members = [
        *pairs(0, 1),
        ("a.jpg", jpeg(1)), ("a.txt", b"caf\xe9"),
        ("b.jpg", jpeg(1)), ("b.txt", b" \n"),
        ("c.jpg", jpeg(1)),
        ("d.txt", b"alone"),
        ("e.jpg", jpeg(1)), ("e.jpg", jpeg(2)), ("e.txt", b"twice"),
    ]  # fmt: skip
    source = opened(pack(tmp_path / "x.tar", members))
    assert [str(read(source, i).fault) for i in range(6)] == [
        "None",
        "its .txt is not UTF-8 (byte 3)",
        "caption 0 is empty",
        "no .txt, .json or .cls beside its image",
        "no image",
        "e.jpg and e.jpg are both its image",
    ]
    assert [len(source.captions(i)) for i in range(6)] == [2, 0, 0, 0, 1, 0]


WATCHED = """
import json, sys
from datasets.shards.tars import Tars
from datasets.views import Augment

def whole(path):
    source = Tars(path)
    samples = [source.read(i, seed=(0, 0, i), resolution=8, augment=Augment()) for i in range(source.size)]
    source.close()
    return samples

whole(sys.argv[1])  # imports what is imported late
from PIL import Image; Image.init()
reached = ("pickle.", "subprocess.", "os.", "shutil.", "socket.", "exec", "ctypes.", "compile", "import")
def told(arg):
    return arg if isinstance(arg, str) else repr(arg)
events = []
def watch(event, args):
    if event == "open" or event.startswith(reached):
        events.append([event, *map(told, args)])
sys.addaudithook(watch)
samples = whole(sys.argv[2])
first = list(events)
events.clear()
whole(sys.argv[2])
again = list(events)
for sample in samples: print(sample.key, "|", sample.fault)
print(json.dumps([first, again]))
"""


def test_nothing_in_a_hostile_shard_runs_or_reaches_the_disk(tmp_path):
    """Every event of the interpreter is watched while the shard is indexed and read whole, twice."""
    work = tmp_path / "a" / "b"
    good, hostile = pack(work / "good.tar", pairs(0, 2)), work / "hostile.tar"
    link, device = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("device.jpg")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    broken = tarfile.TarInfo("caf\udce9\x1b[2J.jpg")
    run = f"cposix\nsystem\n(S'touch {work}/owned'\ntR.".encode()
    with tarfile.open(hostile, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in [
            ("ok.jpg", jpeg(1)), ("ok.txt", b"a caption"), ("ok.pyd", run), ("ok.pickle", run),
            ("ok.pth", run), ("pickled.jpg", run), ("pickled.json", run),
            ("../../evil.jpg", jpeg(2)), ("../../evil.txt", b"up"),
            (f"{work}/absolute.jpg", jpeg(3)), (f"{work}/absolute.txt", b"root"),
            (link, b""), ("link.txt", b"linked"), (device, b""), ("device.txt", b"device"),
            (broken, jpeg(4)), ("pipe:touch owned.txt", b"x"),
            ("eps.png", b"%!PS-Adobe\n(owned) (w) file"), ("eps.txt", b"postscript"),
            ("deep.jpg", jpeg(5)), ("deep.json", b"[" * 10**6),
        ]:  # fmt: skip
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before, cache = sorted(path.name for path in work.parent.rglob("*")), tmp_path / "cache"
    out = subprocess.run(
        [sys.executable, "-c", WATCHED, str(good), str(hostile)],
        cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert sorted(path.name for path in work.parent.rglob("*")) == before
    first, again = json.loads(out[-1])
    # What is written are the sidecar and its lock, whose names are a hash of the shard's own.
    written = re.compile(rf"{cache}/medley/index(/[0-9a-f]{{32}}\.idx(\.lock|\.tmp)?)?")
    assert {event for event, *_ in first} <= {"open", "os.mkdir", "os.remove", "os.rename"}
    paths = {argument for _, *arguments in first for argument in arguments if "/" in argument}
    beside = {str(hostile), f"{hostile}.idx", str(cache), f"{cache}/medley"}
    assert all(path in beside or written.fullmatch(path) for path in paths)
    changed = {path for event, path, mode, *_ in first if event != "open" or "w" in mode}
    assert not changed & {str(hostile), f"{hostile}.idx"}
    assert {event for event, *_ in again} == {"open"}
    assert {path for _, path, *_ in again} <= paths
    faults = dict(line.removeprefix("hostile.tar/").split(" | ") for line in out[:-1])
    readable = {key for key, fault in faults.items() if fault == "None"}
    assert readable == {"ok", "../../evil", f"{work}/absolute"}
    assert faults["link"] == "link.jpg is a link, not a file"
    assert faults["device"].startswith("device.jpg is a device or the like")
    assert "not a JPEG" in faults["eps"]
    assert "not JSON" in faults["deep"]
    assert "caf\\udce9\\x1b[2J" in faults


def test_closing_and_failing_leave_no_file_open(tmp_path, shards):
    def held():
        return sum(each.is_file() for each in Path("/proc/self/fd").iterdir())  # other tests left sockets

    opened(shards).close()  # imports what is imported late
    before = held()
    source = opened(shards)
    assert [read(source, index).fault for index in range(8)] == [None] * 8
    assert held() > before
    source.close()
    source.close()
    assert held() == before
    (tmp_path / "00002.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"00002\.tar at byte 0 \(not a tar"):
        opened(shards)
    assert held() == before


def test_more_shards_than_files_may_be_open(tmp_path, shards):
    opened(shards).close()  # imports what is imported late
    for number in range(2, 72):
        pack(tmp_path / f"{number:05d}.tar", pairs(0, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, hard))
        with pytest.raises(UserError, match="Too many open files"):
            opened(shards)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 40, hard))
        source = opened(shards)
        assert [read(source, index).fault for index in range(78)] == [None] * 78
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    source.close()


def test_loader_trains_and_evaluates_on_shards(shards):
    source = open_source(str(shards), seed=0, split="train")
    feeds = [Feed(name="data", source=source)]
    portions = list(Loader(feeds, TOKENIZER, seed=3, batch=4, resolution=16, threads=2).steps(0, 2))
    batches = [batch for portion in portions for batch in portion.batches]
    assert {key for batch in batches for key in batch.keys} == {read(source, i).key for i in range(8)}
    assert all(batch.pair_valid.all() and len(batch.tokens) == 4 for batch in batches)
    (val,) = evaluation_batches(source, TOKENIZER, batch=8, resolution=16)
    assert [sample.key for sample in val.samples] == list(val.batch.keys)
    assert val.batch.image_index.tolist() == [i // 2 for i in range(16)]


def test_pixels_belong_to_seed_epoch_and_sample(shards):
    """Whichever rank and thread read them, in which run of the program: hashes of the tensors are equal."""

    def seen(first=0, *, seed=5, rank=0, **options):
        source = opened(shards)
        loader = Loader(
            [Feed(name="data", source=source)],
            TOKENIZER,
            seed=seed,
            batch=4,
            resolution=16,
            rank=rank,
            **options,
        )
        found = {}
        for portion in loader.steps(first, 6, accounts={"data": Account(4 * first)}):
            for batch in portion.batches:
                for key, image in zip(batch.keys, batch.images, strict=True):
                    found[portion.step // 2, key] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        source.close()
        return found

    alone = seen()
    assert len(alone) == len(set(alone.values())) == 24  # 8 samples in 3 epochs, each time another view
    assert seen(threads=4, micro_batches=2) == alone
    for ranks in (2, 3):
        parts = [seen(rank=rank, ranks=ranks, threads=rank + 1) for rank in range(ranks)]
        assert {at: each for part in parts for at, each in part.items()} == alone
    resumed = seen(3)
    assert resumed.items() <= alone.items()
    assert len(resumed) == 12
    assert not seen(seed=6).items() & alone.items()


def test_scenes_are_a_source_by_name():
    source = open_source("scenes", seed=5, split="train")
    sample = source.read(0, seed=(5, 0, 0), resolution=16, augment=Augment())
    assert (source.size, source.name) == (None, "scenes")
    assert sample.image is not None
    assert source.captions(0) == sample.captions


def test_a_shard_whose_name_is_not_utf8_has_keys_that_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.tar")
    pack(path, pairs(0, 2))
    source = opened(path)
    sample = read(source, 1)
    assert sample.key.encode() == rf"caf\udce9.tar/{sample.key.rpartition('/')[2]}".encode()
    assert source.samples_of(sample.shard) == 2
    source.close()


def test_what_a_source_holds_is_looked_for_all_over_it(tmp_path):
    """Its first shards may lack what later ones have."""
    for number in range(3):
        boxed = {"boxes": [{"phrase": "picture", "box_xyxy": [0, 0, 1, 1]}]} if number == 2 else {}
        pack(tmp_path / f"{number}.tar", pairs(100 * number, 80, **boxed))
    source = opened(tmp_path / "*.tar")
    assert source.fields == {"image", "text", "boxes"}
    source.close()
