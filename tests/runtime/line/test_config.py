"""line.toml: what is right is read, and everything that is wrong is said at once, with near names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saae_runtime.errors import ConfigError
from saae_runtime.line.config import LineConfig, load_config
from saae_runtime.line.sinks import KINDS

SMALL = """
[[station]]
name = "one"
camera = "frames"
recipes = ["a"]
[[recipe]]
name = "a"
bundle = "b"
"""


def load(folder: Path, text: str, sections: dict[str, type] | None = None) -> LineConfig:
    file = folder / "line.toml"
    file.write_text(text)
    return load_config(file, KINDS, sections)


def problems(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL)
    assert config.line.name == "line"
    assert config.stations[0].queue == "block"
    assert config.archive is None
    assert config.sinks == ()
    assert config.place("x/y") == tmp_path / "x/y"
    assert config.place("/z") == Path("/z")


def test_everything(tmp_path: Path) -> None:
    text = (
        SMALL
        + """
false_alarms = 0.01
roi = [[[0, 0], [10, 0], [10, 10]], [[20, 20.5], [30, 20], [30, 30]]]
ignore = "mask.png"
part_ids = ["A-*"]
[[sink]]
kind = "mqtt"
host = "broker"
[[sink]]
kind = "webhook"
name = "mes"
url = "https://mes.example/parts"
headers = { "X-Line" = "1" }
[archive]
folder = "p"
ok_share = 1
[line]
name = "l1"
"""
    )
    config = load(tmp_path, text)
    assert [(sink.kind, sink.name) for sink in config.sinks] == [("mqtt", "mqtt"), ("webhook", "mes")]
    assert config.sinks[1].options.headers == {"X-Line": "1"}
    recipe = config.recipe("a")
    assert recipe.roi[1][0] == (20.0, 20.5)
    assert recipe.takes("A-1")
    assert not recipe.takes("B-1")
    assert config.archive is not None
    assert config.archive.ok_share == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("camera =", "camra ="), ["unknown key `camra`; did you mean `camera`?", "`camera` is missing"]),
        (('name = "one"', 'name = "one"\nqueue = "drop"'), ["'drop' is not one of block, drop-oldest"]),
        (('name = "one"', 'name = "one"\nqueue_size = "8"'), ["queue_size: expected a whole number, found '8'"]),
        (('name = "one"', 'name = "one"\nqueue_size = true'), ["expected a whole number"]),
        (('name = "one"', 'name = "one"\nverdict_timeout = -1'), ["`verdict_timeout` is -1.0; it must be above 0"]),
        (('name = "one"', 'name = "one"\nverdict_timeout = nan'), ["finite"]),
        (('name = "one"', "name = 'a/b'"), ["letters, digits"]),
        (('recipes = ["a"]', "recipes = []"), ["`recipes` is empty"]),
        (('recipes = ["a"]', 'recipes = ["aa"]'), ["no recipe is named `aa`; did you mean `a`?"]),
        (("[[recipe]]", "[[recipie]]"), ["unknown table `recipie`; did you mean `recipe`?"]),
        (("[[station]]", "[station]"), ["write `[[station]]`"]),
        (('bundle = "b"', 'bundle = "b"\nthreshold = 1\nfalse_alarms = 0.1'), ["exclude each other"]),
        (('bundle = "b"', 'bundle = "b"\nfalse_alarms = 2'), ["`false_alarms` is 2.0"]),
        (('bundle = "b"', 'bundle = "b"\nroi = [[[0, 0], [1, 1]]]'), ["2 corners"]),
        (
            ('bundle = "b"', 'bundle = "b"\nignore = [[[0, 0], [1e10, 0], [1e10, 9]]]'),
            ["farther than 1,000,000 pixels"],
        ),
        (('bundle = "b"', 'bundle = "b"\nroi = [[[0, 0, 1], [1, 1], [2, 2]]]'), ["has the wrong type"]),
        (('bundle = "b"', 'bundle = "b"\n[[sink]]\nkind = "mqqt"'), ["`kind` is 'mqqt'; did you mean `mqtt`?"]),
        (('bundle = "b"', 'bundle = "b"\n[[sink]]\npath = "x"'), ["`kind` is missing"]),
        (('bundle = "b"', 'bundle = "b"\n[[sink]]\nkind = "jsonl"'), ["[[sink]] 1 (jsonl): `path` is missing"]),
        (('bundle = "b"', 'bundle = "b"\n[[sink]]\nkind = "jsonl"\npath = "x"\nrotate = "x"'), ["neither a size nor"]),
        (('bundle = "b"', 'bundle = "b"\n[[sink]]\nkind = "webhook"\nurl = "ftp://x"'), ["http:// or https://"]),
        (
            ('bundle = "b"', 'bundle = "b"\n[[sink]]\nkind = "mqtt"\nhost = "h"\ntopic = "a/#"'),
            ["not allowed"],
        ),
        (('bundle = "b"', 'bundle = "b"\n[archive]\nfolder = "p"\nng_days = 1'), ["`ng_days` is below `ok_days`"]),
        (('bundle = "b"', 'bundle = "b"\n[health]\ndrift_window = 1'), ["`drift_window` is 1"]),
        (('bundle = "b"', 'bundle = "b"\n[[recipe]]\nname = "a"\nbundle = "c"'), ["two are named `a`"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    assert change[0] in SMALL
    said = problems(tmp_path, SMALL.replace(*change, 1))
    for word in words:
        assert word in said


def test_all_problems_at_once(tmp_path: Path) -> None:
    said = problems(tmp_path, SMALL.replace("camera =", "camra =").replace('bundle = "b"', "bundle = 3") + "[lin]\n")
    assert "4 problems" in said
    assert "bundle: expected a string, found 3" in said
    assert "did you mean `line`?" in said


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "no [[station]]" in problems(tmp_path, "")
    assert "not valid TOML" in problems(tmp_path, "[[")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "gone.toml", KINDS)
    (tmp_path / "line.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "line.toml", KINDS)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path, KINDS)


@dataclass(frozen=True)
class _Plc:
    port: int = 502


def test_tables_of_other_parts(tmp_path: Path) -> None:
    config = load(tmp_path, SMALL + "[plc]\nport = 1502\n", {"plc": _Plc, "http": _Plc})
    assert config.extra == {"plc": _Plc(1502)}
    with pytest.raises(ConfigError, match="did you mean `port`"):
        load(tmp_path, SMALL + "[plc]\nprt = 1502\n", {"plc": _Plc})
    assert "unknown table `plc`" in problems(tmp_path, SMALL + "[plc]\n")


_values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["name", "camera", "recipes", "bundle", "roi", "kind", "path", "host", "url", "x"]), inner
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(data=st.dictionaries(st.sampled_from(["line", "station", "recipe", "sink", "archive", "health", "x"]), _values))
def test_any_content_is_read_or_refused_in_words(
    data: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    import saae_runtime.line.config as module

    before, module.read_toml = module.read_toml, lambda path: data  # any value, also those that TOML cannot write
    try:
        with pytest.raises(ConfigError, match="problem"):
            load_config(Path("line.toml"), KINDS)
    finally:
        module.read_toml = before


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_refused_in_words(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ConfigError):
        load_config(file, KINDS)
