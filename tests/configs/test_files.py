"""Config files in YAML and JSON."""

import json
import time
from pathlib import Path

import pytest

from torchshear.configs import load_config, parse_config
from torchshear.errors import ArgumentError

LIST = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"exclude": True, "op_names": ["fc"]}]
YAML = """
- op_types: [Conv2d]
  sparsity: 0.5
- exclude: true
  op_names: [fc]
"""


@pytest.mark.parametrize(("name", "content"), [("a.yaml", YAML), ("a.YML", YAML), ("a.json", json.dumps(LIST))])
def test_yaml_and_json_read_the_same(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert load_config(tmp_path / name) == LIST
    assert parse_config(load_config(str(tmp_path / name))) == parse_config(LIST)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- sparsity: 0.5\n  op_types: [a]\n  sparsity: 0.4\n", "'sparsity' stands twice.* in line 3"),
        ("a.json", '[{"sparsity": 0.5, "sparsity": 0.4}]', "'sparsity' stands twice"),
        ("a.yaml", "a: [1", "not well-formed YAML.* in line"),
        ("a.json", '[{"a": 1,}]', "not whole JSON: .* in line 1"),
        ("a.json", '[{"sparsity": NaN}]', "NaN is no number"),
        ("a.yaml", "", "is empty"),
        ("a.json", "  ", "is empty"),
        ("a.yaml", "- 1: a\n", "a key in line 1 is no text"),
        ("a.yaml", "a: &b {x: 1}\nc: {<<: *b}\n", "a key in line 2 is no text"),
        ("a.yaml", "a: &b [*b]\n", "what starts in line 1 holds itself"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']\n", "not well-formed YAML: could not determine"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "not well-formed YAML"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yaml", "a: 2020-99-99\n", "could not determine the value of a 'timestamp' in line 1"),
        ("a.yaml", f"a: {'9' * 5000}\n", "a number of 5000 digits"),
        ("a.json", f'{{"a": {"9" * 5000}}}', "a number of 5000 digits"),
        ("a.json", '{"a": 1e400}', "the number 1e400, which is too large"),
        ("a.json", '{"a": "\0"}', "not whole JSON"),
        ("a.yaml", "a: !!int ''\n", "'' in line 1 is no int"),
        ("a.yaml", "a: !!float '.'\n", "'.' in line 1 is no float"),
        ("a.yaml", "a: !!bool x\n", "'x' in line 1 is no bool"),
        ("a.yaml", "a: !!timestamp x\n", "could not determine the value of a 'timestamp'"),
        ("a.yaml", "a: !!int [1]\n", "could not determine the value of a 'int'"),
        ("a.yaml", "a: !!set {b}\n", "could not determine the value of a 'set'"),
        ("a.yaml", "a: !!binary aGk=\n", "could not determine the value of a 'binary'"),
        ("a.yaml", "a: 0x_\n", "'0x_' in line 1 is no int"),
        ("a.yaml", 'a: "\\UFFFFFFFF"\n', "not well-formed YAML: OverflowError"),
        ("a.yaml", "a: 12:30\n", "'12:30' in line 1, which YAML takes for a number in base 60; put it in quotes"),
        ("a.yaml", "- a: 1\n- a: .inf\n", "'.inf' in line 2, which is no finite number"),
        ("a.yaml", "[" * 100 + "]" * 100, "nested too deeply"),
        ("a.yaml", "a: \0\n", "not well-formed YAML"),
        ("a.toml", "a = 1", "ends in '.toml'; expected one of .yaml, .yml, .json"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError, match=message):
        load_config(tmp_path / name)


def test_references_are_counted_as_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 60))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ArgumentError, match="in line 7 has 1660753 items"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a: &names [x, y]\nb: *names\n")
    assert load_config(tmp_path / "a.yaml") == {"a": ["x", "y"], "b": ["x", "y"]}


@pytest.mark.parametrize(("name", "content"), [("a.yaml", YAML), ("a.json", json.dumps(LIST, indent=1))])
def test_files_from_windows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert load_config(tmp_path / name) == LIST


@pytest.mark.parametrize("path", [None, 3, b"a.yaml", "a\0.yaml"])
def test_what_is_no_path_is_refused(path: object) -> None:
    with pytest.raises(ArgumentError, match="path of a config file is|embedded null"):
        load_config(path)  # type: ignore[arg-type]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="config file .* cannot be read: No such file"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="is not text in UTF-8"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b" " * ((1 << 18) + 1))
    with pytest.raises(ArgumentError, match="^config file .*262145 .*262144"):
        load_config(tmp_path / "a.yaml")
    for name in ("a" * 5000 + ".yaml", "/dev/zero/a.yaml"):
        with pytest.raises(ArgumentError, match="config file .* cannot be read: "):
            load_config(name)
    (tmp_path / "b.yaml").symlink_to("/dev/zero")
    with pytest.raises(ArgumentError, match="config file .* is a device, a pipe or a socket"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    "content",
    ["a: " + "1:" * 100_000 + "1\n", "[" * 200_000, "- &a [x]\n" + "- *a\n" * 20_000, "? " * 100_000 + "a"],
    ids=["base 60", "deep", "references", "keys"],
)
def test_what_takes_long_elsewhere_does_not_here(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    started = time.process_time()
    try:
        found = load_config(tmp_path / "a.yaml")
    except ArgumentError:
        found = None
    assert time.process_time() - started < 10
    assert found is None or found == [["x"]] * 20_001
