"""compose.yaml, its env files, and what Prometheus and Grafana are given. No container is started."""

from __future__ import annotations

import re
import shutil
import subprocess
from argparse import ArgumentParser
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import yaml

from tests.docker.files import COMPOSE, ENV_FILES, ROOT, environment, named, parse_exactly, videos_folder
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import presets
from vllm_packcache.core.retention import Retention
from vllm_packcache.families import LUMOS, lumos
from vllm_packcache.hooks import canvas as plugin_masked
from vllm_packcache.media.processors.base import IDS, processor_of
from vllm_packcache.media.processors.ids import IdsProcessor
from vllm_packcache.worker.keys.layout import layout_of

VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
DOCKER_COMPOSE = shutil.which("docker-compose")

each_env_file = pytest.mark.parametrize("env_file", [None, *ENV_FILES], ids=lambda path: path.stem if path else "none")


def composed(env_file: Path | None) -> dict[str, Any]:
    """The file with its variables put in, as `docker compose` does."""
    values = environment(env_file) if env_file else {}
    text = VARIABLE.sub(lambda match: values.get(match[1], match[2]), COMPOSE.read_text())
    assert "$" not in text, "a variable without a default"
    return yaml.safe_load(text)


def test_services_and_their_profiles() -> None:
    services = composed(None)["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "gpu": None, "cpu": ["cpu"], "prometheus": ["monitoring"], "grafana": ["monitoring"],
    }  # fmt: skip


def test_variables_and_env_files_agree() -> None:
    defaults: dict[str, set[str]] = {}
    for name, default in VARIABLE.findall(COMPOSE.read_text()):
        defaults.setdefault(name, set()).add(default)
    assert all(len(values) == 1 for values in defaults.values())
    for env_file in ENV_FILES:
        values = environment(env_file)
        assert set(values) <= set(defaults)
        assert "" not in values.values()
    assert set(environment(ENV_FILES[0])) == set(environment(ENV_FILES[1]))


