"""Run directories made by hand, and a browser that is told what to do through a pipe."""

import base64
import fcntl
import json
import math
import os
import random
import shutil
import subprocess
from itertools import count

import pytest
import yaml
from PIL import Image

CONFIG = {
    "data": "scenes",
    "val": "",
    "model": {"kind": "dual", "captioner": None, "embed": 128},
    "objectives": {"itc": {"kind": "itc", "weight": 1.0}, "lm": {"kind": "lm", "weight": 1.0}},
    "stages": {"one": {"steps": 1000, "batch": 64, "optim": {"lr": 0.004, "betas": [0.9, 0.95]}}},
    "seed": 0,
}
START = 1_800_000_000.0


def record(step, seed):
    """What a run reports: a second a step, 64 samples a step."""
    noise = random.Random(seed * 1_000_003 + step)
    itc, lm = (6 * math.exp(-step / 300) + noise.uniform(-0.3, 0.3) + 0.5 for _ in range(2))
    return {
        "step": step,
        "time": START + step,
        "samples": 64 * step,
        "train/loss": itc + lm,
        "train/loss/itc": itc,
        "train/loss/lm": lm,
        "train/itc/accuracy": 1 - math.exp(-step / 300),
        "train/lr": 0.004 * min(1, step / 100),
        "model/gradient_norm": noise.uniform(0.5, 2),
        "model/gradient_norm/image": noise.uniform(0.5, 2),
        "model/logit_scale": 14 + step / 100,
        "perf/samples_per_second": 64 * noise.uniform(0.95, 1.05),
        "perf/data_wait": noise.uniform(0, 0.05),
        "perf/seconds_left": 1000.0 - step,
        "perf/step_seconds_p50": 1.0,
        "perf/step_seconds_p99": 1.5,
        "perf/memory_gib": 1.25,
        "perf/restarts": 0,
        "perf/lost_steps": 0,
        "data/masked": 3,
    }


def evaluation(step):
    share = 1 - math.exp(-step / 500)
    return {
        "step": step,
        "time": START + step + 0.5,
        "samples": 64 * step,
        "eval/zero_shot_top1": 0.9 - abs(step - 600) / 1000,
        "eval/image_to_text_recall@1": share,
        "eval/perplexity": 20 / (1 + step / 100),
    }


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_sheet(root, step, said, references=("a big red square",), key="00000.tar/000000001"):
    write_json(
        root / "samples" / f"step-{step:08d}.json",
        {
            "step": step,
            "samples": 64 * step,
            "said_by": "captioner",
            "sheet": f"step-{step:08d}.png",
            "rows": [{"key": key, "image": "images/00.png", "said": said, "references": list(references)}],
        },
    )
    Image.new("RGB", (40, 20), "red").save(root / "samples" / f"step-{step:08d}.png")
    (root / "samples" / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "blue").save(root / "samples" / "images" / "00.png")


@pytest.fixture
def make_run(tmp_path):
    """A finished run of 1000 steps with everything that a run leaves for the report."""

    def make(name="alpha", *, seed=0, every=10, lr=0.004, steps=1000):
        root = tmp_path / name
        root.mkdir()
        stage = {**CONFIG["stages"]["one"], "optim": {"lr": lr, "betas": [0.9, 0.95]}}
        config = {**CONFIG, "stages": {"one": stage}}
        (root / "run.yaml").write_text("# identity: 0\n" + yaml.safe_dump(config, sort_keys=False))
        records = [record(step, seed) for step in range(every, steps + 1, every)]
        for step in range(250, steps + 1, 250):
            place = next((i for i, each in enumerate(records) if each["step"] > step), len(records))
            records.insert(place, evaluation(step))
        records[-1]["finished"] = 1.0
        (root / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        first = {"time": START, "step": 0, "stage": "one", "lost": 0, "ranks": 1, "device": "cpu"}
        (root / "starts.jsonl").write_text(json.dumps(first) + "\n")
        for step, said in ((500, "a square"), (1000, "a red square")):
            write_sheet(root, step, said)
        scores = {"zero_shot_top1": {"value": 0.5, "chance": 0.1}, "perplexity": {"value": 7, "chance": None}}
        found = {"step": steps, "data": "val/*.tar", "values": scores}
        write_json(root / "evaluations" / "emoji.json", found)
        return root

    return make


def high_pipe():
    """Both ends of a pipe, out of the way of descriptors 3 and 4, which the protocol claims."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high


class Browser:
    """Headless Chromium, spoken to in its DevTools protocol: JSON, each message closed by a zero byte."""

    def __init__(self, binary, folder):
        (commands, self._out), (self._in, events) = high_pipe(), high_pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{events}', "browser", binary, *flags.split(),
             "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            pass_fds=(commands, events), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(events)
        self._numbers, self._rest, self.events = count(1), b"", []
        self._session = None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    def tell(self, method, **parameters):
        """Send a command; events that come before its answer are kept."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": parameters, **session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self.events.append(answer)
        assert "result" in answer, answer
        return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            received = os.read(self._in, 1 << 16)
            assert received, "the browser has gone"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, *, width=1200, dark=False):
        """Load a file; what it complained of and asked for are in `events` from then on."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.tell("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        # Two frames: the charts are drawn when their size is known.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression):
        """The value of a JavaScript expression, awaited."""
        answer = self.tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self):
        """What is seen without scrolling, as PNG."""
        return base64.b64decode(self.tell("Page.captureScreenshot")["data"])

    def complaints(self):
        """Everything that was written to the console."""
        said = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
        return [event for event in self.events if event.get("method") in said]

    def requests(self):
        """Addresses that were asked for, or would have been."""
        asked = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked]

    def close(self):
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    browser = Browser(binary, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()
