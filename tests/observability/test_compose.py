"""docker-compose.yaml, as far as it can be checked without Docker: nothing here starts a container."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from kserve_vllm.cli import command as cli
from kserve_vllm.engine.arguments import parse_engine_args
from tests.observability.test_queries import DASHBOARDS
from tests.support import ROOT

TREE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
SERVICES: dict[str, Any] = TREE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_it_holds_runtime_prometheus_grafana_and_redis() -> None:
    assert set(SERVICES) == {"runtime", "prometheus", "grafana", "redis"}
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", service["image"]), f"{name}: no pinned version"


def test_the_runtimes_target_exists_and_its_arguments_are_taken() -> None:
    target = SERVICES["runtime"]["build"]["target"]
    assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE, flags=re.M)
    match = re.fullmatch(r"\$\{MODEL:-(.+)\}", SERVICES["runtime"]["command"])
    assert match
    # The image's entry point ends with `serve`.
    assert DOCKERFILE.count('ENTRYPOINT ["kserve-vllm", "serve"]') == 2
    parse_engine_args(cli.resolve(match[1].split(), {}).engine_argv())
    assert SERVICES["runtime"]["ports"] == ["8080:8080", "8081:8081"]


def test_the_runtime_has_time_to_drain() -> None:
    grace = int(SERVICES["runtime"]["stop_grace_period"].removesuffix("s"))
    assert grace > cli.resolve(["m"], {}).lifecycle.drain_timeout


def test_what_is_mounted_is_there_and_what_is_named_is_declared() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            assert any((ROOT / volume.split(":")[0]).iterdir())
        for config in service.get("configs", []):
            assert config["source"] in TREE["configs"]
        for other in service.get("depends_on", []):
            assert other in SERVICES


def test_prometheus_takes_its_configuration(promtool: str, tmp_path: Path) -> None:
    text = TREE["configs"]["prometheus"]["content"]
    config = yaml.safe_load(text)
    (folder,) = (volume.split(":") for volume in SERVICES["prometheus"]["volumes"])
    assert config["rule_files"] == [f"{folder[1]}/*.yaml"]
    (job,) = config["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["runtime:8080"]
    (tmp_path / "prometheus.yml").write_text(text.replace(folder[1], str(ROOT / folder[0])))
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(list((ROOT / folder[0]).glob('*.yaml')))} rule files found" in done.stdout


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    (source,) = yaml.safe_load(TREE["configs"]["grafana-datasource"]["content"])["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(TREE["configs"]["grafana-dashboards"]["content"])["providers"]
    (folder,) = (volume.split(":") for volume in SERVICES["grafana"]["volumes"])
    assert provider["options"]["path"] == folder[1]
    assert (ROOT / folder[0]).samefile(DASHBOARDS[0].parent)
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DASHBOARDS[0].parent / Path(home).name).exists()
