"""What a test has supervised: at each start in RUN_DIR it does the next of the things it is told."""

import os
import pathlib
import signal
import sys
import time

out = pathlib.Path(sys.argv[1])
starts = out / "count"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
what = sys.argv[2].split(",")
what = what[min(number, len(what) - 1)]


def ready():
    (out / "ready.tmp").write_text(str(os.getpid()))
    (out / "ready.tmp").rename(out / "ready")


if what.startswith("save"):
    (out / "checkpoints" / f"step-{number + 1:08d}").mkdir(parents=True)
    what = what[4:]
if what == "wait":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
    ready()
    time.sleep(60)
elif what.startswith("late"):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    ready()
    while not stop and '"leave"' not in (out / "attempts.jsonl").read_text():
        time.sleep(0.01)
    time.sleep(1)
    what = what[4:]
elif what.startswith("slow"):
    time.sleep(5)
    what = what[4:]
elif what == "seal":
    (out / "attempts.jsonl").unlink()
    (out / "attempts.jsonl").mkdir()
    what = "5" if number == 0 else "7"
elif what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "term":
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(int(what))
