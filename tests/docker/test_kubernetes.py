"""docker/k8s: what Kubernetes allows, flags the server has, metrics it exports, times that fit together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import jsonpatch
import kubernetes_validate
import pytest
import yaml
from deployed import server_settings
from fake_engine import FakeEngine, serving
from scraped import scrape

from gqa_serve.config import EngineConfig, ServerConfig

DOCKER = Path(__file__).parents[2] / "docker"
K8S = DOCKER / "k8s"
VARIANTS = ("cpu", "gpu")
VERSIONS = ("1.30", "1.37")  # the first with `preStop.sleep`; the last whose schemas we have

Objects = dict[str, dict[str, Any]]


def objects(variant: str) -> Objects:
    """By kind, what `kubectl kustomize` makes of a variant; not every field of it is known here."""
    kustomization = yaml.safe_load((K8S / variant / "kustomization.yaml").read_text())
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "images", "patches"}
    found: Objects = {}
    for resource in kustomization["resources"]:
        if (K8S / variant / resource).is_dir():
            found |= objects(Path(resource).name)
        else:
            one = yaml.safe_load((K8S / variant / resource).read_text())
            found[one["kind"]] = one
    for patch in kustomization.get("patches", ()):
        target = found[patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        found[target["kind"]] = jsonpatch.apply_patch(target, yaml.safe_load(patch["patch"]))
    for image in kustomization.get("images", ()):
        (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
        name = container["image"].partition(":")[0]
        assert image["name"] == name
        container["image"] = f"{name}:{image['newTag']}"
    return found


def pod(variant: str) -> dict[str, Any]:
    return objects(variant)["Deployment"]["spec"]["template"]


def container(variant: str) -> dict[str, Any]:
    (only,) = pod(variant)["spec"]["containers"]
    return only


def settings(variant: str) -> tuple[EngineConfig, ServerConfig]:
    environ = {one["name"]: one.get("value", "") for one in container(variant).get("env", ())}
    return server_settings(container(variant)["args"], environ)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_the_schemas_of_kubernetes(variant: str, version: str) -> None:
    kinds = objects(variant)
    assert set(kinds) == {
        "Deployment", "Service", "PersistentVolumeClaim", "HorizontalPodAutoscaler", "PodDisruptionBudget",
    }  # fmt: skip
    for manifest in kinds.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    wrong = objects("cpu")["Deployment"]
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_volumes_and_ports_fit_together(variant: str) -> None:
    kinds = objects(variant)
    labels = pod(variant)["metadata"]["labels"]
    assert kinds["Service"]["spec"]["selector"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert kinds[kind]["spec"]["selector"]["matchLabels"] == labels
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", kinds["Deployment"]["metadata"]["name"])
    assert "replicas" not in kinds["Deployment"]["spec"]  # or each `apply` would undo the autoscaler
    volumes = {volume["name"]: volume for volume in pod(variant)["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(variant)["volumeMounts"]}
    assert set(volumes) == set(mounts)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == kinds["PersistentVolumeClaim"]["metadata"]["name"]
    ((port,), (outside,)) = container(variant)["ports"], kinds["Service"]["spec"]["ports"]
    assert outside["targetPort"] == port["name"]
    dockerfile = (DOCKER / f"Dockerfile.{'cuda' if variant == 'gpu' else 'cpu'}").read_text()
    assert f"EXPOSE {port['containerPort']}\n" in dockerfile
    assert pod(variant)["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])
    declared = re.findall(r"/\w+", re.findall(r"(?m)^VOLUME (.*)$", dockerfile)[0])
    assert set(declared) <= set(mounts.values())
    assert f"-t {container(variant)['image']} " in dockerfile


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_server_takes_its_flags_and_finds_its_keys(variant: str) -> None:
    engine, server = settings(variant)
    assert engine.model
    keys = Path(server.api_key_file or "")
    volumes = {volume["name"]: volume for volume in pod(variant)["spec"]["volumes"]}
    (mount,) = (m for m in container(variant)["volumeMounts"] if m["mountPath"] == str(keys.parent))
    assert [item["path"] for item in volumes[mount["name"]]["secret"]["items"]] == [keys.name]
    gpus = container(variant)["resources"]["limits"].get("nvidia.com/gpu", "1")
    assert engine.tensor_parallel_size == int(gpus)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rights_and_nothing_written_but_to_volumes(variant: str) -> None:
    spec = pod(variant)["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    user = (DOCKER / "Dockerfile.cpu").read_text().partition("USER ")[2].split()[0]
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        assert str(spec["securityContext"][name]) in user.split(":")
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(variant)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not spec["automountServiceAccountToken"]
    assert "/tmp" in {mount["mountPath"] for mount in container(variant)["volumeMounts"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pod_has_the_time_it_needs_to_stop(variant: str) -> None:
    before_s = container(variant)["lifecycle"]["preStop"]["sleep"]["seconds"]
    after_s = settings(variant)[1].drain_timeout + 10  # docs/operation.md, Stopping
    assert pod(variant)["spec"]["terminationGracePeriodSeconds"] > before_s + after_s
    assert pod(variant)["spec"]["enableServiceLinks"] is False


def test_probes_and_prometheus_ask_for_what_there_is() -> None:
    """As the kubelet and Prometheus call: by the pod's address, without a key."""
    own = container("cpu")
    paths = {name: own[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/ready", "liveness": "/health"}
    config = settings("cpu")[1]
    engine = FakeEngine()
    with serving(engine, api_key=("sk",), open_metrics=config.open_metrics, allowed_hosts=()) as server:

        def get(path: str) -> int:
            return httpx2.get(server.url + path, headers={"Host": "10.1.2.3:8000"}).status_code

        annotations = pod("cpu")["metadata"]["annotations"]
        assert [get(path) for path in (*paths.values(), annotations["prometheus.io/path"])] == [200] * 4
        assert get("/v1/models") == 401
        engine.state = "stopping"  # finishes its last requests: no reason to restart it
        assert [get(path) for path in paths.values()] == [200, 503, 200]
        engine.state = "loading"
        assert [get(path) for path in paths.values()] == [503, 503, 503]


def test_the_autoscaler_asks_for_metrics_that_the_server_exports() -> None:
    rules = yaml.safe_load((K8S / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    with serving(FakeEngine()) as server:
        exported = set(scrape(server.url).families)
    made = {}
    for rule in rules:
        source = rule["seriesQuery"].partition("{")[0]
        assert source in exported
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        query = rule["metricsQuery"].replace("<<.Series>>", source)
        assert query.count("<<.LabelMatchers>>") == query.count("<<.GroupBy>>") == 1
        made[rule["name"]["as"]] = {
            name for name in exported if re.search(rf"\b{name}\b", query) or _selected(query, name)
        }
    assert made["gqa_serve_num_requests_outstanding"] == {
        "gqa_serve_num_requests_running", "gqa_serve_num_requests_waiting",
    }  # fmt: skip
    for variant in VARIANTS:
        spec = objects(variant)["HorizontalPodAutoscaler"]["spec"]
        assert {one["pods"]["metric"]["name"] for one in spec["metrics"]} == set(made)
        requests, cache = (one["pods"]["target"]["averageValue"] for one in spec["metrics"])
        assert int(requests) == settings(variant)[0].max_num_seqs * 3 / 4
        assert cache.endswith("m")
        assert 0 < int(cache[:-1]) < 1000


def _selected(query: str, name: str) -> bool:
    """Whether a matcher of `__name__` in a query selects a metric."""
    matchers = re.findall(r'__name__=~("[^"]*")', query)
    return any(re.fullmatch(json.loads(matcher), name) for matcher in matchers)
