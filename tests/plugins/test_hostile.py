"""Plugins that are broken in every way that we know of: each is named with a command that mends
it, and all others keep working."""

from __future__ import annotations

import pytest

import kpt
from kpt.plugins import PluginError, instantiate, load, registry
from kpt.specs import KernelSpec, PassSpec

HOOK = "@kpt.hookimpl\ndef kpt_passes():\n"

#: name -> (source, state, what the reason says)
HOSTILE: dict[str, tuple[str, str, str]] = {
    "raises": ("raise RuntimeError('boom')", "broken", "RuntimeError: boom"),
    "exits": ("import sys; sys.exit('usage: nothing')", "broken", "SystemExit: usage: nothing"),
    "library": (
        "import ctypes; ctypes.CDLL('libnot-there-42.so')",
        "broken",
        "OSError: libnot-there-42.so",
    ),
    "dependency": ("import not_there_42", "broken", "No module named 'not_there_42'"),
    "syntax": ("def broken(:", "broken", "SyntaxError"),
    "own-base": (
        "class Odd(BaseException):\n    def __str__(self): raise ValueError\nraise Odd",
        "broken",
        "Odd",
    ),
    "generator-exit": ("raise GeneratorExit", "broken", "GeneratorExit"),
    "misspelt": ("@kpt.hookimpl\ndef kpt_pases():\n    return []", "invalid", "did you mean 'kpt_passes'?"),
    "unmarked": ("def kpt_passes():\n    return []", "invalid", "not marked with @kpt.hookimpl"),
    "unmarked-misspelt": ("def kpt_kernel():\n    return []", "invalid", "did you mean 'kpt_kernels'?"),
    "argument": (
        "@kpt.hookimpl\ndef kpt_passes(observation):\n    return []",
        "invalid",
        "kpt_passes(observation)",
    ),
    "wrapper": (
        "@kpt.hookimpl(wrapper=True)\ndef kpt_passes():\n    return (yield)",
        "invalid",
        "hook wrapper",
    ),
    "empty": ("x = 1", "invalid", "no function that is marked"),
    "raises-in-hook": (HOOK + "    raise SystemExit(2)", "broken", "kpt_passes raised SystemExit: 2"),
    "raises-midway": (
        HOOK + "    yield PassSpec('p', 'layout', 'math:sqrt')\n    raise KeyError('x')",
        "broken",
        "kpt_passes raised KeyError",
    ),
    "none": (HOOK + "    pass", "invalid", "returned NoneType; expected an iterable of PassSpec"),
    "one": (HOOK + "    return PassSpec('p', 'layout', 'math:sqrt')", "invalid", "return a list of PassSpec"),
    "dict": (HOOK + "    return {'p': 1}", "invalid", "returned dict"),
    "strings": (HOOK + "    return ['p']", "invalid", "returned a str; expected PassSpec"),
    "wrong-spec": (HOOK + "    return [OpSpec('o', '()', 'math:sqrt')]", "invalid", "returned a OpSpec"),
    "coroutine": (
        "@kpt.hookimpl\nasync def kpt_passes():\n    return []",
        "invalid",
        "coroutine",
    ),
    "endless": (
        HOOK + "    i = 0\n    while True:\n        i += 1\n        yield PassSpec(f'p{i}', 'layout', 'a:b')",
        "invalid",
        "more than 10000 specs",
    ),
    "phase": (HOOK + "    yield PassSpec('p', 'layuot', 'math:sqrt')", "invalid", "did you mean 'layout'?"),
    "level": (
        HOOK + "    yield PassSpec('p', 'layout', 'math:sqrt', level='safe')",
        "invalid",
        "level='safe': known are exact, production, aggressive",
    ),
    "mode": (
        HOOK + "    yield PassSpec('p', 'layout', 'math:sqrt', modes=('train',))",
        "invalid",
        "did you mean 'training'?",
    ),
    "modes-string": (
        HOOK + "    yield PassSpec('p', 'layout', 'math:sqrt', modes='training')",
        "invalid",
        "write ('training',)",
    ),
    "reference": (HOOK + "    yield PassSpec('p', 'layout', 'math.sqrt')", "invalid", "module:attribute"),
    "spec-name": (HOOK + "    yield PassSpec('a b', 'layout', 'math:sqrt')", "invalid", "is not a name"),
    "priority": (
        HOOK + "    yield PassSpec('p', 'layout', 'math:sqrt', priority='high')",
        "invalid",
        "not an integer",
    ),
    "dtype": (
        "@kpt.hookimpl\ndef kpt_precision_policies():\n    yield PolicySpec('p', 'math:sqrt', 'bf16')",
        "invalid",
        "did you mean 'bfloat16'?",
    ),
    "cycle": (
        HOOK + "    yield PassSpec('p', 'layout', 'a:b', provides=('x',), requires=('y',))\n"
        "    yield PassSpec('q', 'layout', 'a:b', provides=('y',), requires=('x',))",
        "invalid",
        "passes require each other",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_plugin_is_named_and_the_others_keep_working(install, name):
    source, state, reason = HOSTILE[name]
    install(f"kpt-plugin-{name}", source, plugin=name)
    install("kpt-plugin-good", plugin="good")
    found = registry()
    assert found.status("good").state == "ok"
    assert [entry.spec.name for entry in found.specs("kpt_passes")] == ["good.pass"]
    status = found.status(name)
    assert status.state == state
    assert reason in status.reason
    assert (status.distribution, status.version) == (f"kpt-plugin-{name}", "1.0")
    assert status.mend.startswith(("pip install", "export"))
    assert set(found.fingerprint()) == {"good"}
    with pytest.raises(PluginError) as caught:
        registry([name])
    assert caught.value.mend == status.mend


def test_all_of_them_at_once(install):
    for name, (source, _, _) in HOSTILE.items():
        install(f"kpt-plugin-{name}", source, plugin=name)
    install("kpt-plugin-good", plugin="good")
    found = registry()
    assert {status.name: status.state for status in found.statuses} == {
        "good": "ok",
        **{name: state for name, (_, state, _) in HOSTILE.items()},
    }


def test_an_entry_point_that_names_nothing_or_a_class(install):
    install("kpt-plugin-gone", plugin="gone", entry="kpt_plugin_gone:missing")
    install("kpt-plugin-class", "class Plugin:\n    pass", plugin="class", entry="kpt_plugin_class:Plugin")
    found = registry()
    assert found.status("gone").state == "broken" and "missing" in found.status("gone").reason
    assert found.status("class").state == "invalid" and "class Plugin" in found.status("class").reason


def test_a_hook_that_raises_loses_only_its_own_specs(install):
    install(
        "kpt-plugin-half",
        """
        @kpt.hookimpl
        def kpt_kernels():
            raise OSError("libgone.so: cannot open shared object file")

        @kpt.hookimpl
        def kpt_passes():
            return [PassSpec('half.pass', 'layout', 'math:sqrt')]
        """,
        plugin="half",
    )
    found = registry(["half"])
    status = found.status("half")
    assert (status.state, status.hooks) == ("broken", ("kpt_passes",))
    assert "kpt_kernels raised OSError: libgone.so" in status.reason
    assert found.specs("kpt_passes") and not found.specs("kpt_kernels")


def test_keyboard_interrupt_is_the_users_and_says_whose_code_it_ended(install, caplog):
    install("kpt-plugin-slow", "raise KeyboardInterrupt", plugin="slow")
    with pytest.raises(KeyboardInterrupt):
        registry()
    assert "Interrupted while slow (kpt-plugin-slow 1.0) was loaded" in caplog.text
    assert "KPT_DISABLE_PLUGINS=slow" in caplog.text


def test_of_two_plugins_with_one_name_the_one_named_after_it_stays(install):
    install("a-stranger", "raise RuntimeError('must not run')", plugin="good")
    install("kpt-plugin-good", plugin="good")
    found = registry()
    by_distribution = {status.distribution: status for status in found.statuses}
    assert by_distribution["kpt-plugin-good"].state == "ok"
    conflict = by_distribution["a-stranger"]
    assert conflict.state == "conflict"
    assert "a-stranger" in conflict.reason and "kpt-plugin-good" in conflict.reason
    assert conflict.mend == "pip uninstall a-stranger"
    assert found.status("good").state == "ok"


def test_a_disabled_or_incompatible_plugin_claims_no_name(install, monkeypatch):
    install("a-stranger", plugin="good", requires=("kpt-core>=99",))
    install("other-stranger", plugin="good")
    found = registry()
    assert {status.distribution: status.state for status in found.statuses} == {
        "a-stranger": "incompatible",
        "other-stranger": "ok",
    }


def test_a_spec_name_that_is_taken_is_a_conflict_and_only_that_spec_is_lost(install):
    install("kpt-plugin-aaa", plugin="aaa")
    install(
        "kpt-plugin-bbb",
        """
        @kpt.hookimpl
        def kpt_passes():
            yield PassSpec('aaa.pass', 'runtime', 'os:getcwd')
            yield PassSpec('bbb.pass', 'runtime', 'os:getcwd')
        """,
        plugin="bbb",
    )
    found = registry()
    assert found.status("aaa").state == "ok"
    status = found.status("bbb")
    assert status.state == "conflict"
    assert "kpt-plugin-aaa" in status.reason and "kpt-plugin-bbb" in status.reason
    assert [(entry.spec.name, entry.plugin) for entry in found.specs("kpt_passes")] == [
        ("aaa.pass", "aaa"),
        ("bbb.pass", "bbb"),
    ]


def test_a_pass_and_a_policy_may_not_share_a_name(install):
    install("kpt-plugin-good", plugin="good")
    install(
        "kpt-plugin-policy",
        "@kpt.hookimpl\ndef kpt_precision_policies():\n"
        "    yield PolicySpec('good.pass', 'math:sqrt', 'bfloat16')",
        plugin="policy",
    )
    assert registry().status("policy").state == "conflict"


def test_kernels_are_unique_by_op_and_name():
    class Kernels:
        @kpt.hookimpl
        def kpt_kernels(self):
            yield KernelSpec("linear", "fast", "math:sqrt")
            yield KernelSpec("softmax", "fast", "math:sqrt")
            yield KernelSpec("linear", "fast", "math:sin")

    found = registry([Kernels()])
    assert [(entry.spec.op, entry.spec.entry) for entry in found.specs("kpt_kernels")] == [
        ("linear", "math:sqrt"),
        ("softmax", "math:sqrt"),
    ]
    assert found.statuses[-1].state == "conflict"


def test_a_cycle_across_plugins_costs_the_one_that_closes_it(install):
    install(
        "kpt-plugin-aaa",
        HOOK + "    yield PassSpec('a', 'layout', 'a:b', provides=('x',), requires=('y',))",
        plugin="aaa",
    )
    install(
        "kpt-plugin-bbb",
        HOOK + "    yield PassSpec('b', 'layout', 'a:b', provides=('y',), requires=('x',))\n"
        "    yield PassSpec('c', 'runtime', 'a:b', provides=('y',), requires=('x',))",
        plugin="bbb",
    )
    found = registry()
    assert found.status("aaa").state == "ok"
    assert found.status("bbb").state == "invalid"
    assert [entry.spec.name for entry in found.specs("kpt_passes")] == ["a", "c"]


def test_inline_objects_that_offer_nothing_usable_are_errors():
    class Misspelt:
        @kpt.hookimpl
        def kpt_pass(self):
            return []

    with pytest.raises(PluginError, match="did you mean 'kpt_passes'"):
        registry([Misspelt()])
    assert registry([Misspelt()], strict=False).statuses[-1].state == "invalid"


def test_an_inline_object_whose_mark_is_on_a_wrapper_is_told_where_it_belongs():
    class Wrapped:
        @kpt.hookimpl
        @staticmethod
        def kpt_passes():
            return []

    with pytest.raises(PluginError, match="put @kpt.hookimpl right above the def"):
        registry([Wrapped()])


def test_an_inline_object_that_raises_when_it_is_looked_at_is_named():
    class Raises:
        def __getattr__(self, name):
            raise ZeroDivisionError(name)

    with pytest.raises(PluginError, match="'inline:Raises' is invalid"):
        registry([Raises()])


def test_a_lazily_loading_module_stays_unloaded(install):
    install(
        "kpt-plugin-lazy",
        """
        def __dir__():
            return ["heavy", "kpt_passes"]

        def __getattr__(name):
            raise RuntimeError(f"{name} was loaded")

        @kpt.hookimpl
        def kpt_passes():
            return [PassSpec('lazy.pass', 'layout', 'math:sqrt')]
        """,
        plugin="lazy",
    )
    assert registry().status("lazy").state == "ok"


def test_references_name_what_is_wrong(install):
    install("kpt-plugin-parts", "class Part: pass\ndef bad(): raise SystemExit(1)", plugin="parts")
    assert load("math:sqrt")(4) == 2
    assert load("os:path.join")("a", "b") == "a/b"
    assert type(instantiate("kpt_plugin_parts:Part")).__name__ == "Part"
    for reference, reason in [
        ("math.sqrt", "is not a reference"),
        ("math:squirt", "no attribute 'squirt'"),
        ("not_there_42:x", "No module named"),
    ]:
        with pytest.raises(PluginError, match=reason) as caught:
            load(reference)
        assert reference in str(caught.value)


def test_every_field_of_every_spec_has_a_rule():
    from dataclasses import MISSING, fields

    from kpt.plugins.validation import field_fault
    from kpt.specs import SPEC_TYPES

    for spec in SPEC_TYPES.values():
        for entry in fields(spec):
            value = "a:b" if entry.default is MISSING else entry.default
            field_fault(entry.name, str(entry.type), value)


def test_what_names_a_behaviour_has_to_be_a_reference():
    from kpt.plugins.validation import spec_faults
    from kpt.specs import KernelSpec

    for name in ("entry", "supports", "setup", "predict", "tuner"):
        spec = KernelSpec(**{"op": "rope", "name": "mine.rope", "entry": "a:b", name: "tune"})
        assert list(spec_faults(spec)) == [f"{name}='tune' is not of the form 'package.module:attribute'"]


def test_the_nearest_choice_is_offered():
    class Odd:
        @kpt.hookimpl
        def kpt_passes(self):
            return [PassSpec("p", "kernel", "a:b")]  # type: ignore[arg-type]

    status = registry([Odd()], strict=False).statuses[-1]
    assert "did you mean 'kernels'?" in status.reason
