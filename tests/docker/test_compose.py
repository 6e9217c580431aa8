"""docker/compose.yaml: what Compose allows, settings the server takes, files and addresses that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from deployed import server_settings
from fake_engine import FakeEngine, serving
from scraped import scrape

DOCKER = Path(__file__).parents[2] / "docker"
FILES = ("compose.yaml", "compose.gpu.yaml")
NO_VARIABLES: dict[str, str] = {}


def interpolated(value: Any, variables: dict[str, str]) -> Any:
    """`value` with its ${NAME:-default} filled in; other forms are not used."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    filled = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], value)
    assert "$" not in filled
    return filled


def compose(variables: dict[str, str] = NO_VARIABLES) -> dict[str, Any]:
    return interpolated(yaml.safe_load((DOCKER / "compose.yaml").read_text()), variables)


def checked(file: Path) -> tuple[int, str]:
    """Exit status and output of a check by the schema that Compose itself uses."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("file", FILES)
def test_follows_the_schema_of_compose(file: str) -> None:
    status, said = checked(DOCKER / file)
    assert status == 0, said


def test_the_schema_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    services = {"server": {"image": "gqa-serve:cpu", "read_olny": True}}
    (wrong := tmp_path / "compose.yaml").write_text(yaml.safe_dump({"services": services}))
    status, said = checked(wrong)
    assert status == 1
    assert "read_olny" in said


def test_without_a_setting_of_mine_the_server_starts() -> None:
    server = compose()["services"]["server"]
    engine, config = server_settings(server["command"], server["environment"])
    assert engine.model
    assert config.api_key == ()
    engine, config = server_settings(
        *(compose({"MODEL": "./my", "GQA_SERVE_API_KEY": "a,b"})["services"]["server"][key]
          for key in ("command", "environment"))
    )  # fmt: skip
    assert engine.model == "./my"
    assert config.api_key == ("a", "b")
    grace_s = float(server["stop_grace_period"].removesuffix("s"))
    assert grace_s > config.drain_timeout + 10


@pytest.mark.parametrize("key", ["", "sk-one"])
def test_prometheus_may_read_the_metrics_and_a_web_page_may_not_call(key: str) -> None:
    server = compose({"GQA_SERVE_API_KEY": key})["services"]["server"]
    config = server_settings(server["command"], server["environment"])[1]
    settings = {name: getattr(config, name) for name in ("allowed_hosts", "api_key", "open_metrics")}
    prometheus = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    ((target,),) = (one["targets"] for job in prometheus["scrape_configs"] for one in job["static_configs"])
    with serving(FakeEngine(), **settings) as served:
        assert scrape(served.url, headers={"Host": target}).get("engine_state", state="ready") == 1
        mine = httpx2.get(f"{served.url}/v1/models", headers={"Host": "127.0.0.1:8000"})
        assert mine.status_code == (401 if key else 200)
        rebound = httpx2.get(f"{served.url}/metrics", headers={"Host": "attacker.example:8000"})
        assert rebound.status_code == 403


def test_only_this_machine_reaches_the_ports() -> None:
    services = compose()["services"]
    ports = {name: service["ports"] for name, service in services.items()}
    assert all(port.startswith("127.0.0.1:") for (port,) in ports.values()), ports
    inside = {name: int(port.rpartition(":")[2]) for name, (port,) in ports.items()}
    assert f"EXPOSE {inside['server']}\n" in (DOCKER / "Dockerfile.cpu").read_text()
    prometheus = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{inside['server']}"]}]
    (source,) = yaml.safe_load((DOCKER / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{inside['prometheus']}"
    assert source["isDefault"]  # what the dashboard's variable begins with
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


def test_what_is_mounted_is_there_and_where_it_is_looked_for() -> None:
    mounts: dict[str, dict[str, Path]] = {}
    documents = compose()
    for name, service in documents["services"].items():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if not source.startswith("."):
                assert source in documents["volumes"]
                continue
            assert mode == ["ro"]
            assert (DOCKER / source).is_file(), volume
            mounts.setdefault(name, {})[target] = DOCKER / source
    grafana, prometheus = (documents["services"][name] for name in ("grafana", "prometheus"))
    (provider,) = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"] + "/")
    assert json.loads(mounts["grafana"][home].read_text())["uid"] == "gqa-serve"
    (option,) = [word for word in prometheus["command"] if word.startswith("--config.file=")]
    settings = option.partition("=")[2]
    rules = yaml.safe_load(mounts["prometheus"][settings].read_text())["rule_files"]
    assert [str(Path(settings).parent / rule) in mounts["prometheus"] for rule in rules] == [True]


@pytest.mark.parametrize("file", FILES)
def test_images_are_pinned_or_built_here(file: str) -> None:
    for service in yaml.safe_load((DOCKER / file).read_text())["services"].values():
        if dockerfile := service.get("build", {}).get("dockerfile"):
            assert (DOCKER.parent / dockerfile).is_file()
            assert f"-t {service['image']} " in (DOCKER.parent / dockerfile).read_text()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


def test_the_server_has_no_more_rights_than_it_needs() -> None:
    server = compose()["services"]["server"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    declared = set(re.findall(r"(?m)^VOLUME (\S+)$", (DOCKER / "Dockerfile.cpu").read_text()))
    assert {volume.partition(":")[2] for volume in server["volumes"]} == declared
    own = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]["server"]
    both = [volume.partition(":")[2] for volume in (*server["volumes"], *own["volumes"])]
    assert f"VOLUME {json.dumps(both)}\n" in (DOCKER / "Dockerfile.cuda").read_text()


def test_prometheus_takes_its_files(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    for path in (DOCKER / "prometheus.yaml", DOCKER.parent / "docs" / "grafana" / "alerts.yaml"):
        shutil.copy(path, tmp_path)
    result = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
