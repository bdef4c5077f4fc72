"""What stands beside deploy/kubernetes.yaml: of known shape, about the same pods, and with one autoscaler."""

import re
from typing import Any

import pytest
from conftest import ROOT

from keras_server.settings import Settings

yaml: Any = pytest.importorskip("yaml")
jsonschema: Any = pytest.importorskip("jsonschema")


def manifests(name: str) -> dict[str, Any]:
    """Return a file's manifests by their kinds."""
    return {one["kind"]: one for one in yaml.safe_load_all((ROOT / "deploy" / name).read_text("utf-8"))}


PLAIN = manifests("kubernetes.yaml")
POD = PLAIN["Deployment"]["spec"]["template"]
GATEWAY = manifests("kubernetes-gateway.yaml")
KEDA = manifests("kubernetes-keda.yaml")["ScaledObject"]
MONITOR = manifests("kubernetes-prometheus.yaml")["PodMonitor"]


def fields(required: str = "", **known: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields and no others."""
    shape = {"type": "object", "properties": known, "additionalProperties": False, "required": required.split()}
    return {name: value for name, value in shape.items() if value != []}


def items(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": schema, "minItems": 1}


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
DURATION = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
# The fields that are used, as the definitions of Gateway API 1.7, KEDA 2.16 and Prometheus Operator 0.70 have them.
SCHEMAS = {
    "Gateway": fields(
        "gatewayClassName listeners",
        gatewayClassName=TEXT,
        listeners=items(fields("name port protocol", name=TEXT, port=NUMBER, protocol={"enum": ["HTTP", "HTTPS"]})),
    ),
    "HTTPRoute": fields(
        parentRefs=items(fields("name", name=TEXT)),
        rules=items(
            fields(
                backendRefs=items(fields("name", name=TEXT, port=NUMBER)),
                retry=fields(codes=items({"type": "integer", "minimum": 400, "maximum": 599}), attempts=NUMBER),
                timeouts=fields(request=DURATION, backendRequest=DURATION),
            )
        ),
    ),
    "ScaledObject": fields(
        "scaleTargetRef triggers",
        scaleTargetRef=fields("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
        pollingInterval=NUMBER,
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        advanced=fields(horizontalPodAutoscalerConfig=fields(name=TEXT, behavior={"type": "object"})),
        triggers=items(
            fields(
                "type metadata",
                type={"enum": ["prometheus", "cpu"]},
                metricType={"enum": ["AverageValue", "Value", "Utilization"]},
                metadata={"type": "object", "additionalProperties": TEXT},
            )
        ),
    ),
    "PodMonitor": fields(
        "selector podMetricsEndpoints",
        jobLabel=TEXT,
        selector=fields(matchLabels={"type": "object", "additionalProperties": TEXT}),
        podMetricsEndpoints=items(
            fields(
                port=TEXT,
                path=TEXT,
                interval=DURATION,
                authorization=fields(type=TEXT, credentials=fields("key", name=TEXT, key=TEXT)),
            )
        ),
    ),
}  # fmt: skip
GROUPS = {
    "Gateway": "gateway.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ScaledObject": "keda.sh/v1alpha1",
    "PodMonitor": "monitoring.coreos.com/v1",
}


@pytest.mark.parametrize("manifest", [*GATEWAY.values(), KEDA, MONITOR], ids=lambda manifest: manifest["kind"])
def test_the_manifests_have_fields_that_are_there(manifest: dict[str, Any]) -> None:
    assert {*manifest} == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == GROUPS[manifest["kind"]]
    assert manifest["metadata"]["name"] == "keras-server"
    jsonschema.validate(manifest["spec"], SCHEMAS[manifest["kind"]])


def test_the_route_leads_to_the_service_and_its_times_are_longer_than_the_server_s() -> None:
    route = GATEWAY["HTTPRoute"]["spec"]
    assert route["parentRefs"] == [{"name": GATEWAY["Gateway"]["metadata"]["name"]}]
    (served,) = route["rules"]
    (backend,) = served["backendRefs"]
    assert backend["name"] == PLAIN["Service"]["metadata"]["name"]
    assert backend["port"] == PLAIN["Service"]["spec"]["ports"][0]["port"]
    seconds = {name: float(text.removesuffix("s")) for name, text in served["timeouts"].items()}
    assert seconds["request"] > seconds["backendRequest"] > Settings().timeout


def test_keda_takes_the_place_of_the_other_autoscaler_and_asks_no_less() -> None:
    """Two would scale the same deployment up and down by turns."""
    other, spec = PLAIN["HorizontalPodAutoscaler"], KEDA["spec"]
    assert KEDA["metadata"]["annotations"] == {"scaledobject.keda.sh/transfer-hpa-ownership": "true"}
    config = spec["advanced"]["horizontalPodAutoscalerConfig"]
    assert config == {"name": other["metadata"]["name"], "behavior": other["spec"]["behavior"]}
    assert spec["scaleTargetRef"] == other["spec"]["scaleTargetRef"]
    assert spec["minReplicaCount"] == other["spec"]["minReplicas"]
    assert spec["maxReplicaCount"] == other["spec"]["maxReplicas"]
    queue, cpu = spec["triggers"]
    (resource,) = other["spec"]["metrics"]
    assert cpu["type"] == resource["resource"]["name"]
    assert cpu["metricType"] == resource["resource"]["target"]["type"]
    assert int(cpu["metadata"]["value"]) == resource["resource"]["target"]["averageUtilization"]
    assert int(queue["metadata"]["threshold"]) == Settings().max_batch


def test_the_pods_are_scraped_with_the_key_that_they_have() -> None:
    spec = MONITOR["spec"]
    assert spec["selector"]["matchLabels"] == PLAIN["Deployment"]["spec"]["selector"]["matchLabels"]
    (endpoint,) = spec["podMetricsEndpoints"]
    (container,) = POD["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    (key,) = (row for row in container["env"] if row["name"] == "KERAS_SERVER_METRICS_KEY")
    assert endpoint["authorization"]["credentials"] == key["valueFrom"]["secretKeyRef"]
    # As the alerts and KEDA's query name it.
    job = POD["metadata"]["labels"][spec["jobLabel"]]
    assert set(re.findall('job="([^"]+)"', KEDA["spec"]["triggers"][0]["metadata"]["query"])) == {job}
    assert set(re.findall('job="([^"]+)"', (ROOT / "deploy" / "prometheus-rules.yml").read_text("utf-8"))) == {job}


def test_the_command_for_the_secret_makes_every_key() -> None:
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8")
    made = set(re.findall(r"--from-literal=([\w-]+)=", text))
    assert made == set(re.findall(r"secretKeyRef: \{name: keras-server, key: ([\w-]+)\}", text))
