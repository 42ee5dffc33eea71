"""What deploy/ starts: Kubernetes' manifests, Compose's files, HAProxy's configuration."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.config import PROJECT_ROOT, Settings
from app.core.metrics import Metrics
from tests.contract.test_openapi import routes
from tests.contract.test_prometheus import collectors, metric_names, needs_promtool, promtool
from tests.support.replicas import CONFIG, needs_haproxy
from tests.support.service import is_setting, setting_names

DEPLOY = PROJECT_ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("base", "keda")
FOLDERS = (*OVERLAYS, "redis")
COMPOSE = ("compose.yml", "compose.scale.yml")
# Kinds that Kubernetes itself does not have.
ADDED = {"Kustomization", "Component", "ScaledObject"}

needs_schemas = pytest.mark.skipif(
    not importlib.util.find_spec("kubernetes_validate"), reason="needs kubernetes-validate"
)
needs_redis = pytest.mark.skipif(
    not shutil.which("redis-server"), reason="needs Debian's package redis-server"
)
needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="needs kubectl, which has kustomize"
)


def documents(file: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def manifests() -> dict[str, dict[str, Any]]:
    """Every manifest, as ``Deployment/llm-service``; Kustomizations as their folder."""
    found = {}
    for file in KUBERNETES.glob("*/*.yaml"):
        for document in documents(file):
            kind, name = document["kind"], document.get("metadata", {}).get("name")
            found[f"{kind}/{name}" if name else file.parent.name] = document
    return found


def validate(objects: list[dict[str, Any]], folder: Path) -> None:
    """Have kubernetes-validate read Kubernetes' own objects, unknown members being faults."""
    file = folder / "objects.yaml"
    known = [o for o in objects if o["kind"] not in ADDED]
    file.write_text(yaml.safe_dump_all(known), encoding="utf-8")
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed ") == len(known), done.stdout + done.stderr


# --- Kubernetes -----------------------------------------------------------------------------------


@needs_schemas
def test_kubernetes_accepts_the_manifests(tmp_path: Path) -> None:
    """Each manifest has the members of its kind, and no others."""
    validate(list(manifests().values()), tmp_path)


