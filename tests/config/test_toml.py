"""Reading, overriding, refusing and writing the training file."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeforge.config.keys import keys
from moeforge.config.schema import TrainConfig
from moeforge.config.toml import dump_config, load_config
from moeforge.errors import UserError

MINIMAL = """
[model]
path = "m"
[[data.train]]
path = "a.txt"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_minimal_file_and_overrides(file):
    config = load_config(
        file,
        [
            "optimizer.lr=3e-4",
            "train.steps = 500",
            "model.path=7b",
            "run.dir=2024-01-01",
            "schedule.kind=wsd",
            "router.adaptive=false",
            'model.recompute=["layers.0.ffn"]',
            "optimizer.betas=[0.8, 0.9]",
            "data.train.0.weight=2",
            "data.train.1.path=b.jsonl",
            "data.train.1.messages_field=messages",
            "data.eval.0.path=dir/with = sign.txt",
        ],
    )
    assert config.optimizer.lr == 3e-4 and config.optimizer.betas == (0.8, 0.9)
    assert config.train.steps == 500 and config.schedule.kind == "wsd" and not config.router.adaptive
    assert config.model.path == "7b" and config.run.dir == "2024-01-01"
    assert config.model.recompute == ("layers.0.ffn",)
    assert [(each.path, each.weight) for each in config.data.train] == [("a.txt", 2.0), ("b.jsonl", 1.0)]
    assert config.data.train[1].messages_field == "messages"
    assert config.data.eval[0].path == "dir/with = sign.txt"


