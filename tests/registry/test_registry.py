"""Plugins are found, isolated when broken, and named with their owners in every message."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from tokenprune.errors import PluginError
from tokenprune.registry.discovery import Registry
from tokenprune.registry.plugin_checks import Owner

HEAD = """
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.specs import BackboneSpec, EnvironmentSpec, PipelineSpec, StageSpec
"""

_numbers = itertools.count()


@dataclass(frozen=True)
class Entry:
    name: str
    value: str
    dist: SimpleNamespace | None

    def load(self):
        return importlib.import_module(self.value)


def stage(name="mine", target="m:C", **more):
    extra = "".join(f", {key}={value!r}" for key, value in more.items())
    return f"StageSpec({name!r}, 'selector', 'a stage', {target!r}{extra})"


def pipeline(name):
    return f"PipelineSpec({name!r}, 'a pipeline', 'package', 'file.yaml')"


def backbone(name, target="m:F", kind="Backbone"):
    return f"{kind}Spec({name!r}, 'made by a factory', {target!r})"


def hooked(body, signature="tokenprune_register()", options=""):
    return f"{HEAD}\n@hookimpl{options}\ndef {signature}:\n    {body}\n"


def registering(*specs):
    return hooked(f"return [{', '.join(specs)}]")


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Install plugins: `install((entry name, distribution, source), ...)` in the order metadata would give them."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TOKENPRUNE_DISABLE", raising=False)
    real = importlib.metadata.entry_points

    def install(*plugins):
        entries = []
        for name, distribution, source in plugins:
            module = f"fake_plugin_{next(_numbers)}"
            (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
            entries.append(Entry(name, module, SimpleNamespace(name=distribution, version="1.2")))
        importlib.invalidate_caches()

        def entry_points(**which):
            return tuple(entries) if which == {"group": "tokenprune"} else real(**which)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        return entries

    return install


@pytest.fixture
def plugin_file(install, tmp_path):
    """Write a plugin file, with nothing else installed."""

    def write(source, name="mine.py"):
        install()
        path = tmp_path / name
        path.write_text(textwrap.dedent(source))
        return path

    return write


def test_specs_of_every_kind_are_registered_with_their_owner(install):
    others = stage("x"), pipeline("x"), backbone("x"), backbone("x", kind="Environment")
    source = registering(stage("a.b_c-1", "my.module:Class"), *others)
    entry, _ = install(("a", "my-plugins", source), ("b", "others", registering(backbone("y", kind="Environment"))))
    found = Registry.discover()
    assert found.quarantined == ()
    assert (set(found.stages), set(found.pipelines)) == ({"a.b_c-1", "x"}, {"x"})
    assert (set(found.backbones), set(found.environments)) == ({"x"}, {"x", "y"})
    assert found.stage("a.b_c-1").spec.target == "my.module:Class"
    assert found.stage("a.b_c-1").owner == Owner("my-plugins", "1.2", entry.value)
    assert found.environment("x").owner == found.backbone("x").owner == found.pipeline("x").owner


BROKEN = {
    "import": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "syntax": ("def (", "SyntaxError: invalid syntax"),
    "exit": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "nothing": ("x = 1", "it has no hook 'tokenprune_register' decorated with @hookimpl"),
    "undecorated": ("def tokenprune_register():\n    return []", "decorate it with @hookimpl"),
    "misspelt": (hooked("return []", "tokenprune_registre()"), "; did you mean 'tokenprune_register'?"),
    "argument": (
        hooked("return []", "tokenprune_register(x)"),
        "'tokenprune_register' takes the arguments (), not (x)",
    ),
    "wrapper": (hooked("yield", options="(wrapper=True)"), "'tokenprune_register' cannot be a wrapper"),
    "raises": (hooked("raise ValueError('two\\nlines')"), "ValueError: two lines"),
    "raises late": (hooked(f"yield {stage('early')}; raise KeyError('late')"), "KeyError: 'late'"),
    "none": (hooked("pass"), "must return specs, got NoneType"),
    "no spec": (registering(stage("early"), "'text'"), "returned 'text', which is none of StageSpec, PipelineSpec"),
    "capability": (
        registering(stage("early"), stage("late", requires=frozenset({"merg"}))),
        "stage 'late' requires an unknown capability 'merg'; did you mean 'merge'?",
    ),
    "requires text": (registering(stage(requires="merge")), "requires must be a frozenset of names, got 'merge'"),
    "target": (registering(stage("early"), stage("late", "m.C")), "'m.C' of 'late' is not of the form"),
    "target with a call": (registering(stage("early"), stage("late", "m:C()")), "'m:C()' of 'late' is not of the form"),
    "target without module": (registering(stage("late", ":Class")), "':Class' of 'late' is not of the form"),
    "backbone target": (registering(backbone("b", "m:")), "'m:' of 'b' is not of the form"),
    "name": (registering(stage("early"), stage("Late")), "'Late' is not a name"),
    "name with @": (registering(stage("a@b")), "'a@b' is not a name"),
    "name of another type": (registering("StageSpec(3, 'selector', '', 'm:C')"), "3 is not a name"),
    "kind": (registering("StageSpec('a', 'skorer', '', 'm:C')"), "unknown kind 'skorer'; did you mean 'scorer'?"),
    "dense": (registering(pipeline("dense")), "pipeline 'dense' is part of tokenprune"),
    "file name": (registering(pipeline("p.yaml")), "pipeline 'p.yaml' cannot end as a file"),
    "itself twice": (registering(stage("a"), stage("a")), "stage 'a' of bad 1.2 is already registered by bad 1.2"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_quarantined_as_a_whole_and_others_go_on(install, source, message):
    _, bad, _ = install(
        ("first", "a-good", registering(stage("first"))),
        ("broken", "bad", source),
        ("last", "c-good", registering(stage("last"))),
    )
    found = Registry.discover()
    assert set(found.stages) == {"first", "last"}
    assert not found.pipelines | found.backbones | found.environments
    (quarantined,) = found.quarantined
    assert quarantined.name == "broken"
    assert quarantined.owner == Owner("bad", "1.2", bad.value)
    assert message in quarantined.error
    assert "\n" not in quarantined.error
    assert quarantined.traceback.startswith("Traceback (most recent call last)")
    assert quarantined.traceback.count("\n") > 2


@pytest.mark.parametrize("case", sorted(set(BROKEN) - {"target without module"}))
def test_a_broken_plugin_file_is_refused_at_once(plugin_file, case):
    source, message = BROKEN[case]
    path = plugin_file(source)
    with pytest.raises(PluginError) as caught:
        Registry.discover(plugin_files=[path])
    assert message.replace("bad 1.2", f"{path} (file)") in str(caught.value)
    assert str(caught.value).startswith(f"plugin file {path}")
    assert "\n" not in str(caught.value)


def test_an_error_in_a_plugin_file_names_its_line_and_leaves_no_module(plugin_file):
    path = plugin_file("x = 1\n\n1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(PluginError, match=r"mine\.py:3: ZeroDivisionError: division by zero"):
        Registry.discover(plugin_files=[path])
    assert not set(sys.modules) - before


def test_keyboard_interrupt_is_not_swallowed(install):
    install(("slow", "slow", "raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        Registry.discover()


TAKEN = registering(stage("taken"), stage("free"))


def test_built_ins_come_first_and_a_stranger_cannot_take_their_names(install):
    install(("aaa", "aaa", TAKEN), ("strategies", "tokenprune_vla", registering(stage("taken"))))
    found = Registry.discover()
    assert found.stage("taken").owner.distribution == "tokenprune_vla"
    (quarantined,) = found.quarantined
    assert quarantined.error == "stage 'taken' of aaa 1.2 is already registered by tokenprune_vla 1.2"
    assert "free" not in found.stages


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_strangers_the_one_later_by_distribution_name_gives_way(install, order):
    both = (("x", "beta", TAKEN), ("y", "Alpha", TAKEN))
    install(*(both[index] for index in order))
    found = Registry.discover()
    assert found.stage("taken").owner.distribution == "Alpha"
    assert [q.error for q in found.quarantined] == ["stage 'taken' of beta 1.2 is already registered by Alpha 1.2"]


def test_a_plugin_file_cannot_take_a_name(install, tmp_path):
    install(("mine", "mine", TAKEN))
    path = tmp_path / "again.py"
    path.write_text(TAKEN)
    with pytest.raises(PluginError) as caught:
        Registry.discover(plugin_files=[path])
    assert str(caught.value).endswith(f"stage 'taken' of {path} (file) is already registered by mine 1.2")


UNIMPORTABLE = "raise AssertionError('imported')"


@pytest.mark.parametrize("name", ["entry", "My.Dist", "my-dist"])
def test_a_disabled_plugin_is_never_imported(install, name):
    (off, _) = install(("entry", "my_dist", UNIMPORTABLE), ("other", "other", registering(stage("kept"))))
    found = Registry.discover(disable=[name, " ", "nobody"])
    assert (found.quarantined, set(found.stages)) == ((), {"kept"})
    assert (found.disabled, found.unknown_disabled) == (("entry",), ("nobody",))
    assert off.value not in sys.modules


def test_the_environment_disables_unless_the_caller_says_otherwise(install, monkeypatch):
    install(("a", "a", registering(stage("a"))), ("b", "b", registering(stage("b"))))
    monkeypatch.setenv("TOKENPRUNE_DISABLE", " a , typo,")
    found = Registry.discover()
    assert (set(found.stages), found.unknown_disabled) == ({"b"}, ("typo",))
    assert set(Registry.discover(disable=()).stages) == {"a", "b"}


def test_a_distribution_without_a_version_is_no_obstacle(install, monkeypatch):
    (entry,) = install(("a", "a", registering(stage("a"))))
    for dist, expected in ((SimpleNamespace(name="a", version=None), "a unknown"), (None, "unknown unknown")):
        bare = Entry(entry.name, entry.value, dist)
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda bare=bare, **_: [bare])
        assert str(Registry.discover().stage("a").owner) == expected


def test_an_unknown_name_names_the_nearest(install):
    specs = stage("fastv"), pipeline("p"), backbone("b"), backbone("goal", kind="Environment")
    install(("mine", "mine", registering(*specs)))
    found = Registry.discover()
    for ask, name, message in (
        (found.stage_class, "fastw", r"^no stage is called 'fastw'; did you mean 'fastv'\? valid: fastv$"),
        (found.pipeline, "dens", r"^no pipeline is called 'dens'; did you mean 'dense'\? valid: dense, p$"),
        (found.backbone_factory, "x", r"^no backbone is called 'x'; valid: b$"),
        (found.environment_factory, "gaol", r"^no environment is called 'gaol'; did you mean 'goal'\? valid: goal$"),
    ):
        with pytest.raises(PluginError, match=message):
            ask(name)


def test_an_unknown_name_mentions_plugins_that_are_not_loaded(install):
    install(("good", "good", registering(stage("a"))), ("bad", "bad", UNIMPORTABLE), ("off", "off", UNIMPORTABLE))
    with pytest.raises(PluginError, match=r"not loaded: 'bad' \(broken\), 'off' \(disabled\); `tokenprune doctor`"):
        Registry.discover(disable=["off"]).stage("theirs")


def test_nothing_installed_still_lists_dense(install):
    install()
    found = Registry.discover()
    assert not [*found.stages, *found.pipelines, *found.backbones, *found.environments, *found.quarantined]
    with pytest.raises(PluginError, match="valid: dense"):
        found.pipeline("fastv")


STAGE = """
from tokenprune.stages.config import CutConfig
from tokenprune.registry.hookspecs import hookimpl
from tokenprune.registry.specs import StageSpec
from tokenprune.stages.stage import Stage