@needs_schemas
@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_what_kubernetes_accepts(overlay: str, tmp_path: Path) -> None:
    """The base and the overlay are built; with KEDA nothing else sets the number of pods."""
    command = ["kubectl", "kustomize", str(KUBERNETES / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    validate(objects, tmp_path)
    by_kind = {o["kind"]: o for o in objects}
    assert ("replicas" in by_kind["Deployment"]["spec"]) is ("ScaledObject" not in by_kind)
    (container,) = by_kind["Deployment"]["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"] for variable in container["env"]}
    assert {name for name in environment if is_setting(name)} <= setting_names().keys()


def test_every_manifest_is_used() -> None:
    """The Kustomizations name each file beside them."""
    for name in FOLDERS:
        folder, kustomization = KUBERNETES / name, manifests()[name]
        paths = [*kustomization["resources"], *kustomization.get("components", ())]
        named = {(folder / path).resolve() for path in paths}
        assert named >= {f for f in folder.glob("*.yaml") if f.name != "kustomization.yaml"}
        assert all(path.exists() for path in named)


def test_every_selector_selects_the_pods() -> None:
    """Service, budget, network policy and Deployment select the label that the pods have."""
    found = manifests()
    label = {"app.kubernetes.io/name": "llm-service"}
    pods = found["Deployment/llm-service"]["spec"]["template"]
    (spread,) = pods["spec"]["topologySpreadConstraints"]
    assert pods["metadata"]["labels"] == label
    assert found["Service/llm-service"]["spec"]["selector"] == label
    assert found["NetworkPolicy/llm-service"]["spec"]["podSelector"]["matchLabels"] == label
    for selects in (
        found["Deployment/llm-service"]["spec"],
        found["PodDisruptionBudget/llm-service"]["spec"],
        spread,
    ):
        assert selects.get("selector", selects.get("labelSelector"))["matchLabels"] == label
    assert found["ScaledObject/llm-service"]["spec"]["scaleTargetRef"] == {"name": "llm-service"}


@pytest.mark.parametrize("name", ["Deployment/llm-service", "StatefulSet/llm-redis"])
def test_the_pods_are_hardened(name: str) -> None:
    """No root, no rights, no writable image."""
    pod = manifests()[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_pods_end_in_time() -> None:
    """There is no preStop hook; the notice is within the grace, for which Kubernetes waits."""
    pod = manifests()["Deployment/llm-service"]["spec"]["template"]["spec"]
    assert "lifecycle" not in pod["containers"][0]
    grace = Settings(_env_file=None).app.shutdown_grace_seconds
    assert float(variables()["APP__SHUTDOWN_NOTICE_SECONDS"]) < grace
    assert pod["terminationGracePeriodSeconds"] > grace


def test_the_probes_ask_for_routes_that_exist() -> None:
    """Start and life are asked of /livez, readiness of /readyz."""
    (container,) = manifests()["Deployment/llm-service"]["spec"]["template"]["spec"]["containers"]
    probes = {name: p["httpGet"]["path"] for name, p in container.items() if "Probe" in name}
    assert probes == {
        "startupProbe": "/livez",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    assert {f"GET {path}" for path in probes.values()} <= routes()


def variables() -> dict[str, str]:
    """The environment that the base gives each pod, without its secret."""
    (generator,) = manifests()["base"]["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def test_the_pods_settings_exist() -> None:
    """Each variable of the pods is a setting, and none of them is a secret."""
    assert variables().keys() <= setting_names().keys()
    assert variables().keys() & {"SECURITY__API_KEY", "HUGGINGFACE_TOKEN"} == set()


def test_pods_are_added_for_requests_that_run_or_wait() -> None:
    """KEDA counts metrics that exist, and adds a pod before the engine's batch is full."""
    (trigger,) = manifests()["ScaledObject/llm-service"]["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    names = {metric.name for c in collectors(Metrics()) for metric in c.describe()}
    assert metric_names(query) == {"llm_requests_running", "llm_requests_waiting"} <= names
    settings = Settings(_env_file=None).engine
    assert 1 < int(trigger["metadata"]["threshold"]) < settings.max_running


@needs_promtool
def test_keda_asks_for_the_sum_over_all_pods(tmp_path: Path) -> None:
    """Of two pods with 5 and 7 requests that run and 2 that wait, Prometheus answers 14."""
    (trigger,) = manifests()["ScaledObject/llm-service"]["spec"]["triggers"]
    figures = {"running": (5, 7), "waiting": (0, 2)}
    series = [
        {"series": f'llm_requests_{name}{{instance="{pod}"}}', "values": str(value)}
        for name, values in figures.items()
        for pod, value in enumerate(values)
    ]
    expected = {"expr": trigger["metadata"]["query"], "eval_time": "0m"}
    expected["exp_samples"] = [{"labels": "{}", "value": 14}]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": [expected]}
    file = tmp_path / "query.yml"
    file.write_text(yaml.safe_dump({"tests": [case]}), encoding="utf-8")
    promtool("test", "rules", str(file))


# --- Compose and HAProxy --------------------------------------------------------------------------


def services(name: str) -> dict[str, dict[str, Any]]:
    """The services of a Compose file, each with what it takes over from another file."""
    (document,) = documents(DEPLOY / name)
    found = {}
    for service, own in document["services"].items():
        base = own.pop("extends", None)
        found[service] = {**(services(base["file"])[base["service"]] if base else {}), **own}
    return found


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_hardens_every_container(name: str) -> None:
    """Each container has a read-only file system, no capability, and no way to more rights."""
    assert "llm-service" in services(name)
    for service in services(name).values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_mounts_what_exists(name: str) -> None:
    """Each file that a container is given is there; .env is the user's."""
    for service in services(name).values():
        sources = [volume.split(":")[0] for volume in service.get("volumes", ())]
        assert all((DEPLOY / s).exists() for s in sources if s.startswith("."))


def test_copies_trust_haproxys_network_alone() -> None:
    """The copies' settings exist, and X-Forwarded-For is believed from Compose's network."""
    (document,) = documents(DEPLOY / "compose.scale.yml")
    copies = document["services"]["llm-service"]
    assert all(is_setting(name) for name in copies["environment"])
    assert copies["environment"].keys() <= setting_names().keys()
    (network,) = document["networks"]["internal"]["ipam"]["config"]
    trusted = yaml.safe_load(copies["environment"]["SECURITY__TRUSTED_PROXIES"])
    assert trusted == [network["subnet"]]
    assert "ports" not in copies


@needs_haproxy
def test_haproxy_accepts_its_configuration() -> None:
    """HAProxy's own check of deploy/haproxy/haproxy.cfg finds no fault and warns of nothing."""
    command = ["haproxy", "-c", "-dW", "-f", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_finds_the_copies() -> None:
    """Prometheus accepts the configuration that looks the copies up by their name."""
    promtool("check", "config", str(DEPLOY / "prometheus" / "scale.yml"))


@needs_redis
@pytest.mark.parametrize("name", ["compose", "kubernetes"])
def test_redis_takes_its_options(name: str, tmp_path: Path) -> None:
    """A real Redis takes the options of deploy/, logs each change to a file and evicts nothing."""
    if name == "compose":
        options = services("compose.scale.yml")["redis"]["command"][1:]
    else:
        pod = manifests()["StatefulSet/llm-redis"]["spec"]["template"]["spec"]
        options = [o.replace("$(REDIS_PASSWORD)", "secret") for o in pod["containers"][0]["args"]]
    path = tmp_path / "redis"
    command = ["redis-server", *options, "--port", "0", "--unixsocket", str(path)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            while client.connect_ex(str(path)):
                assert process.poll() is None
                time.sleep(0.01)
            login = b"AUTH secret\r\n" if name == "kubernetes" else b""
            client.sendall(login + b"CONFIG GET appendonly maxmemory-policy save\r\nQUIT\r\n")
            answer = client.makefile().read()
    finally:
        process.kill()
        process.wait()
    assert "appendonly\n$3\nyes\n" in answer
    assert "maxmemory-policy\n$10\nnoeviction\n" in answer
    assert "save\n$0\n\n" in answer
