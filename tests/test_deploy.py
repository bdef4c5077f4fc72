"""The container and the manifests: valid, in agreement with the settings; the image's steps run in a clean folder."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest
import pytest
from conftest import ROOT, Process

import run_keras_server as server
from keras_server.api.context import NEED_NO_KEY
from keras_server.settings import SETTINGS

yaml: Any = pytest.importorskip("yaml")

DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
VARIABLES = {setting.variable for setting in SETTINGS}
LAST_ANSWERS = 5  # seconds, at least, between the last deadline and the end by force


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and their arguments, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text("utf-8"))
RAY_IMAGE = instructions((ROOT / "deploy" / "ray.Dockerfile").read_text("utf-8"))
STARTS = [i for i, (name, _) in enumerate(DOCKERFILE) if name == "FROM"]
BUILD, LAST = DOCKERFILE[: STARTS[-1]], DOCKERFILE[STARTS[-1] :]
(IMAGE,) = [rest.partition("=")[2] for name, rest in DOCKERFILE[: STARTS[0]] if name == "ARG"]
ENV = dict(pair.split("=", 1) for name, rest in LAST if name == "ENV" for pair in shlex.split(rest))
MANIFESTS = {doc["kind"]: doc for doc in yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text("utf-8"))}
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
RAY_SERVICE = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text("utf-8"))
# What ray_app.py gives a cluster on this machine, which is not imported here: Ray need not be installed.
RAY = dict(
    re.findall(r'^ {8}"(RAY_\w+)": "([^"]*)"', (ROOT / "keras_server/ray_app.py").read_text("utf-8"), re.MULTILINE)
)
RAY["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
SERVE_CONFIGS = {
    "serve_config.yaml": yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8")),
    "rayservice.yaml": yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]),
}


def arguments(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for found, rest in stage if found == name]


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row.get("value", "") for row in container["env"]}


# ------------------------------------------------------------------------------------------- the image


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "deploy/ray.Dockerfile"])
def test_the_dockerfiles_have_no_faults_that_their_linter_knows(dockerfile: str) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not linter:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, dockerfile], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_ray_image_has_the_ray_and_the_path_of_its_manifest() -> None:
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    assert arguments(RAY_IMAGE, "FROM")[-1] == f"rayproject/ray:{cluster['rayVersion']}-py312-cpu"
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert arguments(RAY_IMAGE, "ENV")[-1] == f"PYTHONPATH={variables(head)['PYTHONPATH']}"


def test_every_replica_serves_the_export_that_its_image_holds_and_needs_no_tensorflow() -> None:
    """Both images make it alike, in a stage of its own; a cluster without images has it in the same place."""
    (made,) = (rest for rest in arguments(RAY_IMAGE, "RUN") if "export" in rest)
    assert made in arguments(BUILD, "RUN")
    assert "--from=build /opt/model /opt/model" in arguments(RAY_IMAGE, "COPY")
    groups = RAY_SERVICE["spec"]["rayClusterConfig"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        assert variables(group["template"]["spec"]["containers"][0])["KERAS_SERVER_MODEL"] == "/opt/model"
    application = SERVE_CONFIGS["serve_config.yaml"]["applications"][0]
    assert application["runtime_env"]["env_vars"]["KERAS_SERVER_MODEL"] == "/opt/model"
    last = RAY_IMAGE[max(i for i, (name, _) in enumerate(RAY_IMAGE) if name == "FROM") :]
    assert "requirements-ray.txt" in " ".join(arguments(last, "RUN"))
    assert (ROOT / "requirements-ray.txt").read_text().startswith("-r requirements-serve.txt\n")
    assert not re.search("^(keras|tensorflow)", (ROOT / "requirements-ray.txt").read_text(), re.MULTILINE)


def test_the_last_stage_is_slim_installs_nothing_and_is_not_root() -> None:
    assert arguments(LAST, "FROM") == ["${PYTHON}"]
    assert not [rest for rest in arguments(LAST, "RUN") if re.search(r"\b(apt|pip|gcc|make|curl)\b", rest)]
    assert int(arguments(LAST, "USER")[-1]) > 0


def test_both_stages_start_from_an_image_of_one_day() -> None:
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", IMAGE)
    assert [start.split()[0] for start in arguments(DOCKERFILE, "FROM")] == ["${PYTHON}"] * 2


def test_every_package_of_the_image_is_one_of_the_lock_files() -> None:
    installed = [part for rest in arguments(DOCKERFILE, "RUN") for part in re.findall(r"install (.*?)(?: &&|$)", rest)]
    assert installed == [f"--require-hashes -r {name}.lock" for name in ("requirements", "requirements-serve")]
    assert {word for rest in arguments(BUILD, "COPY") for word in rest.split() if word.endswith(".lock")} == {
        "requirements.lock",
        "requirements-serve.lock",
    }


def test_signals_reach_the_server_and_the_health_check_needs_no_shell() -> None:
    assert json.loads(arguments(LAST, "ENTRYPOINT")[-1]) == ["python", "run_keras_server.py"]
    assert not arguments(LAST, "CMD"), "docker run keras-server --top 3 puts its options there"
    check = json.loads(arguments(LAST, "HEALTHCHECK")[0].partition("CMD ")[2])
    assert check[0] == "python"
    assert "/healthz" in check[2]


def test_the_image_listens_to_all_and_knows_its_variables() -> None:
    assert ENV["KERAS_SERVER_HOST"] == "0.0.0.0"
    assert {name for name in ENV if name.startswith("KERAS_SERVER_")} <= VARIABLES
    assert arguments(LAST, "EXPOSE") == [ENV["KERAS_SERVER_PORT"]]


def context() -> list[Path]:
    """Return what .dockerignore leaves of the project."""
    rules = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    kept = []
    for path in ROOT.iterdir():
        last = [rule for rule in rules if fnmatch.fnmatch(path.name, rule.removeprefix("!"))][-1]
        kept += [path] if last.startswith("!") else []
    return kept


def copy_as_built(folder: Path) -> None:
    """Copy into a folder what the build stage's COPY lines name, where .dockerignore leaves it."""
    left = context()
    for *sources, target in map(shlex.split, arguments(BUILD, "COPY")):
        for path in (ROOT / source for source in sources):
            assert path in left, path
            if path.is_dir():
                shutil.copytree(path, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder / target)


