"""The files for Kubernetes and Compose: their settings, names, ports, rights and closed doors."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.deploy.nginx import NGINX
from tests.servers import ROOT, WAIT_S
from transformers_api.cluster.arguments import add_cluster
from transformers_api.config.described import described
from transformers_api.config.settings import Settings

FOLDER = ROOT / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
DOCUMENTS = [
    document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((FOLDER / name).read_text())
]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
COMPOSE_NGINX = (ROOT / "deploy" / "compose" / "nginx.conf").read_text()
SERVICES = COMPOSE["services"]
FRONTS = [name for name in SERVICES if name.startswith("front-")]
OURS = ["cluster", *FRONTS]
SETTINGS = {name for name, *_ in described()}
OF_RAY = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"}
CLIENT_PORT = 10001  # Ray's own, on the head
AGENT_PORT = 52365  # of Ray's agents, unless they are told another


class Pod(NamedTuple):
    """A template of pods, from a Deployment or a group of the RayCluster."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]
    ray: dict[str, str]  # rayStartParams; empty for a Deployment

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        ports = [port for each in self.containers for port in each.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in ports}


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {doc["metadata"]["name"]: doc for doc in DOCUMENTS if doc["kind"] == kind}


def pod(name: str, template: dict[str, Any], ray: dict[str, str]) -> Pod:
    return Pod(name, template["metadata"]["labels"], template["spec"], ray)


(CLUSTER,) = of_kind("RayCluster").values()
HEAD = CLUSTER["spec"]["headGroupSpec"]
(ENGINES,) = CLUSTER["spec"]["workerGroupSpecs"]
PODS = {
    "head": pod("head", HEAD["template"], HEAD["rayStartParams"]),
    "engines": pod("engines", ENGINES["template"], ENGINES["rayStartParams"]),
    **{name: pod(name, doc["spec"]["template"], {}) for name, doc in of_kind("Deployment").items()},
}
CONTAINERS = [(each, container) for each in PODS.values() for container in each.containers]
IDS = [f"{each.name}-{container['name']}" for each, container in CONTAINERS]
CONFIGURED = of_kind("ConfigMap")["settings"]["data"]
RAYS = {"head", "engines", "front"}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items()


def may_enter(target: Pod, port: int, labels: dict[str, str] | None) -> bool:
    """True where a pod with ``labels`` (None: anybody else) reaches ``port``, by the policies."""
    for policy in of_kind("NetworkPolicy").values():
        if not matches(policy["spec"]["podSelector"], target.labels):
            continue
        for rule in policy["spec"].get("ingress", []):
            sources = [each["podSelector"] for each in rule.get("from", [])]
            comes = not sources or (labels is not None and any(matches(s, labels) for s in sources))
            allowed = [each["port"] for each in rule.get("ports", [])]
            numbers = [target.ports.get(each, each) for each in allowed]
            if comes and (not numbers or port in numbers):
                return True
    return False


def expanded(text: str) -> str:
    """A value of the Compose file where the shell sets nothing."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def compose_environment(name: str) -> dict[str, str]:
    return {key: expanded(value) for key, value in SERVICES[name]["environment"].items()}


def cluster_options(command: list[str]) -> argparse.Namespace:
    """What the command line makes of a container's command."""
    assert command[:4] == ["python", "-m", "transformers_api", "cluster"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_cluster(parser)
    return parser.parse_args(command[4:])


def test_all_that_is_set_are_settings_with_values_that_are_allowed() -> None:
    names = {env["name"] for _, container in CONTAINERS for env in container.get("env", [])}
    assert names == OF_RAY
    assert sorted(set(CONFIGURED) - SETTINGS) == []
    settings = Settings.from_env(CONFIGURED)
    assert (settings.engine, settings.downloads_allowed) == ("ray", False)


@pytest.mark.parametrize(("each", "container"), CONTAINERS, ids=IDS)
def test_a_container_has_no_rights_and_a_bound(each: Pod, container: dict[str, Any]) -> None:
    rights = each.spec["securityContext"]
    assert rights["runAsNonRoot"] is True
    assert rights["runAsUser"] > 0
    assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
    assert each.spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(each.spec)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
    assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
    image = container["image"]
    assert image.startswith("redis:") or image == KUSTOMIZATION["images"][0]["name"]


@pytest.mark.parametrize("each", PODS.values(), ids=PODS)
def test_what_is_mounted_and_read_is_there(each: Pod) -> None:
    volumes = {volume["name"]: volume for volume in each.spec.get("volumes", [])}
    mounts = {m["name"] for c in each.containers for m in c.get("volumeMounts", [])}
    assert mounts == set(volumes)
    secrets = {entry["name"] for entry in KUSTOMIZATION["secretGenerator"]}
    claims = set(of_kind("PersistentVolumeClaim"))
    for volume in volumes.values():
        assert volume.get("secret", {}).get("secretName", "cluster") in secrets
        assert volume.get("persistentVolumeClaim", {}).get("claimName", "models") in claims
    for container in each.containers:
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in of_kind("ConfigMap")
        for probe in ("readinessProbe", "livenessProbe", "startupProbe"):
            check = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get(
                "tcpSocket"
            )
            if check and isinstance(check["port"], str):
                assert check["port"] in {port["name"] for port in container["ports"]}


def test_keys_and_token_are_where_the_settings_say_and_not_in_the_repository() -> None:
    settings = Settings.from_env(CONFIGURED)
    (front,) = PODS["front"].spec["containers"]
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in front["volumeMounts"]}
    files = {entry["name"]: entry["files"] for entry in KUSTOMIZATION["secretGenerator"]}
    assert [mounts["keys"] / name for name in files["keys"]] == [settings.api_keys_file]
    assert [mounts["token"] / name for name in files["cluster"]] == [
        settings.cluster_folder / "token"
    ]
    ignored = (FOLDER / ".gitignore").read_text().split()
    assert sorted(ignored) == sorted(name for names in files.values() for name in names)
    assert of_kind("Secret") == {}


