from pretrain.sinks import Fanout


class Heard:
    def __init__(self):
        self.calls = []

    def step(self, step, values):
        self.calls.append((step, values))

    def note(self, text):
        self.calls.append(text)

    def close(self):
        self.calls.append("closed")


def test_fanout_tells_each_and_none_is_fine():
    for sinks in ((), (Heard(),), (Heard(), Heard())):
        fan = Fanout(sinks)
        fan.step(1, {"loss": 2.0})
        fan.note("hello")
        fan.close()
        assert all(sink.calls == [(1, {"loss": 2.0}), "hello", "closed"] for sink in sinks)
