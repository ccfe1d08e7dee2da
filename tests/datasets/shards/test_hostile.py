"""What is in a shard is bytes: nothing is run, unpickled, followed or used as a path."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

WATCH = """
import sys
from pathlib import Path

folder, repository, mode = sys.argv[1], sys.argv[2], sys.argv[3]
sys.argv = sys.argv[:1]
ran, opened, wrote = [], set(), set()
watching = False
RUNS = ("pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "ctypes.dlopen",
        "compile", "exec", "import", "marshal.", "os.symlink", "os.link", "socket.")

def watch(event, arguments):
    if not watching:
        return
    if event.startswith(RUNS):
        ran.append((event, str(arguments)[:200]))
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, int):
            return
        (wrote if flags & 0o3 else opened).add(str(path))
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate"):
        wrote.add(str(arguments[0]))

from concurrent.futures import ThreadPoolExecutor
import encodings.idna, encodings.ascii
import datasets.check, datasets.index
import datasets.shards.checking, datasets.shards.opening, datasets.shards.spread
from datasets.shards.manifest import Manifest, open_manifest
from datasets.shards.sidecar import Table

def threads(*jobs, **more):
    return spread(*jobs, **{**more, "processes": False})

spread = datasets.shards.spread.spread
datasets.index.spread = datasets.check.spread = threads
list(ThreadPoolExecutor(1).map(str, [1]))
warm = Path(folder) / "warm"
datasets.index.main([str(warm / "*.tar")]), datasets.check.main([str(warm / "*.tar")])
source = None
if mode == "read":
    from datasets.shards.tars import Tars
    from datasets.views import Augment
    source = Tars(str(warm / "*.tar"))
    for index in range(source.size):
        source.read(index, seed=(1,), resolution=16, augment=Augment())

sys.addaudithook(watch)
watching = True
pattern = str(Path(folder) / "hostile" / "*.tar")
code = datasets.index.main([pattern, "--without-damaged"])
datasets.check.main([pattern])
manifest = open_manifest(str(Path(folder) / "hostile" / "manifest.json"))
rows = [row for shard in manifest for row in Table.open(Path(shard.sidecar))]
if mode == "read":
    source = Tars(str(Path(folder) / "hostile" / "manifest.json"))
    for index in range(source.size):
        source.read(index, seed=(1,), resolution=16, augment=Augment())
    source.close()
if mode == "caught":
    import pickle, tarfile
    pickle.loads(tarfile.open(folder + "/hostile/0.tar").extractfile("bomb.pkl").read())
watching = False
own = tuple(folder + each for each in ("/hostile", "/tmp", "/medley-check-"))
allowed = (folder, sys.prefix, sys.base_prefix, repository, "/proc/", "/sys/", "/etc/localtime")
print("CODE", code, len(rows))
print("RAN", ran)
print("READ", sorted(path for path in opened if not path.startswith(allowed)))
print("WROTE", sorted(path for path in wrote if not path.startswith(own)))
"""


class Bomb:
    def __reduce__(self):
        return (exec, ("open('/dev/null', 'w')",))


def special(name, kind, target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@pytest.fixture
def corpus(tmp_path, pack):
    import pickle  # noqa: TID251

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    image, bomb = buffer.getvalue(), pickle.dumps(Bomb())
    pack(
        tmp_path / "warm/0.tar",
        [("a.jpg", image), ("a.txt", b"text"), ("b.jpg", image[:-20]), ("b.txt", b"x")],
    )
    hostile = tmp_path / "hostile"
    members = [("ok.jpg", image), ("ok.txt", b"text")]
    keys = [
        "../../etc/evil",
        "/abs/evil",
        "caf\udce9",
        "a\nb\x1b[31m",
        "pipe:touch x; cat",
        "$(touch x)",
        "%s{0}",
    ]
    for key in keys:
        members += [(f"{key}.jpg", image), (f"{key}.txt", b"text")]
    suffixes = ("pyd", "pkl", "pickle", "pth", "npy", "jpg", "json", "txt", "cls")
    members += [(f"bomb.{suffix}", bomb) for suffix in suffixes]
    members += [
        special("link.jpg", tarfile.SYMTYPE),
        ("link.txt", b"text"),
        special("hard.jpg", tarfile.LNKTYPE, "../../../etc/passwd"),
        special("device.jpg", tarfile.CHRTYPE),
        special("fifo.jpg", tarfile.FIFOTYPE),
        special("escape", tarfile.SYMTYPE, "/"),
        ("escape/tmp/here.jpg", image),
        ("nested.json", b'{"caption": "x", "py/object": "os.system", "__reduce__": ["os.system", "x"]}'),
        ("nested.jpg", image),
    ]
    for number, layout in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        pack(hostile / f"{number}.tar", members, layout=layout)
    claims = tarfile.TarInfo("././@PaxHeader")
    claims.type, claims.size = b"x", 8 << 30
    (hostile / "pax-bomb.tar").write_bytes(claims.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    (hostile / "empty.tar").write_bytes(b"")
    (hostile / "page.tar").write_bytes(b"<html>404</html>" * 99)
    (hostile / "cut.tar").write_bytes((hostile / "0.tar").read_bytes()[:5000])
    return tmp_path


@pytest.mark.parametrize("mode", ["index", "read"])
def test_nothing_of_a_hostile_corpus_is_run_or_followed(corpus, mode, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus / "tmp"))
    monkeypatch.setenv("TMPDIR", str(corpus))
    command = [sys.executable, "-c", WATCH, str(corpus), str(ROOT), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0].isupper())
    assert lines["CODE"] == "0 30"
    assert lines["RAN"] == "[]"
    assert lines["READ"] == "[]"
    assert lines["WROTE"] == "[]"
    said = done.stdout + done.stderr
    for kind in ("code", "name", "no file", "left out", "not a tar", "header", "empty", "truncated"):
        assert kind in said
    assert "\x1b" not in said


def test_the_watch_sees_an_unpickled_member(corpus):
    command = [sys.executable, "-c", WATCH, str(corpus), str(ROOT), "caught"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "pickle.find_class" in done.stdout, done.stderr
    assert "'/dev/null'" in done.stdout
