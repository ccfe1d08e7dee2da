"""A run directory as training leaves it, a W&B server on the loopback, and the command in a fork."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from pretrain.mirror import reach
from pretrain.mirror.__main__ import main
from pretrain.rundir import RunDir
from pretrain.sinks.jsonl import JsonLines

RUN_YAML = """# identity: 0123
data: scenes
objectives:
  itc: {kind: itc, weight: 1.0}
stages:
  one: {steps: 100, batch: 8}
"""


class Recorded:
    """Writes what training writes."""

    def __init__(self, root):
        self.rundir = RunDir(root)
        (root / "samples" / "images").mkdir(parents=True)
        self.rundir.run_yaml.write_text(RUN_YAML)
        self.rundir.starts.write_text('{"step": 0, "ranks": 2, "device": "cpu"}\n')
        for place in range(2):
            Image.new("RGB", (8, 8), (90 * place, 0, 0)).save(root / "samples" / f"images/{place:02d}.png")
        self.lines = JsonLines(self.rundir.metrics)

    def report(self, *steps):
        for step in steps:
            values = {"samples": step * 8, "train/loss": 10 / step, "perf/seconds_left": float("inf")}
            self.lines.step(step, values)

    def evaluation(self, step, **more):
        name = f"step-{step:08d}"
        Image.new("RGB", (16, 16), (step, 0, 0)).save(self.rundir.samples / f"{name}.png")
        rows = [
            {"key": str(k), "image": f"images/{k:02d}.png", "said": f"said {k}", "references": ["one", "two"]}
            for k in range(2)
        ]
        sheet = {
            "step": step,
            "samples": step * 8,
            "said_by": "captioner",
            "sheet": f"{name}.png",
            "rows": rows,
        }
        (self.rundir.samples / f"{name}.json").write_text(json.dumps(sheet))
        values = {"eval/zero_shot_top1": 1 / step, "eval/perplexity": float(step)}
        self.lines.step(step, {"samples": step * 8, **values, **more})

    def resume(self, after):
        """A start that goes on after a step: what is later is cut off."""
        self.lines.close()
        self.lines = JsonLines(self.rundir.metrics, after=after)

    @property
    def truth(self):
        """Step -> values, as metrics.jsonl has them."""
        rows = {}
        for line in self.rundir.metrics.read_text().splitlines():
            record = json.loads(line)
            rows.setdefault(record["step"], {}).update({k: v for k, v in record.items() if v is not None})
        return rows


@pytest.fixture
def run(tmp_path, logged_out):
    return Recorded(tmp_path / "run")


@pytest.fixture
def server(monkeypatch, logged_out):
    """A server that one is logged in to."""
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    yield server
    server.stop()


class Server(ThreadingHTTPServer):
    """As much of a W&B server as its client needs to keep one run: GraphQL, and a stream of history rows."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.history, self.summary, self.config = [], {}, {}
        self.exit_codes, self.uploaded, self.tables = [], set(), []
        self.run, self.rewinds = None, True
        self.down = False
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that was killed is no matter."""

    def stop(self):
        self.shutdown()
        self.server_close()

    def bucket(self):
        project = {"id": "p", "name": "medley", "entity": {"id": "e", "name": "me"}}
        return {
            "id": "UnVu", "name": self.run, "displayName": "run", "description": "", "sweepName": None,
            "project": project, "config": json.dumps(self.config), "historyLineCount": len(self.history),
        }  # fmt: skip

    def stream(self, body):
        for name, chunk in (body.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                assert chunk["offset"] == len(self.history)
                self.history += rows
            elif name == "wandb-summary.json":
                self.summary = rows[-1]
        if body.get("complete"):
            self.exit_codes.append(body["exitcode"])
        return {}

    def graphql(self, operation, given):
        match operation:
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "Viewer":
                return {
                    "viewer": {
                        "id": "u",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "RunResumeStatus":
                return {
                    "model": {
                        "id": "p",
                        "name": "medley",
                        "entity": {"id": "e", "name": "me"},
                        "bucket": self.resume(),
                    }
                }
            case "UpsertBucket":
                new, self.run = self.run is None, self.run or given["name"]
                self.config = json.loads(given["config"]) if given.get("config") else self.config
                return {"upsertBucket": {"bucket": self.bucket(), "inserted": new}}
            case "RewindRun":
                if not self.rewinds:
                    return None
                assert given["metricName"] == "_step"
                self.history = [row for row in self.history if row["_step"] <= given["metricValue"]]
                return {"rewindRun": {"rewoundRun": self.bucket()}}
            case "CreateRunFiles":
                self.uploaded |= set(given["files"])
                files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in given["files"]]
                return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                self.tables.append((given["input"]["artifactCollectionName"], given["input"]["historyStep"]))
                sequence = {"latestArtifact": None}
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
        return None

    def resume(self):
        tail = json.dumps([json.dumps(row) for row in self.history[-1:]])
        return self.run and {
            **self.bucket(), "summaryMetrics": json.dumps(self.summary), "historyTail": tail,
            "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "tags": [], "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format, *args):  # noqa: A002
        pass

    def parse_request(self):
        return super().parse_request() and not self.server.down  # what it does not parse it hangs up on

    def body(self):
        if self.headers.get("transfer-encoding") != "chunked":
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
        else:
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(content) if self.headers.get("content-encoding") == "gzip" else content

    def answer(self, value, code=200):
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_PUT(self):
        self.body()
        self.answer({})

    def do_POST(self):
        body = self.body()
        with self.server.lock:
            if self.path.endswith("/file_stream"):
                self.answer(self.server.stream(json.loads(body)))
            elif self.path.endswith("/graphql"):
                asked = json.loads(body)
                (operation,) = re.findall(r"^(?:query|mutation) (\w+)", asked["query"].strip())
                data = self.server.graphql(operation, asked.get("variables") or {})
                refused = {"errors": [{"message": f"{operation} is not for you"}]}
                self.answer(refused if data is None else {"data": data})
            else:
                self.answer({}, 404)


@pytest.fixture
def mirror(run, tmp_path, monkeypatch):
    """`python -m pretrain.mirror RUN_DIR ...` in a fork that has imported everything; what it says."""
    import wandb.sdk.launch  # noqa: F401  # the most that `wandb.init` imports late

    # The server is a thread of this process, which a busy machine may let wait for seconds.
    monkeypatch.setitem(reach.answers.__kwdefaults__, "seconds", 120.0)

    def mirror(*arguments, code=0):
        said = tmp_path / "said"
        child = os.fork()
        if child == 0:
            ended = 70
            with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    ended = main([str(run.rundir.root), *arguments])
                except BaseException:
                    traceback.print_exc()
            os._exit(ended)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code, said.read_text()
        return said.read_text()

    return mirror


@pytest.fixture
def offline(run):
    """The one offline run that W&B would find, as its own tool reads it: {record type: [record, ...]}."""

    def offline():
        (folder,) = run.rundir.wandb.glob("offline-run-*")
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--json"]
        lines = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.splitlines()
        found = {}
        for line in lines:
            record = json.loads(line)
            found.setdefault(record["type"], []).append(record[record["type"]])
        return found

    return offline