def test_every_part_of_ray_asks_for_the_token_and_is_found_at_the_settings_address() -> None:
    settings = Settings.from_env(CONFIGURED)
    rays = [container for _, container in CONTAINERS if container["name"] == "ray"]
    assert len(rays) == len(RAYS)
    for container in rays:
        environment = {env["name"]: env["value"] for env in container["env"]}
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == str(settings.cluster_folder / "token")
    address = f"{CLUSTER['metadata']['name']}-head-svc:{PODS['head'].ports['gcs-server']}"
    assert settings.cluster_address == address  # the name that KubeRay gives the head's service
    assert f"--address={address}" in PODS["front"].spec["initContainers"][0]["command"]
    pins = (ROOT / "requirements-ray.txt").read_text()
    assert f"\nray[serve]=={CLUSTER['spec']['rayVersion']}\n" in pins
    assert HEAD["rayStartParams"]["include-dashboard"] == "false"


def test_every_member_of_ray_is_asked_for_its_health_where_its_agent_listens() -> None:
    health = {"path": "/api/healthz", "port": AGENT_PORT}
    rays = [container for _, container in CONTAINERS if container["name"] == "ray"]
    assert [container["startupProbe"]["httpGet"] for container in rays] == [health] * 3
    lasting = [container for container in rays if "restartPolicy" not in container]
    for probe in ("readinessProbe", "livenessProbe"):
        assert [container[probe]["httpGet"] for container in lasting] == [health] * 2
    options = PODS["front"].spec["initContainers"][0]["command"]
    moved = [*HEAD["rayStartParams"], *ENGINES["rayStartParams"], *options]
    assert not [option for option in moved if "dashboard-agent" in option]
    assert "--num-cpus=0" in options
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_there_are_as_many_replicas_as_engines_and_each_fills_one() -> None:
    settings = Settings.from_env(CONFIGURED)
    counts = {ENGINES[key] for key in ("replicas", "minReplicas", "maxReplicas")}
    assert counts == {settings.cluster_replicas}
    resources = PODS["engines"].spec["containers"][0]["resources"]
    assert float(resources["limits"]["cpu"]) == settings.cluster_replica_cpus
    assert resources["limits"] == resources["requests"]
    (command,) = [c["command"] for c in HEAD["template"]["spec"]["containers"] if "command" in c]
    options = cluster_options(command)
    assert (options.join, options.wait, options.replicas) == (True, True, None)


def test_selectors_services_and_the_autoscaler_meet_their_pods() -> None:
    deployments = of_kind("Deployment")
    for name, deployment in deployments.items():
        assert matches(deployment["spec"]["selector"], PODS[name].labels)
    for name, service in of_kind("Service").items():
        (target,) = [
            each
            for each in PODS.values()
            if service["spec"]["selector"].items() <= each.labels.items()
        ]
        assert target.name == name
        assert all(port["targetPort"] in target.ports for port in service["spec"]["ports"])
    (scaler,) = of_kind("HorizontalPodAutoscaler").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
    (metric,) = scaler["spec"]["metrics"]
    names = [container["name"] for container in PODS["front"].spec["containers"]]
    assert metric["containerResource"]["container"] in names
    assert "replicas" not in deployments["front"]["spec"]  # applied again it would undo the scaler
    (budget,) = of_kind("PodDisruptionBudget").values()
    assert matches(budget["spec"]["selector"], PODS["front"].labels)
    assert budget["spec"]["minAvailable"] < scaler["spec"]["minReplicas"]


def test_the_front_and_redis_listen_where_they_are_looked_for() -> None:
    settings = Settings.from_env(CONFIGURED)
    assert PODS["front"].ports == {"http": settings.port}
    service = of_kind("Service")["redis"]
    assert settings.redis_url == f"redis://redis:{service['spec']['ports'][0]['port']}/0"