def test_text_that_looks_like_a_number_stays_text(file):
    assert load_config(file, ["model.path=7"]).model.path == "7"
    assert load_config(file, ['model.path="7"']).model.path == "7"
    assert "run.seed" in refusal(file, "run.seed=1\nrun.dir=2")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("run.steps=5", "run.steps: unknown key; did you mean train.steps?"),
        ("steps=5", "steps: unknown key; did you mean train.steps?"),
        ("schedule.every=5", "schedule.every: unknown key; did you mean eval.every or checkpoint.every?"),
        ("data.train.0.pth=x", "data.train.0.pth: unknown key; did you mean data.train.0.path?"),
        ("data.train.0.sequence_length=8", "data.train.0.sequence_length: unknown key; did you mean "
            "data.sequence_length?"),
        ("optimiser.lr=1", "optimiser: unknown section; did you mean optimizer?"),
        ("router.zzz=1", "router.zzz: unknown key; [router] has aux_loss, adaptive, "),
        ("zzz=1", "zzz: unknown key; the sections are run, model, data, "),
        ("schedule.kind=cos", 'schedule.kind = "cos": must be one of cosine, wsd, constant'),
        ("optimizer.lr=-1", "optimizer.lr = -1: must be greater than 0"),
        ("optimizer.lr=nan", "optimizer.lr = nan: must be a finite number"),
        ("optimizer.lr=fast", 'optimizer.lr = "fast": must be a number greater than 0'),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: must be a list of 2, each a number at least "
            "0 and less than 1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas = [0.9, 1]: must be a list of 2, each"),
        ("router.beta=1.5", "router.beta = 1.5: must be at least 0 and at most 1"),
        ("router.adaptive=True", 'router.adaptive = "True": must be true or false'),
        ("run.seed=true", "run.seed = true: must be an integer at least 0"),
        ("train.steps=1.5", "train.steps = 1.5: must be an integer at least 1"),
        ("run.dir=", 'run.dir = "": must be a non-empty string'),
        ("model.recompute=half", 'model.recompute = "half": must be one of none, all, attention, ffn'),
        ("model.recompute=[1]", "model.recompute = [1]: must be one of none, all, attention, ffn, or a list"),
        ("train=5", "train = 5: must be a table"),
        ("data.train=[]", "data.train = []: must be a non-empty list of tables ([[data.train]])"),
        ("data.train.path=b", "data.train.path: data.train is a list; path must be an index from 0 to 1"),
        ("data.train.7.path=b", "data.train.7.path: data.train is a list; 7 must be an index from 0 to 1"),
        ("data.train.1.weight=2", "data.train.1.path: missing; must be a non-empty string"),
        ("data.train.0.weight=0", "data.train.0.weight = 0: must be greater than 0"),
        ("model.path.x=1", "model.path.x: model.path is a value, not a table"),
        ("lr", "--set lr: must be key=value, as in optimizer.lr=3e-4"),
        ("train.micro_batch_sequences=3", "train.micro_batch_sequences = 3: must divide train.batch_"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_that_says_what_to_change(file, override, line):
    assert refusal(file, override).startswith(line)


def test_checks_inside_a_section_name_the_whole_key(file):
    line = refusal(file, "router.scope=global", "router.drop_tokens=true")
    assert line.startswith('router.scope = "global": must be group when router.drop_tokens = true')
    line = refusal(file, "data.train.0.format=text", "data.train.0.messages_field=m")
    assert line.startswith('data.train.0.messages_field = "m": must be absent')


def test_an_unknown_key_is_reported_before_the_key_it_misspells(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[model]\npth = "m"\n[[data.train]]\npath = "a"\n')
    assert refusal(path) == "model.pth: unknown key; did you mean model.path?"
    path.write_text("")
    assert refusal(path) == "model.path: missing; must be a non-empty string"
    path.write_text(MINIMAL + "steps = 3\n")
    assert refusal(path) == "data.train.0.steps: unknown key; did you mean train.steps?"


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "run.toml"
    assert refusal(path) == f"{path}: no such file; `moeforge train --init` writes a commented one"
    assert "Is a directory" in refusal(tmp_path)
    path.write_bytes('dir = "Dürer"'.encode("latin-1"))
    assert refusal(path) == f"{path}: byte 8 is not UTF-8, which TOML must be"
    path.write_text('[run]\nseed = 1\nseed = 2\n[model\npath = "m"')
    assert refusal(path).startswith(f"{path}, line 3, column 9: not valid TOML (cannot overwrite")
    path.write_text('[run]\ndir = "a')
    assert refusal(path).startswith(f"{path}, end of document: not valid TOML (")


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_config(path).model.path == "m"


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
POSITIVE = st.floats(1e-300, 1e300, allow_nan=False)
FIELDS = {"text_field": TEXT, "messages_field": TEXT}
HELD_OUT = st.fixed_dictionaries({"path": TEXT}, optional=FIELDS)
SOURCE = st.fixed_dictionaries({"path": TEXT}, optional={"weight": POSITIVE, **FIELDS})
CONFIG = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"path": TEXT},
            optional={"recompute": st.sampled_from(["all", "ffn"]) | st.lists(TEXT, max_size=3).map(tuple)},
        ),
        "data": st.fixed_dictionaries(
            {"train": st.lists(SOURCE, min_size=1, max_size=3).map(tuple)},
            optional={"eval": st.lists(HELD_OUT, max_size=2).map(tuple), "cache_dir": TEXT},
        ),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"lr": POSITIVE, "eps": POSITIVE, "betas": st.tuples(*[st.floats(0, 0.999)] * 2)}
        ),
        "router": st.fixed_dictionaries({}, optional={"adaptive": st.booleans(), "xi": st.floats(0, 1e9)}),
        "run": st.fixed_dictionaries({}, optional={"dir": TEXT, "seed": st.integers(0, 2**32 - 1)}),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(CONFIG)
def test_a_dumped_configuration_loads_back_equal(tmp_path, data):
    config = TrainConfig.model_validate(data)
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.text(max_size=20) | st.sampled_from(sorted(keys())), st.text(max_size=12))
def test_any_override_loads_or_is_refused_in_one_line(file, key, value):
    try:
        load_config(file, [f"{key}={value}"])
    except UserError as error:
        assert len(str(error)) < 600
