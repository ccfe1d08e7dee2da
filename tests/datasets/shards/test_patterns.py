import pytest

from datasets.errors import UserError
from datasets.shards.patterns import named


@pytest.fixture
def tree(tmp_path):
    for name in ("a/00000.tar", "a/00001.tar", "a/00002.tar", "b/00000.tar", "b/odd[1].tar", "a/m.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("{t}/a/*.tar", ["a/00000.tar", "a/00001.tar", "a/00002.tar"]),
        ("{t}/a/{{00001..00002}}.tar", ["a/00001.tar", "a/00002.tar"]),
        ("{t}/b/00000.tar, {t}/a/{{00000,00002}}.tar", ["b/00000.tar", "a/00000.tar", "a/00002.tar"]),
        ("{t}/{{b,a}}/00000.tar", ["b/00000.tar", "a/00000.tar"]),
        ("{t}/**/00000.tar", ["a/00000.tar", "b/00000.tar"]),
        ("{t}/b/odd[1].tar", ["b/odd[1].tar"]),
        ("{t}/a/../b/00000.tar,{t}/a/m.json", ["b/00000.tar", "a/m.json"]),
    ],
)
def test_local_names(tree, spec, names):
    assert named(spec.format(t=tree)) == [str(tree / name) for name in names]


def test_relative_names_and_homes_become_absolute(tree, monkeypatch):
    monkeypatch.chdir(tree / "a")
    monkeypatch.setenv("HOME", str(tree / "b"))
    assert named("00001.tar,~/00000.tar") == [str(tree / "a/00001.tar"), str(tree / "b/00000.tar")]


def test_urls_are_expanded_but_not_looked_up():
    assert named("https://h.example/x/{00..02}.tar,s3://bucket/a.tar,https://h.example/m.json") == [
        "https://h.example/x/00.tar",
        "https://h.example/x/01.tar",
        "https://h.example/x/02.tar",
        "s3://bucket/a.tar",
        "https://h.example/m.json",
    ]


@pytest.mark.parametrize("spec", ["x{0..999999999999}.tar", "{0..9999}/{9999..0}.tar", "{a,b}" * 60])
def test_a_range_without_end_is_refused(spec, monkeypatch):
    monkeypatch.setattr("datasets.shards.patterns._MOST", 10_000)
    with pytest.raises(UserError, match="names a million shards or more"):
        named(spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "{t}/a/*.tgz",
            r"no file matches .*\.tgz; the nearest directory that exists is {t}/a, .*holds 00000\.tar",
        ),
        ("{t}/c/d/*.tar", "the nearest directory that exists is {t}, which holds a, b"),
        ("{t}/a/{{00002..00003}}.tar", r"no file matches {t}/a/00003\.tar"),
        ("{t}/a", r"{t}/a is a directory: name the shards in it, as in '{t}/a/\*\.tar'"),
        ("pipe:cat x; touch y", "is a command, and none is ever run"),
        ("https://h.example/*.tar", "a server tells no names: give a brace range"),
        ("~nobody-here/x.tar", "begins with a home folder that is not known: write it out"),
        (" , ", "names no tar file"),
        ("{t}/a/{{0..2.tar", "braces that do not match"),
    ],
)
def test_what_cannot_be_followed(tree, spec, says):
    with pytest.raises(UserError, match=says.format(t=tree)):
        named(spec.format(t=tree))
