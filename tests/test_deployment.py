"""The deployment example: it parses, fits together, and names what the code and the pins name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from greenroom.cli.serve_config import ServeConfig
from greenroom.cli.serve_ray import check_settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "deploy"


def documents() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            found[document["kind"]] = document
    return found


def pod_specs() -> list[dict[str, Any]]:
    cluster, deployment = documents()["RayCluster"]["spec"], documents()["Deployment"]["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups] + [deployment["template"]["spec"]]


def test_every_pod_runs_our_image_and_reads_the_repertoire() -> None:
    claim = documents()["PersistentVolumeClaim"]["metadata"]["name"]
    for pod in pod_specs():
        (container,) = pod["containers"]
        assert container["image"] == "greenroom:latest"
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["repertoire"] == "/repertoire"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["repertoire"]["persistentVolumeClaim"]["claimName"] == claim
    assert documents()["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_cluster_runs_the_pinned_ray() -> None:
    cluster = documents()["RayCluster"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_served_configuration_is_one_that_serve_takes_on_ray() -> None:
    text = documents()["ConfigMap"]["data"]["serve.toml"]
    config = ServeConfig.model_validate(tomllib.loads(text))
    check_settings(config)
    assert config.ray.enabled
    (workers,) = documents()["RayCluster"]["spec"]["workerGroupSpecs"]
    assert config.ray.max_replicas == workers["maxReplicas"]
    assert str(config.engine.threads) == workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert config.ray.address == f"ray://{documents()['RayCluster']['metadata']['name']}-head-svc:10001"


def test_the_service_leads_to_the_ports_of_the_head() -> None:
    cluster, service = documents()["RayCluster"]["spec"], documents()["Service"]["spec"]
    head = cluster["headGroupSpec"]["template"]
    assert service["selector"].items() <= head["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in head["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == {"grpc": 50051, "http": 8000}
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)


COPIED = re.findall(r"^COPY (.*) \S+$", (FOLDER / "Containerfile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", COPIED)
def test_what_the_image_copies_is_there(name: str) -> None:
    assert [word for word in name.split() if not (ROOT / word).exists()] == []