class Good(Stage[CutConfig]):
    Config = CutConfig
    @hookimpl
    def select_tokens(self, ctx):
        pass
class Holder:
    Inner = Good
class Plain:
    Config = CutConfig
class WrongConfig(Stage[CutConfig]):
    Config = dict
class Misspelt(Stage[CutConfig]):
    @hookimpl
    def selekt_tokens(self, ctx):
        pass
class WrongArgument(Stage[CutConfig]):
    @hookimpl
    def score_layer(self, context):
        pass
class NoArgument(Stage[CutConfig]):
    @hookimpl
    def score_layer(self):
        pass
class Undecorated(Stage[CutConfig]):
    def score_layer(self, ctx):
        pass
class BadWrapper(Stage[CutConfig]):
    @hookimpl(wrapper=True)
    def reset(self, episode):
        pass

@hookimpl
def tokenprune_register():
    return [StageSpec("it", "selector", "", TARGET)]
"""


@pytest.mark.parametrize("target", [":Good", ":Holder.Inner"])
def test_a_plugin_file_may_name_its_own_classes(plugin_file, target):
    path = plugin_file(STAGE.replace("TARGET", repr(target)))
    found = Registry.discover(plugin_files=[path])
    good = found.stage_class("it")
    assert good.__name__ == "Good"
    assert found.stage_class("it") is good
    assert str(found.stage("it").owner) == f"{path} (file)"
    assert sys.modules[good.__module__].__file__ == str(path)


def test_two_plugin_files_of_one_name_are_two_modules(plugin_file, tmp_path):
    first = plugin_file(STAGE.replace("TARGET", "':Good'"))
    (tmp_path / "sub").mkdir()
    second = tmp_path / "sub" / "mine.py"
    second.write_text(STAGE.replace("TARGET", "':Good'").replace('"it"', '"other"'))
    found = Registry.discover(plugin_files=[first, second])
    modules = [sys.modules[found.stage_class(name).__module__].__file__ for name in ("it", "other")]
    assert modules == [str(first), str(second)]


WRONG = {
    "Gud": "there is no 'Gud'; did you mean 'Good'?",
    "Holder.Good": "there is no 'Good'; valid: Inner",
    "tokenprune_register": "it must be a subclass of tokenprune.Stage",
    "Plain": "it must be a subclass of tokenprune.Stage",
    "WrongConfig": "its Config must be a subclass of tokenprune.StageConfig",
    "Misspelt": "unknown hook 'selekt_tokens'; did you mean 'select_tokens'?",
    "WrongArgument": "hook 'score_layer' takes the arguments (ctx), not (context)",
    "NoArgument": "hook 'score_layer' takes the arguments (ctx), not ()",
    "Undecorated": "'score_layer' has the name of a hook and is not one; decorate it with @hookimpl",
    "BadWrapper": "PluginValidationError",
}


@pytest.mark.parametrize(("target", "message"), WRONG.items())
def test_a_wrong_stage_class_names_owner_and_target(plugin_file, target, message):
    path = plugin_file(STAGE.replace("TARGET", repr(f":{target}")))
    found = Registry.discover(plugin_files=[path])
    with pytest.raises(PluginError) as caught:
        found.stage_class("it")
    assert str(caught.value).startswith(f"stage 'it' of {path} (file), :{target}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["import nowhere_to_be_found", "import sys; sys.exit('nowhere_to_be_found')"])
def test_a_stage_whose_module_cannot_be_imported_names_owner_and_target(install, tmp_path, source):
    (tmp_path / "heavy.py").write_text(source)
    install(("mine", "mine", registering(stage("a", "heavy:C"))))
    found = Registry.discover()
    assert "heavy" not in sys.modules
    with pytest.raises(
        PluginError, match=r"^stage 'a' of mine 1\.2, heavy:C: cannot be imported: .*nowhere_to_be_found"
    ):
        found.stage_class("a")


@pytest.mark.parametrize("kind", ["backbone", "environment"])
def test_a_factory_must_describe_and_build(install, tmp_path, kind):
    (tmp_path / f"{kind}_factories.py").write_text(
        "class Good:\n    @staticmethod\n    def describe(): ...\n    @staticmethod\n    def build(): ...\n"
        "class Half:\n    @staticmethod\n    def describe(): ...\n"
    )
    specs = (backbone(name, f"{kind}_factories:{name.title()}", kind.title()) for name in ("good", "half"))
    install(("m", "m", registering(*specs)))
    factory = getattr(Registry.discover(), f"{kind}_factory")
    assert factory("good").__name__ == "Good"
    with pytest.raises(PluginError, match=rf"^{kind} 'half' of m 1\.2, {kind}_factories:Half: .*'build'"):
        factory("half")


def test_a_plugin_file_that_is_no_file_is_refused(plugin_file, tmp_path):
    with pytest.raises(PluginError, match=r"plugin\.txt: .*ends in \.py"):
        Registry.discover(plugin_files=[plugin_file("x = 1", "plugin.txt")])
    with pytest.raises(PluginError, match=r"nowhere\.py: there is no such file"):
        Registry.discover(plugin_files=[tmp_path / "nowhere.py"])


def test_discovery_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; from tokenprune.registry.discovery import Registry; found = Registry.discover(disable=());"
        "assert 'fastv' in found.stages and 'openvla-oft' in found.backbones, found.quarantined;"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
