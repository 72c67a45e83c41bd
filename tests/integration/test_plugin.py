"""The name LRQK in every process, and nothing for those who do not choose it."""

import pickle
import subprocess
import sys

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_lrqk.integration import compat
from vllm_lrqk.plugin import register


def run_python(code, **environment):
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip().splitlines()[-1]


def test_registers_once_however_often_it_is_called():
    register()
    member = AttentionBackendEnum["LRQK"]
    register()
    assert AttentionBackendEnum["LRQK"] is member
    assert member.get_class().__name__ == "LRQKBackend"


def test_the_hooks_are_wrapped_once():
    from vllm.platforms import current_platform

    register()
    before = (
        type(current_platform).check_and_update_config.__func__,
        type(current_platform).get_attn_backend_cls.__func__,
    )
    register()
    after = (
        type(current_platform).check_and_update_config.__func__,
        type(current_platform).get_attn_backend_cls.__func__,
    )
    assert before == after


def test_members_unpickle_in_a_process_that_has_not_registered_them():
    register()
    data = pickle.dumps({"backend": AttentionBackendEnum["LRQK"]})
    code = f"import pickle; print(pickle.loads({data!r})['backend'].name)"
    assert run_python(code, VLLM_PLUGINS="") == "LRQK"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_members_reach_child_processes(method):
    code = f"""
import multiprocessing
from vllm_lrqk.plugin import register
def child(queue, backend):
    queue.put(backend.get_class().get_name())
if __name__ == "__main__":
    register()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, AttentionBackendEnum["LRQK"]))
    process.start()
    print(queue.get(timeout=120))
    process.join()
"""
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        result = subprocess.run([sys.executable, script.name], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip().splitlines()[-1] == "LRQK", result.stderr[-2000:]


LOADED = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("LRQK" in AttentionBackendEnum.__members__)
"""


def test_discovered_through_the_entry_point():
    assert run_python(LOADED) == "True"
    assert run_python(LOADED, VLLM_PLUGINS="lrqk") == "True"


def test_filtered_out_by_vllm_plugins():
    assert run_python(LOADED, VLLM_PLUGINS="another") == "False"


def test_loading_the_plugin_is_light():
    code = (
        "import sys; import vllm.platforms, vllm.v1.attention.backends.registry; before = set(sys.modules); "
        "from vllm_lrqk.plugin import register; register(); new = set(sys.modules) - before; "
        "print([m for m in new if m.startswith('vllm_lrqk.')])"
    )
    assert sorted(eval(run_python(code))) == [
        "vllm_lrqk.integration",
        "vllm_lrqk.integration.compat",
        "vllm_lrqk.methods",
        "vllm_lrqk.names",
        "vllm_lrqk.plugin",
    ]


def test_an_old_vllm_is_told_and_left_alone(monkeypatch):
    said = []
    monkeypatch.setattr(compat, "vllm_version", lambda: (0, 31))
    monkeypatch.setattr(compat, "register_backend", lambda *a: said.append("registered"))
    monkeypatch.setattr(
        compat, "logger", lambda name: type("L", (), {"warning": lambda self, *a: said.append(a[1:])})()
    )
    register()
    assert said == [("0.32", "0.31")]