def test_the_context_of_the_images_holds_nothing_else() -> None:
    allowed = {rule.removeprefix("!") for rule in (ROOT / ".dockerignore").read_text("utf-8").splitlines()}
    assert {path.name for path in context()} <= allowed
    assert {"keras_server", "run_keras_server.py", "requirements-ray.txt", "dog.jpg"} <= {p.name for p in context()}


def test_the_images_steps_in_a_clean_folder(
    serving_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported, started without TensorFlow, healthy, stopped by SIGTERM, and no file is written after the build."""
    home, model = tmp_path / "srv", tmp_path / "model"
    home.mkdir()
    copy_as_built(home)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("KERAS_", "PYTHON"))}
    step = next(rest for rest in arguments(BUILD, "RUN") if "export" in rest)
    step = step.replace(" python ", f" {shlex.quote(sys.executable)} ").replace("/opt/model", str(model))
    environment = plain | {"PYTHONDONTWRITEBYTECODE": "1", "KERAS_SERVER_CACHE_DIR": ""}
    subprocess.run(["sh", "-euc", step], cwd=home, env=environment, check=True, timeout=300)
    before = {path: path.stat().st_mtime_ns for folder in (home, model) for path in folder.rglob("*")}
    settings = {name: value for name, value in ENV.items() if name not in ("PATH", "PYTHONUNBUFFERED")}
    assert settings["KERAS_SERVER_MODEL"] == "/opt/model"
    settings |= {"KERAS_SERVER_MODEL": str(model), "KERAS_SERVER_HOST": "127.0.0.1", "HOME": str(tmp_path / "none")}
    monkeypatch.setattr(conftest, "ROOT", home)
    command = ["-S", str(home / "run_keras_server.py")]
    process = Process("--drain-seconds", "0", command=command, **settings, PYTHONPATH=str(serving_site))
    try:
        process.wait_until_ready()
        check = json.loads(arguments(LAST, "HEALTHCHECK")[0].partition("CMD ")[2])
        port = process.url.rpartition(":")[2]
        environment = plain | {"KERAS_SERVER_PORT": port}
        subprocess.run([sys.executable, *check[1:]], env=environment, check=True, timeout=60)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(60) == 0
    finally:
        process.popen.kill()
        process.popen.communicate()
    assert before == {path: path.stat().st_mtime_ns for folder in (home, model) for path in folder.rglob("*")}
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------------------- the manifests


@pytest.mark.parametrize("kind", ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"])
@pytest.mark.parametrize("release", ["1.28", "1.31"])
def test_the_manifests_fit_kubernetes_schemas(kind: str, release: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(MANIFESTS[kind], release, strict=True)


def test_the_pods_of_the_ray_service_fit_kubernetes_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        validate.validate(pod, "1.31", strict=True)
        assert set(variables(pod["spec"]["containers"][0])) & {"KERAS_SERVER_API_KEY"}


def test_everything_selects_the_same_pods() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert MANIFESTS["Service"]["spec"]["selector"] == labels
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == MANIFESTS["Deployment"]["metadata"]["name"]


@pytest.mark.parametrize(
    ("probe", "path"), [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
)
def test_probes_ask_paths_that_the_app_has_without_a_key(probe: str, path: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    assert asked["path"] == path
    assert path in {rule.rule for rule in server.app.url_map.iter_rules()}
    assert path in NEED_NO_KEY
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports[asked["port"]] == int(ENV["KERAS_SERVER_PORT"])
    assert MANIFESTS["Service"]["spec"]["ports"][0]["targetPort"] == asked["port"]


def test_a_pod_has_time_to_drain() -> None:
    given = variables(CONTAINER)
    needed = float(given["KERAS_SERVER_DRAIN_SECONDS"]) + float(given["KERAS_SERVER_TIMEOUT"]) + LAST_ANSWERS
    assert POD["terminationGracePeriodSeconds"] >= needed
    readiness = CONTAINER["readinessProbe"]
    noticed = readiness["periodSeconds"] * readiness["failureThreshold"] + readiness["timeoutSeconds"]
    assert float(given["KERAS_SERVER_DRAIN_SECONDS"]) > noticed, "connections are refused before the pod is left out"


def test_the_pod_may_nothing_that_it_need_not() -> None:
    assert POD["securityContext"]["runAsUser"] == int(arguments(LAST, "USER")[-1])
    assert POD["securityContext"]["runAsNonRoot"]
    assert not POD["automountServiceAccountToken"]
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_key_comes_from_a_secret_and_variables_are_settings() -> None:
    key = next(row for row in CONTAINER["env"] if row["name"] == "KERAS_SERVER_API_KEY")
    assert "secretKeyRef" in key["valueFrom"]
    assert set(variables(CONTAINER)) <= VARIABLES


# ------------------------------------------------------------------------------------------ Ray's files


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_ray_serves_what_the_settings_say(name: str) -> None:
    application = SERVE_CONFIGS[name]["applications"][0]
    module, _, attribute = application["import_path"].partition(":")
    assert re.search(rf"^{attribute} = ", (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8"), re.MULTILINE)
    given = application.get("runtime_env", {}).get("env_vars", {})
    assert {variable for variable in given if variable.startswith("KERAS_SERVER_")} <= VARIABLES
    deployment = application["deployments"][0]
    assert f"class {deployment['name']}:" in (ROOT / f"{module.replace('.', '/')}.py").read_text("utf-8")
    assert deployment["max_ongoing_requests"] >= 2 * DEFAULTS["max_batch"]
    assert deployment["max_queued_requests"] == DEFAULTS["queue_size"]
    assert deployment["backpressure_config"] == {"status_code": 503, "retry_after_s": 1}
    assert deployment["graceful_shutdown_timeout_s"] >= DEFAULTS["timeout"] + LAST_ANSWERS
    scaling = deployment["autoscaling_config"]
    assert DEFAULTS["max_batch"] <= scaling["target_ongoing_requests"] < deployment["max_ongoing_requests"]


def test_every_ray_pod_has_time_to_drain_and_the_gates() -> None:
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    deployment = SERVE_CONFIGS["rayservice.yaml"]["applications"][0]["deployments"][0]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] >= deployment["graceful_shutdown_timeout_s"]
        given = variables(pod["containers"][0])
        assert {name: given[name] for name in given if name.startswith("RAY_")} == RAY
    assert {row["name"] for row in pod["containers"][0]["ports"]} == {"serve"}


def test_a_cluster_without_such_an_environment_has_it_from_the_controller() -> None:
    options = SERVE_CONFIGS["serve_config.yaml"]["controller_options"]
    assert options["runtime_env"]["env_vars"] == RAY


def test_haproxy_waits_for_the_answer_that_a_replica_gives_at_the_deadline() -> None:
    assert int(RAY["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) >= DEFAULTS["timeout"] + LAST_ANSWERS


def test_nothing_reaches_into_ray() -> None:
    folders = (ROOT / "keras_server", ROOT / "deploy", ROOT / "benchmarks", ROOT / "tests" / "ray")
    for path in [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".yaml")]:
        text = path.read_text("utf-8")
        assert not re.search(r"\b(ray|serve)(\.\w+)*\._[a-z]", text), path
        assert not re.search(r"from (ray|serve)\S* import .*\b_[a-z]", text), path


def test_the_plain_server_knows_nothing_of_ray() -> None:
    on_ray = {ROOT / "keras_server" / name for name in ("ray_app.py", "gate.py")}
    for path in (ROOT / "run_keras_server.py", *{*(ROOT / "keras_server").rglob("*.py")} - on_ray):
        assert not re.search(r"\bray\b", path.read_text("utf-8"), re.IGNORECASE), path
    assert not re.search("ray|a2wsgi", (ROOT / "requirements.txt").read_text("utf-8"))