@each_env_file
@pytest.mark.skipif(DOCKER_COMPOSE is None, reason="docker-compose is not installed (a package of Debian's)")
def test_docker_compose_accepts_it(env_file: Path | None) -> None:
    options = ["--file", str(COMPOSE), *(["--env-file", str(env_file)] if env_file else [])]
    profiles = ["--profile", "cpu", "--profile", "monitoring"]
    outcome = subprocess.run([str(DOCKER_COMPOSE), *options, *profiles, "config"], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    resolved, expected = yaml.safe_load(outcome.stdout), composed(env_file)
    assert set(resolved["services"]) == set(expected["services"])
    assert resolved["services"]["gpu"]["command"] == expected["services"]["gpu"]["command"]
    (device,) = resolved["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@each_env_file
def test_flags_exist_and_mean_something(env_file: Path | None, serve_parser: ArgumentParser) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    arguments = parse_exactly(serve_parser, composed(env_file)["services"]["gpu"]["command"])
    config = ServerConfig.from_additional_config(arguments.additional_config, LUMOS)
    assert config is not None
    assert config.positions == "rebase"
    values = environment(env_file) if env_file else {}
    assert values.get("PACKCACHE_CONFIG", "lumos1_384p") in presets()
    assert AttentionBackendEnum[arguments.attention_backend]
    assert layout_of(arguments.attention_backend)
    # With no tokenizer of the model's own: clients send and get ids.
    videos = processor_of(config.videos.tokenizer, role=LUMOS.role, server=config)
    assert isinstance(videos, IdsProcessor)


CARDS = {"a40": 46_068 * 2**20, "h200": 143_771 * 2**20}
"""Memory of each card, in bytes."""
# Of the model that the files are reckoned for: bf16, 28 layers with keys and values of 8 heads of 128.
BYTES_PER_TOKEN = 28 * 2 * 8 * 128 * 2
VOCABULARY = 129_536
WEIGHTS = 7e9


@pytest.mark.parametrize("env_file", ENV_FILES, ids=lambda path: path.stem)
def test_as_many_videos_fit_as_may_run(env_file: Path, serve_parser: ArgumentParser) -> None:
    """The reckoning in the env files, with the policy's own numbers: both streams, and a step scheduled ahead."""
    arguments = parse_exactly(serve_parser, composed(env_file)["services"]["gpu"]["command"])
    config = ServerConfig.from_additional_config(arguments.additional_config, LUMOS)
    assert config is not None
    grid, frames, words = (48, 84), 13, 267
    image = lumos.frame_of_codes(np.zeros(grid, dtype=np.int64)).tolist()
    prompt = lumos.text_prompt([5] * words, 6, 8) + image
    plan = LUMOS.request(config, {"packcache_grid": list(grid), "packcache_frames": frames}, prompt)
    frame_tokens = len(image)
    blocks = [Retention(own.plan.layout, own.plan.policy, 16).most_blocks(frame_tokens) for own in plan.streams]
    assert len(blocks) == 2
    tokens = sum(16 * count for count in blocks if count is not None)

    fitting = arguments.kv_cache_memory_bytes // (tokens * BYTES_PER_TOKEN)
    allowed = plugin_masked.requests_at_once(frame_tokens, VOCABULARY)
    assert arguments.max_num_seqs == min(fitting, allowed)
    # A tenth of the card for everything else.
    assert arguments.kv_cache_memory_bytes + WEIGHTS <= 0.9 * CARDS[env_file.stem]
    assert arguments.max_num_batched_tokens >= frame_tokens
    assert arguments.max_model_len >= plan.conditional.layout.frame_start(frames)

    told = " ".join(line.removeprefix("#").strip() for line in env_file.read_text().splitlines())
    assert f"{tokens * BYTES_PER_TOKEN / 2**30:.1f} GiB" in told
    assert f"{allowed} run at a time" in told
    if env_file.stem == "a40":
        assert f"{tokens:,} tokens in whole blocks" in told
        assert "({} and {} tokens)".format(*(f"{own.plan.layout.condition_tokens:,}" for own in plan.streams)) in told
        assert f"{BYTES_PER_TOKEN // 2**10} KiB of KV cache a token" in told


def test_servers_are_healthy_as_their_images_say() -> None:
    services = composed(None)["services"]
    for service in ("gpu", "cpu"):
        dockerfile = ROOT / services[service]["build"]["dockerfile"]
        (expected,) = named(dockerfile, "HEALTHCHECK")
        health = services[service]["healthcheck"]
        command, *arguments = health["test"]
        assert (command, arguments) == ("CMD", expected.words)
        for option in ("interval", "timeout", "retries"):
            assert f"--{option}={health[option]}" in expected.text
        assert f"--start-period={health['start_period']}" in expected.text


def test_every_file_exists() -> None:
    file = composed(None)
    for name, service in file["services"].items():
        if "build" in service:
            context = (COMPOSE.parent / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        else:
            assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: no pinned version"
        for volume in service.get("volumes", []):
            source, target, *_ = volume.split(":")
            assert PurePosixPath(target).is_absolute()
            if target == "/models":
                continue
            assert source in file["volumes"] if "/" not in source else (COMPOSE.parent / source).is_file()


def test_ports_are_open_on_this_machine_only() -> None:
    ports = [port for service in composed(None)["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_environment_variables_exist() -> None:
    import vllm.envs

    for service in ("gpu", "cpu"):
        names = {entry.partition("=")[0] for entry in composed(None)["services"][service]["environment"]}
        assert {name for name in names if name.startswith("VLLM_")} <= set(vllm.envs.environment_variables)


def test_a_server_is_told_of_the_video_tokenizer_and_of_the_key() -> None:
    services = composed(None)["services"]
    for service in ("gpu", "cpu"):
        # Without a value: that of who starts it.
        assert "VLLM_API_KEY" in services[service]["environment"]
    told = VARIABLE.sub(
        lambda match: {"PACKCACHE_VIDEO_TOKENIZER": "/models/t"}.get(match[1], "1"), COMPOSE.read_text()
    )
    assert "--video-tokenizer=/models/t" in yaml.safe_load(told)["services"]["gpu"]["command"]
    for env_file in ENV_FILES:
        assert environment(env_file)["PACKCACHE_VIDEO_TOKENIZER"] == IDS


def test_videos_are_kept_in_a_volume_of_each_model(serve_parser: ArgumentParser) -> None:
    file, kept = composed(None), []
    for service in ("gpu", "cpu"):
        own = file["services"][service]
        dockerfile = ROOT / own["build"]["dockerfile"]
        (command,) = named(dockerfile, "CMD")
        arguments = parse_exactly(serve_parser, own.get("command", command.words))
        config = ServerConfig.from_additional_config(arguments.additional_config)
        assert config is not None
        assert config.videos.store == videos_folder(dockerfile)
        mounted = {target: source for source, target, *_ in (volume.split(":") for volume in own["volumes"])}
        kept.append(mounted[config.videos.store])
    # A video can be continued by the model that made it only.
    assert len(set(kept)) == 2
    assert set(kept) <= set(file["volumes"])


def test_prometheus_asks_both_servers_where_they_listen(serve_parser: ArgumentParser) -> None:
    services = composed(None)["services"]
    prometheus = yaml.safe_load((COMPOSE.parent / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    for service in ("gpu", "cpu"):
        assert services[service]["networks"]["default"]["aliases"] == discovery["names"]
        assert services[service]["ports"][0].endswith(f":{discovery['port']}")
    assert discovery["port"] == serve_parser.get_default("port")
    # vLLM's is Prometheus' default too.
    assert "metrics_path" not in job


def test_prometheus_finds_its_rules() -> None:
    mounted = dict(volume.split(":")[:2] for volume in composed(None)["services"]["prometheus"]["volumes"])
    (rules,) = yaml.safe_load((COMPOSE.parent / "prometheus.yml").read_text())["rule_files"]
    assert mounted[f"./{rules}"] == str(PurePosixPath(mounted["./prometheus.yml"]).parent / rules)


def test_alerts_are_rules_of_prometheus() -> None:
    """Names of fields as in Prometheus' documentation; what expressions name is checked beside the metrics."""
    (group,) = yaml.safe_load((COMPOSE.parent / "alerts.yaml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names) > 0
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule) <= {
            "alert", "expr", "for", "labels", "annotations",
        }, rule["alert"]  # fmt: skip
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary"}
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    services = composed(None)["services"]
    mounted = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    (source,) = yaml.safe_load((COMPOSE.parent / "grafana" / "datasource.yaml").read_text())["datasources"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert services[host]["ports"][0].endswith(f":{port}")
    (provider,) = yaml.safe_load((COMPOSE.parent / "grafana" / "dashboards.yaml").read_text())["providers"]
    dashboard = PurePosixPath(mounted["./grafana/packcache.json"])
    assert str(dashboard.parent) == provider["options"]["path"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == str(dashboard)
    for kind in ("datasource", "dashboards"):
        folder = PurePosixPath(mounted[f"./grafana/{kind}.yaml"]).parent
        assert folder == PurePosixPath("/etc/grafana/provisioning") / f"{kind.rstrip('s')}s"
