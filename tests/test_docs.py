"""The code of the documentation runs as it stands."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from torchshear.compat.unipruning import _config as _unipruning
from torchshear.configs import _neural_compressor, _nni
from torchshear.dependency import registered_operators, unregister
from torchshear.pruners.criteria import _criterion as _registry

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md", "CONTRIBUTING.md", "docs/how-it-works.md", "docs/custom-operators.md", "docs/inspect.md",
    "docs/choosing.md", "docs/large-models.md", "docs/criteria.md", "docs/masks.md", "docs/config-lists.md",
    "docs/migration.md", "docs/compensation.md", "docs/search.md", "docs/training.md", "docs/latency.md",
)  # fmt: skip


LONG_PAGES = {"docs/latency.md", "docs/config-lists.md"}  # half a minute each: run by test-zoo


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.zoo] if page in LONG_PAGES else []) for page in PAGES]
)
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHSHEAR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "page.py"
    file.write_text(code_of(page))
    operators, criteria = set(registered_operators()), set(_registry._CRITERIA)
    try:
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "page"})
    finally:
        for name in set(registered_operators()) - operators:
            unregister(name)
        for name in set(_registry._CRITERIA) - criteria:
            del _registry._CRITERIA[name]
    assert code_of(page)
    if page == "README.md":
        printed = capsys.readouterr().out
        shown = re.search(r"```text\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        for line in shown.group(1).splitlines():
            assert line.rstrip() in [text.rstrip() for text in printed.splitlines()], line


def test_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_commands_of_the_readme_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("dialect", [_nni, _neural_compressor, _unipruning], ids=lambda module: module.__name__)
def test_every_key_of_a_config_is_in_the_migration_page(dialect: ModuleType) -> None:
    text = (ROOT / "docs/migration.md").read_text()
    assert [key for key in dialect.KEYS if not re.search(rf"`{key}[`:]", text)] == []
