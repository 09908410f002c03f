"""Which plugins are found, and which of them may be imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kpt
from kpt.plugins import PluginError, clear_cache, registry
from kpt.specs import PassSpec

MARK = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n"


def was_imported(info: Path) -> bool:
    return any(info.parent.glob("*.ran"))


def test_an_installed_plugin_offers_its_specs_and_its_origin(install):
    install("kpt-plugin-good", plugin="good", version="2.1")
    found = registry()
    (registered,) = found.specs("kpt_passes")
    assert registered.spec == PassSpec("good.pass", "layout", "math:sqrt")
    assert (registered.plugin, registered.distribution, registered.version) == (
        "good",
        "kpt-plugin-good",
        "2.1",
    )
    (status,) = found.statuses
    assert (status.state, status.hooks) == ("ok", ("kpt_passes",))
    assert found.fingerprint() == {"good": "2.1"}


def test_names_are_filtered_before_anything_is_imported(install, monkeypatch):
    info = install("kpt-plugin-noisy", MARK, plugin="noisy")
    for variable, value in [
        ("KPT_DISABLE_PLUGINS", "noisy"),
        ("KPT_DISABLE_PLUGINS", "other, KPT_Plugin_Noisy"),
        ("KPT_PLUGINS", ""),
        ("KPT_PLUGINS", "other"),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            status = registry().status("noisy")
        assert status is not None and status.state == "disabled"
        assert variable in status.reason and variable in status.mend
    assert registry([]).status("noisy").state == "disabled"
    assert not was_imported(info)
    registry()
    assert was_imported(info)


def test_the_mend_of_a_disabled_plugin_keeps_the_other_choices(install, monkeypatch):
    install("kpt-plugin-good", plugin="good")
    monkeypatch.setenv("KPT_DISABLE_PLUGINS", "bad,good")
    assert registry().status("good").mend == "export KPT_DISABLE_PLUGINS=bad"
    monkeypatch.setenv("KPT_DISABLE_PLUGINS", "good")
    assert registry().status("good").mend == "unset KPT_DISABLE_PLUGINS"
    monkeypatch.delenv("KPT_DISABLE_PLUGINS")
    monkeypatch.setenv("KPT_PLUGINS", "cpu")
    assert registry().status("good").mend == "export KPT_PLUGINS=cpu,good"


def test_a_name_in_the_allow_list_that_nothing_offers_is_reported(install, monkeypatch):
    install("kpt-plugin-good", plugin="good")
    monkeypatch.setenv("KPT_PLUGINS", "good gone")
    found = registry()
    assert found.status("good").state == "ok"
    assert "no installed distribution" in found.status("gone").reason


def test_an_older_copy_of_a_distribution_behind_the_first_adds_nothing(install, tmp_path, monkeypatch):
    install("kpt-plugin-twice", plugin="twice", version="2.0")
    older = tmp_path / "older"
    older.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(older)])
    install("Kpt_Plugin.Twice", plugin="twice", version="1.0", site=older)
    (status,) = registry().statuses
    assert (status.version, status.state) == ("2.0", "ok")


def test_a_plugin_that_needs_another_core_is_not_imported(install):
    info = install("kpt-plugin-future", MARK, plugin="future", requires=("kpt-core>=99,<100",))
    install("kpt-plugin-good", plugin="good")
    found = registry()
    status = found.status("future")
    assert status.state == "incompatible"
    assert kpt.__version__ in status.reason and ">=99" in status.reason
    assert status.mend.startswith("pip install 'kpt-core<100,>=99'")
    assert not was_imported(info)
    assert found.status("good").state == "ok"


def test_a_requirement_of_an_extra_or_another_platform_does_not_count(install):
    install(
        "kpt-plugin-good",
        plugin="good",
        requires=("kpt-core>=99; extra == 'future'", "kpt_core>=99; python_version < '3'", "torch>=99"),
    )
    assert registry().status("good").state == "ok"


def test_a_requirement_that_cannot_be_read_is_named(install):
    install("kpt-plugin-odd", plugin="odd", requires=("kpt-core >>> 1",))
    assert registry().status("odd").state == "invalid"


def test_metadata_that_cannot_be_read_costs_only_its_own_plugin(install):
    info = install("kpt-plugin-torn", plugin="torn")
    (info / "METADATA").unlink()
    install("kpt-plugin-good", plugin="good")
    found = registry()
    assert found.status("good").state == "ok"
    (torn,) = [status for status in found.statuses if "torn" in status.distribution]
    assert torn.state == "broken" and torn.mend


def test_names_are_demanded_and_objects_may_be_handed_in(install):
    install("kpt-plugin-good", plugin="good")

    class Mine:
        @kpt.hookimpl
        def kpt_passes(self):
            return [PassSpec("mine", "runtime", "math:sqrt")]

    found = registry([Mine(), "good"])
    assert [registered.spec.name for registered in found.specs("kpt_passes")] == ["good.pass", "mine"]
    assert set(found.fingerprint()) == {"good", "inline:Mine"}
    with pytest.raises(PluginError, match="did you mean 'good'"):
        registry(["goood"])
    with pytest.raises(PluginError, match="write \\['good'\\]"):
        registry("good")


def test_a_plugin_asked_for_by_name_that_is_off_is_an_error_with_its_mend(install, monkeypatch):
    install("kpt-plugin-good", plugin="good")
    monkeypatch.setenv("KPT_DISABLE_PLUGINS", "good")
    with pytest.raises(PluginError) as caught:
        registry(["good"])
    assert caught.value.mend == "unset KPT_DISABLE_PLUGINS"


def test_inline_plugins_are_versioned_by_what_they_offer():
    def plugin(name):
        class Mine:
            @kpt.hookimpl
            def kpt_passes(self):
                return [PassSpec(name, "runtime", "math:sqrt")]

        return Mine()

    versions = [registry([plugin(name)]).fingerprint()["inline:Mine"] for name in ("a", "a", "b")]
    assert versions[0] == versions[1] != versions[2]
    assert versions[0].startswith("inline+")


def test_an_edited_plugin_has_another_fingerprint_though_its_version_stays(install, tmp_path):
    info = install("kpt-plugin-edited", plugin="edited")
    source = info.parent / "kpt_plugin_edited.py"
    source.write_text(source.read_text().replace("math:sqrt", "kpt_plugin_edited:Pass"))
    clear_cache()
    assert registry().fingerprint() == {"edited": "1.0"}

    (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    clear_cache()
    first = registry().fingerprint()["edited"]
    clear_cache()
    assert registry().fingerprint()["edited"] == first and first.startswith("1.0+")
    source.write_text(source.read_text() + "\nclass Pass: pass\n")
    clear_cache()
    assert registry().fingerprint()["edited"] != first
    assert registry().status("edited").version == "1.0"


def test_inline_plugins_ignore_the_environment(install, monkeypatch):
    monkeypatch.setenv("KPT_PLUGINS", "")

    class Mine:
        @kpt.hookimpl
        def kpt_passes(self):
            return [PassSpec("mine", "runtime", "math:sqrt")]

    assert registry([Mine()]).specs("kpt_passes")


def test_the_registry_is_built_once_for_a_selection_and_environment(install, monkeypatch):
    install("kpt-plugin-good", plugin="good")
    assert registry() is registry()
    assert registry(["good"]) is registry(["good"])
    first = registry()
    monkeypatch.setenv("KPT_DISABLE_PLUGINS", "good")
    assert registry() is not first
    monkeypatch.delenv("KPT_DISABLE_PLUGINS")
    assert registry() is first
    clear_cache()
    assert registry() is not first


def test_threads_share_one_loading(install):
    install(
        "kpt-plugin-slow",
        """
        import time, threading
        calls = []
        @kpt.hookimpl
        def kpt_passes():
            calls.append(1)
            time.sleep(0.05)
            yield PassSpec('slow.pass', 'layout', 'math:sqrt')
        """,
        plugin="slow",
    )
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert len(sys.modules["kpt_plugin_slow"].calls) == 1


def test_a_hook_that_asks_for_the_registry_is_told_off_and_isolated(install):
    install(
        "kpt-plugin-recursive",
        """
        @kpt.hookimpl
        def kpt_passes():
            from kpt.plugins import registry
            return registry().specs("kpt_passes")
        """,
        plugin="recursive",
    )
    status = registry().status("recursive")
    assert status.state == "broken" and "while plugins are being loaded" in status.reason


def test_loading_every_installed_plugin_imports_neither_torch_nor_a_vendor_library():
    script = (
        "import sys; from kpt.plugins import registry; r = registry();"
        "[r.specs(h) for h in ('kpt_passes', 'kpt_kernels', 'kpt_hardware')];"
        "heavy = {'torch', 'numpy', 'transformers', 'onnxruntime', 'openvino', 'boto3', 'mlflow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