def test_answers_have_their_time_to_end() -> None:
    front = PODS["front"].spec
    pause = float(front["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    graceful_s = Settings.from_env(CONFIGURED).graceful_s
    assert front["terminationGracePeriodSeconds"] > graceful_s + pause
    assert PODS["engines"].spec["terminationGracePeriodSeconds"] > graceful_s


def test_every_port_is_closed_to_others_but_the_one_of_the_api() -> None:
    own = {each.name: each.labels for each in PODS.values()}
    sources: dict[str, dict[str, str] | None] = {**own, "other pod": {"app": "x"}, "outside": None}
    ports = (5000, 6379, 8080, 8265, CLIENT_PORT, 10002, 19999, 41000, AGENT_PORT)
    entered = {
        (target.name, source, port)
        for target in PODS.values()
        for source, labels in sources.items()
        for port in ports
        if may_enter(target, port, labels)
    }
    inside = {(a, b, port) for a in RAYS for b in RAYS for port in ports}
    api = {("front", source, 5000) for source in sources}
    assert entered == inside | api | {("redis", "front", 6379)}


def test_nobody_goes_out_but_to_the_others_and_for_names() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["closed"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        for rule in policy["spec"].get("egress", []):
            assert rule["to"]
            ports = {each["port"] for each in rule.get("ports", [])}
            others = [each for each in rule["to"] if "namespaceSelector" in each]
            assert not others or ports == {53}
            assert not [each for each in rule["to"] if "ipBlock" in each]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not there")
def test_kubectl_puts_it_together(tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, folder)
    for name in ("token", "keys"):
        (folder / name).write_text("secret")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert len(made) == len(DOCUMENTS) + len(KUSTOMIZATION["secretGenerator"])
    assert {each["metadata"]["namespace"] for each in made} == {KUSTOMIZATION["namespace"]}
    images = re.findall(r"image: (\S+)", done.stdout)
    assert {image for image in images if "redis" not in image} == {"transformers-api:latest"}


@pytest.mark.parametrize("name", OURS)
def test_compose_sets_settings_and_gives_no_rights(name: str) -> None:
    service = SERVICES[name]
    assert sorted(set(service["environment"]) - SETTINGS) == []
    settings = Settings.from_env(compose_environment(name))
    assert settings.cluster_address.startswith("127.0.0.1:")
    assert settings.redis_url == "redis://redis:6379/0"
    assert service["image"] == SERVICES["cluster"]["image"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["volumes"] == ["models:/models"]
    assert float(service["stop_grace_period"].removesuffix("s")) > settings.graceful_s


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_of_compose_is_read_only_and_knows_its_neighbours(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service.get("depends_on", [])) <= set(SERVICES)
    assert "privileged" not in service


def test_compose_has_two_fronts_in_the_network_of_the_cluster_and_publishes_nginx_only() -> None:
    assert len(FRONTS) == 2
    for name in FRONTS:
        shared = [SERVICES[name][key] for key in ("network_mode", "ipc", "pid")]
        assert shared == ["service:cluster"] * 3
        assert compose_environment(name)["ENGINE"] == "ray"
    assert SERVICES["cluster"]["ipc"] == "shareable"
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["nginx"]
    assert [expanded(port) for port in SERVICES["nginx"]["ports"]] == ["127.0.0.1:8080:8080"]
    upstreams = re.findall(r"^ +server cluster:(\d+) ", COMPOSE_NGINX, re.M)
    assert upstreams == [compose_environment(name)["PORT"] for name in FRONTS]


def test_compose_starts_two_replicas_of_an_image_with_ray() -> None:
    cluster = SERVICES["cluster"]
    assert cluster["build"]["args"]["EXTRA"] == "ray"
    assert (ROOT / "deploy" / "compose" / cluster["build"]["context"]).resolve() == ROOT
    assert Settings.from_env(compose_environment("cluster")).cluster_replicas == 2
    options = cluster_options(cluster["command"])
    assert (options.join, options.wait) == (False, True)
    assert cluster_options(cluster["healthcheck"]["test"][1:]).run


@pytest.mark.skipif(not NGINX, reason="nginx is not there")
def test_nginx_takes_the_configuration_of_compose(tmp_path: Path) -> None:
    file = tmp_path / "nginx.conf"
    text = COMPOSE_NGINX.replace("cluster:", "127.0.0.1:").replace("/tmp/", f"{tmp_path}/")
    file.write_text(text)
    done = subprocess.run([NGINX, "-t", "-c", file], capture_output=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr


def test_kubectl_reads_all_objects_and_builds_what_the_files_say(tmp_path):
    """Without a cluster it can check no more: `--dry-run=client` asks the server for its kinds."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path / "kubernetes"
    shutil.copytree(FOLDER, folder)
    for name in ("token", "keys"):
        (folder / name).write_text("a" * 64)
    built = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    objects = list(yaml.safe_load_all(built.stdout))
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    assert names >= {(each["kind"], each["metadata"]["name"]) for each in DOCUMENTS}
    assert {("Secret", "cluster"), ("Secret", "keys")} <= names
    assert {each["metadata"]["namespace"] for each in objects} == {KUSTOMIZATION["namespace"]}
    read = subprocess.run(
        ["kubectl", "label", "--local", "--filename=-", "--output=name", "read=yes"],
        input=built.stdout,
        capture_output=True,
        text=True,
    )
    assert len(read.stdout.splitlines()) == len(objects), read.stderr
