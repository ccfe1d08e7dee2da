from benchmarks import indexing


def test_it_prints_what_each_reader_costs_and_says_whether_the_bar_is_met(capsys, monkeypatch):
    monkeypatch.setattr(indexing, "BAR", 1e9)
    assert indexing.main(["--gigabytes", "0.002"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 2)[:2] == ["CPU", "s/GB"]
    assert [line.split()[0] for line in lines[1:4]] == ["30", "50", "100"]
    assert lines[-1].endswith("met")
    monkeypatch.setattr(indexing, "BAR", 0)
    assert indexing.main(["--gigabytes", "0.001"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("missed")
