"""The commented template and the generated reference page say the same as the schema."""

import re
import tomllib
from pathlib import Path

from moeforge.config.docs import reference_page
from moeforge.config.keys import keys, tables
from moeforge.config.schema import TrainConfig
from moeforge.config.template import commented_template
from moeforge.config.toml import load_config

REPOSITORY = Path(__file__).parents[2]


def test_template_loads_and_states_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(commented_template())
    config = load_config(path, ["model.path=m", "data.train.0.path=a.txt"])
    plain = TrainConfig.model_validate({"model": {"path": "m"}, "data": {"train": ({"path": "a.txt"},)}})
    assert config == plain


def test_template_has_every_key_below_its_section():
    sections = {match[1] or match[2]: "" for match in _headers()}
    lists = {table.name for table in tables() if table.repeated}
    blocks = dict(zip(sections, re.split(_HEADER, commented_template())[3::3], strict=True))
    for key in keys().values():
        if key.name not in lists:
            leaf = key.name.rpartition(".")[2]
            assert re.search(rf"^(# )?{leaf} = ", blocks[key.section], re.MULTILINE), key.name


_HEADER = r"(?m)^(?:# )?\[\[(.+)\]\]$|^\[(.+)\]$"


def _headers():
    return re.finditer(_HEADER, commented_template())


def test_uncommenting_the_optional_lines_is_valid_too(tmp_path):
    lines = re.sub(r"(?m)^# (\[\[|[a-z_]+ = [\"\[\d])", r"\1", commented_template())
    assert tomllib.loads(lines)["data"]["eval"][0]["path"] == "path/to/heldout.txt"
    path = tmp_path / "run.toml"
    path.write_text(lines)
    config = load_config(path)
    assert config.data.train[0].messages_field == "messages" and len(config.data.eval) == 1


def test_lines_are_short_and_plain():
    assert all(len(line) <= 100 and line.isascii() for line in commented_template().splitlines())


def test_committed_reference_page_is_current():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run `make docs` and commit docs/configuration.md"


def test_reference_page_has_one_row_a_key():
    rows = re.findall(r"(?m)^\| `([a-z_.]+)` \|", reference_page())
    assert sorted(rows) == sorted(keys())
