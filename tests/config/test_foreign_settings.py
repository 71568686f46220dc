"""Folders that strangers made: `resume DIR` and `--config-dir DIR` run nothing of theirs."""

import json
import pickle
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from command_line import exit_code
from lorasweep.config.begun_command import begun_by
from lorasweep.config.compose import compose
from lorasweep.config.foreign_settings import unsaid
from lorasweep.core.settings import SettingsError, build

PLACES = ["output_root=out", "cache_dir=cache", "dataset.image_dir=photos"]
TRAIN = ["train", "model=embedded", "--config-dir", "theirs", *PLACES]


class Touch:
    """Unpickled, it makes the file RAN."""

    def __reduce__(self):
        return Path.touch, (Path("RAN").absolute(),)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a pickle that makes RAN, and a module that does, if either is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    Path("evil.pickle").write_bytes(pickle.dumps(Touch()))
    Path("on_path").mkdir()
    Path("on_path/touching.py").write_text("open('RAN', 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "on_path"))
    yield
    assert not Path("RAN").exists()
    assert not list(Path("out").rglob("*.safetensors"))


def refused(capsys, *words):
    """The one line in which a command is refused; nothing is made, and no secret is shown."""
    assert exit_code(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith("lorasweep: ") and told.count("\n") == 1, told
    assert "hunter2" not in told
    return told


# Runs and sweeps that go on


def broken_off(*task, hydra=(), multirun=False, config_dir=None, cwd="."):
    """A folder as Hydra leaves it, of a run that was begun with these overrides."""
    folder = Path("begun").absolute()
    (folder / ".hydra").mkdir(parents=True)
    sources = [{"path": str(config_dir), "schema": "file", "provider": "command-line"}]
    config = {
        "overrides": {"hydra": list(hydra), "task": list(task)},
        "runtime": {
            "cwd": str(Path(cwd).absolute()),
            "output_dir": str(folder),
            "config_sources": sources if config_dir else [],
        },
        "callbacks": {"x": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "evil.pickle"}},
        "searchpath": ["file://evil"],
    }
    file = folder / "multirun.yaml" if multirun else folder / ".hydra" / "hydra.yaml"
    file.write_text(yaml.safe_dump({"hydra": config, "output_root": "outputs"}))
    (folder / ".hydra" / "config.yaml").write_text("output_root: outputs")
    record = {"name": "a", "status": "unfinished", "settings": "x", "data": "x"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


CALL = "filepath_or_buffer: evil.pickle"
HOSTILE_WORDS = [
    f"+hydra.callbacks.x={{_target_: pandas.read_pickle, {CALL}}}",
    "+hydra.callbacks.x={_target_: joblib.load, filename: evil.pickle}",
    "+hydra.callbacks.x={_target_: numpy.load, file: evil.pickle, allow_pickle: true}",
    "+hydra.callbacks.x={_target_: torch.load, f: evil.pickle, weights_only: false}",
    f"+hydra/callbacks@hydra.callbacks.x={{_target_: pandas.read_pickle, {CALL}}}",
    "+adapter@hydra.callbacks.x=evil",
    "hydra.searchpath=[file://theirs]",
    "hydra.job_logging.handlers.x={(): touching.Thing}",
    "hydra/job_logging=evil",
    "hydra.launcher._target_=touching.Thing",
    "hydra/launcher={_target_: touching.Thing}",
    "hydra.sweep.subdir=../../x",
    "hydra.output_subdir=/tmp/x",
    "model.allow_pickle=true",
    "++model.allow_pickle=true",
    "+model={path: evil.ckpt, allow_pickle: true}",
    "+model=${study.vars.x}",
    "tracking.uri=http://evil.example",
    "tracking={uri: http://evil.example}",
    "tracking={uri: http://evil.example},{uri: null}",
    "study.storage=postgresql+psycopg://evil.example/x",
    "launcher.pack_via=ray",
    "launcher.engine={address: ray://evil.example}",
    "launcher.engine.slurm_setup=[touch RAN]",
    "launcher={engine: {x: {_target_: pandas.read_pickle}}}",
    "trainer.path=theirs",
    "trainer.python=theirs/python",
    "optimizer.type=touching.Thing",
    "optimizer.type=AdamW,touching.Thing",
    "sampling.prompts=['${oc.env:SECRET}']",
    "sampling.prompts=['${oc.${x}:SECRET}']",
    "sampling.prompts=['${ oc.env:SECRET}']",
    'sampling.prompts=["\\\\${oc.env:SECRET}"]',
    "sampling.prompts=['${oc.decode:\"x\"}']",
    'sampling.prompts=${oc.create:"[x]"}',
    "sampling.prompts=['${hydra:runtime.cwd}']",
    "adapter.rank=[",
]


@pytest.mark.parametrize("multirun", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("word", HOSTILE_WORDS)
def test_a_word_that_is_no_setting_is_refused_before_anything_is_composed(word, multirun):
    given = {"hydra": [word]} if "hydra" in word else {"hydra": []}
    folder = broken_off(
        "experiment=demo", *({word} - {*given["hydra"]}), **given, multirun=multirun
    )
    with pytest.raises(SettingsError, match="say it again: lorasweep resume") as told:
        begun_by(folder)
    assert shlex.split(str(told.value).partition("say it again: ")[2])[3:] == [word]


def test_no_pickle_runs_of_a_folder_that_is_resumed(capsys):
    folder = broken_off("experiment=demo", HOSTILE_WORDS[0])
    assert "it can't decide for you" in refused(capsys, "resume", str(folder))
    assert Path("evil.pickle").exists()


def test_what_is_said_again_holds_and_nothing_else_does():
    server, launcher = "tracking.uri=http://mine.example", "hydra.launcher.partition=gpu"
    folder = broken_off("experiment=demo", server, hydra=[launcher, "hydra.run.dir=x"])
    begun = begun_by(folder, [server, launcher])
    assert (begun.argv[:-1], begun.cwd) == ([launcher, "experiment=demo", server], Path.cwd())
    with pytest.raises(SettingsError, match="partition=gpu"):
        begun_by(folder, [server])
    with pytest.raises(SettingsError, match=r"rank=8: .* was begun with adapter.rank=16"):
        begun_by(folder, [server, launcher, "adapter.rank=8"])


def test_a_password_in_a_word_is_not_shown(capsys):
    folder = broken_off("experiment=demo", "tracking.uri=http://me:hunter2@mine.example")
    assert "http://***@mine.example" in refused(capsys, "resume", str(folder))


def test_resume_itself_takes_what_is_said_again(capsys):
    launcher = "hydra.launcher.partition=gpu"  # of a launcher that isn't chosen here
    folder = broken_off("experiment=x", "model.allow_pickle=true", hydra=[launcher])
    told = refused(capsys, "resume", str(folder), launcher, "model.allow_pickle=true")
    assert "experiment=x: there is no such option" in told or "partition" in told


PLAIN_WORDS = [
    "experiment=demo",
    "captions=[empty,sidecar]",
    "adapter=lora,locon",
    "adapter.rank=choice(4,8)",
    "adapter.alpha='${half:${adapter.rank}}'",
    "optimizer.unet_lr=tag(log,interval(1e-5,1e-3))",
    "optimizer.text_encoder_lr='${times:${.unet_lr},0.5}'",
    "optimizer.type=AdamW,bitsandbytes.optim.PagedAdamW",
    "optimizer.args={betas: [0.9, 0.99]}",
    "tracking.uri=null",
    "tracking.experiment=x",
    "++study.pruner_options.reduction_factor=2",
    "study.params={adapter.rank: choice(4,8)}",
    "+sweeps=rank_lr",
    "hydra/sweeper=optuna",
    "hydra/launcher=submitit_slurm",
    "name='a b'",
    "~experiment",
    "dataset.image_dir='a \"b\" c'",
]


def test_what_people_give_needs_not_be_said_again():
    assert unsaid(PLAIN_WORDS) == []


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in pairwise("abcdefghi")
)


def test_an_alias_bomb_in_a_folder_ends_in_one_line(capsys):
    folder = broken_off("experiment=demo")
    (folder / ".hydra" / "hydra.yaml").write_text(BOMB)
    assert "once its aliases are expanded" in refused(capsys, "resume", str(folder))


@pytest.mark.parametrize(
    "text", ["", "[]", "hydra: 3", "hydra: {overrides: {hydra: [1], task: []}}", "a: !!x b", "\0"]
)
def test_a_folder_of_another_shape_ends_in_one_line(text):
    folder = broken_off()
    (folder / ".hydra" / "hydra.yaml").write_text(text)
    with pytest.raises(SettingsError, match="can't tell how it was begun"):
        begun_by(folder)


def test_a_folder_that_is_gone_is_no_place_to_go_on_in():
    with pytest.raises(SettingsError, match="can't tell how it was begun"):
        begun_by(broken_off("experiment=demo", cwd="nowhere"))


# Folders of options


def option(text, name="experiment/x.yaml"):
    file = Path("theirs", name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


HEAD = "# @package _global_\n"
KOHYA = f"{HEAD}defaults: [override /trainer: sd_scripts]\n"
CALLED = f"{{_target_: pandas.read_pickle, {CALL}}}"
CALLBACK = f"callbacks: {{x: {CALLED}}}"
HOSTILE_OPTIONS = {
    "a callback": f"{HEAD}hydra: {{{CALLBACK}}}",
    "a callback by its package": f"# @package hydra\n{CALLBACK}",
    "by a longer package": f"# @package _global_._global_.hydra\n{CALLBACK}",
    "by a package that is a name": "# @package _name_\nx: 1",
    "a folder to search": f"{HEAD}hydra: {{searchpath: ['file:///tmp']}}",
    "a class of log handlers": "# @package hydra.job_logging\nhandlers: {x: {(): touching.Thing}}",
    "a launcher's settings": f"{HEAD}hydra: {{launcher: {{_target_: touching.Thing}}}}",
    "a sweeper": f"{HEAD}hydra: {{sweeper: {{_target_: touching.Thing}}}}",
    "a list for Hydra": f"{HEAD}hydra: [1]",
    "an option that is put into Hydra": f"{HEAD}defaults: [/adapter@hydra.callbacks.x: lora]",
    "by a global package": f"{HEAD}defaults: ['/adapter@_global_.hydra.callbacks.x': lora]",
    "by an older way": f"{HEAD}defaults: ['/adapter@_group_:hydra': lora]",
    "a group of Hydra's": f"{HEAD}defaults: [override /hydra/job_logging: evil]",
    "a launcher by a path": f"{HEAD}defaults: [override /hydra/launcher: ../x]",
    "a whole file of Hydra's": f"{HEAD}defaults: [/hydra/launcher/basic]",
    "what a sweep varies": f"{HEAD}hydra: {{sweeper: {{params: {{hydra.job_logging.x: 1}}}}}}",
    "a pickle it varies": f"{HEAD}hydra: {{sweeper: {{params: {{model.allow_pickle: 'true'}}}}}}",
    "a variable": f"{HEAD}sampling: {{prompts: ['${{oc.env:SECRET}}']}}",
    "a variable in escapes": f'{HEAD}sampling: {{prompts: ["\\x24{{oc.env:SECRET}}"]}}',
    "a variable in a key": f"{HEAD}defaults: [override /adapter: '${{oc.env:SECRET}}']",
    "a text that is decoded": f"{HEAD}name: ${{oc.decode:x}}",
    "a pickle": f"{HEAD}model: {{path: evil.ckpt, allow_pickle: true}}",
    "a pickle in text": HEAD + "model: '${half:{_target_: Model, allow_pickle: true}}'",
    "a server": f"{HEAD}tracking: {{uri: 'http://me:hunter2@evil.example'}}",
    "a server by its package": "# @package tracking\nuri: http://evil.example",
    "a program of the shell": "# @package launcher\npack_via: joblib\nengine: {n_jobs: 2}",
    "a call among a launcher's options": f"{HEAD}launcher: {{engine: {{x: {CALLED}}}}}",
    "a folder of programs": f"{KOHYA}trainer: {{path: theirs}}",
    "a program": f"{HEAD}trainer: {{python: theirs/python}}",
    "a module": f"{HEAD}optimizer: {{type: touching.Thing}}",
    "a class": f"{HEAD}adapter: {{_target_: touching.Thing}}",
    "a function": f"{HEAD}model: {CALLED}",
    "a class of the library": f"{HEAD}adapter: {{_target_: antigravity.x}}",
    "an alias bomb": BOMB,
    "an alias of itself": f"{HEAD}name: &a [*a]",
    "nested a thousand deep": f"{HEAD}name: {'[' * 1000}{']' * 1000}",
}  # fmt: skip


@pytest.mark.parametrize("multirun", [[], ["-m", "seed=0,1"]], ids=["run", "multirun"])
@pytest.mark.parametrize("text", HOSTILE_OPTIONS.values(), ids=HOSTILE_OPTIONS)
def test_a_folder_of_options_runs_and_reads_nothing(text, multirun, capsys):
    option(text)
    told = refused(capsys, *TRAIN, *multirun, "experiment=x")
    assert re.search(
        r"theirs/experiment/x\.yaml[: ]|is for you to say|no class of settings|launcher.engine",
        told,
    )


def test_a_launcher_calls_nothing_that_stands_among_its_settings(capsys):
    option(f"{HEAD}launcher: {{devices: {CALLED}}}")
    assert "launcher.devices" in refused(capsys, "train", "-m", *TRAIN[1:], "experiment=x")


def test_a_group_of_hydras_is_not_read_from_a_folder(capsys):
    option(f"x: {CALLED}", "hydra/job_logging/evil.yaml")
    option("_target_: touching.Thing", "hydra/sweeper/evil.yaml")
    option(f"{HEAD}defaults: [override /hydra/sweeper: evil]")
    for word in ("hydra/job_logging=evil", "experiment=x"):
        assert "Hydra's own settings" in refused(capsys, *TRAIN, word)


def test_a_link_out_of_a_folder_of_options_is_not_followed(capsys):
    Path("theirs/experiment").mkdir(parents=True)
    Path("private.yaml").write_text("name: hunter2")
    Path("theirs/experiment/x.yaml").symlink_to(Path("private.yaml").absolute())
    assert "lies outside" in refused(capsys, *TRAIN, "experiment=x")


@pytest.mark.parametrize(
    "params",
    [
        "{hydra.job_logging.x: 'choice(1,2)'}",
        "{+adapter@hydra.callbacks.x: 'choice(lora,locon)'}",
        "{model.allow_pickle: [true]}",
        "{tracking: '${study.vars.x}'}",
        "{tracking.uri: 'choice(\"http://evil.example\")'}",
    ],
)
def test_a_sweep_of_a_folder_varies_settings_only(params, capsys):
    vars_ = "vars: {x: 'choice({uri: \"http://evil.example\"},{})'}"
    head = f"{HEAD}defaults: [override /hydra/sweeper: optuna]\n"
    option(f"{head}study: {{params: {params}, {vars_}}}", "sweeps/x.yaml")
    assert "can't vary" in refused(capsys, "sweep", "x", *TRAIN[1:])


def test_what_the_command_line_says_holds_beside_a_folder():
    option(f"{HEAD}adapter: {{rank: 4}}\nsampling: {{prompts: ['\\${{not.a.key}}']}}")
    said = ["model.allow_pickle=true", "tracking.uri=http://mine.example", "experiment=x"]
    cfg = compose([*said, "dataset.image_dir=${oc.env:SECRET}"], Path("theirs"))
    assert (cfg.model.allow_pickle, cfg.tracking.uri) == (True, "http://mine.example")
    assert (cfg.adapter.rank, cfg.dataset.image_dir) == (4, "hunter2")
    assert cfg.sampling.prompts[0] == "${not.a.key}"  # escaped: text


def test_every_command_takes_a_folder_of_options_by_these_rules(capsys):
    option(HOSTILE_OPTIONS["a server"])
    for command in (["pick"], ["sync"], ["ui"], ["doctor"], ["caption", "theirs"]):
        told = refused(capsys, *command, "--config-dir", "theirs", "experiment=x")
        assert "tracking.uri" in told and "evil.example" in told


# Classes of one's own


def test_a_module_is_imported_only_from_a_folder_that_pythonpath_names(monkeypatch):
    for path in ("touching.Thing", "antigravity.x", "lorasweep.cli.main.main", "Nope", "os.system"):
        with pytest.raises(SettingsError, match="is no class of settings of lorasweep"):
            build({"_target_": path}, "adapter")
    monkeypatch.setenv("PYTHONPATH", str(Path("mine").absolute()))
    with pytest.raises(SettingsError, match="is no class of settings of lorasweep"):
        build({"_target_": "touching.Thing"}, "adapter")
    Path("mine").mkdir()
    Path("mine/my_settings.py").write_text(
        "from dataclasses import dataclass\nfrom lorasweep.core.settings import Settings\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Settings):\n    x: int\n"
    )
    monkeypatch.syspath_prepend(str(Path("mine").absolute()))
    assert build({"_target_": "my_settings.Mine", "x": 3}, "adapter").x == 3


def test_nobody_is_advised_to_install_what_a_config_names(make_run):
    with pytest.raises(SettingsError) as told:
        make_run("optimizer.type=evil_package.AdamW").check()
    assert "pip install" not in str(told.value)


def test_a_config_beside_a_lora_reads_no_variable(tmp_path):
    from lorasweep.config.build_run import saved_model
    from lorasweep.core.foreign_files import read_yaml

    for text in ("model: {path: 'x/${oc.env:SECRET}'}", BOMB, "[1]", "model: [1]", "\0"):
        Path("config.yaml").write_text(text)
        with pytest.raises(ValueError) as told:
            saved_model(read_yaml(Path("config.yaml")), "config.yaml")
        assert "hunter2" not in str(told.value)


def test_options_of_ones_own_are_found_again_by_the_folders_words(capsys):
    option("_target_: LoRA\nrank: 4", "adapter/mine.yaml")
    folder = broken_off("adapter=mine", *PLACES, config_dir=Path("theirs").absolute())
    argv = begun_by(folder).argv
    assert exit_code("train", "--cfg", "job", *argv) == 0
    assert "rank: 4" in capsys.readouterr().out
