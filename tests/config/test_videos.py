"""What an operator says of videos, in a configuration and by flags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.config.server import ServerConfig
from vllm_packcache.config.sources import load_mapping
from vllm_packcache.config.videos import VideosConfig, Webhook

SECRET = "whsec_" + "A" * 32


def read(videos: Any = None, **flags: Any) -> ServerConfig:
    config: dict[str, Any] = {"layout": {"grid": [2, 3]}}
    if videos is not None:
        config["videos"] = videos
    read = ServerConfig.from_additional_config(
        {"kv_cache_policy": "packcache", "kv_cache_policy_config": config, **flags}
    )
    assert read is not None
    return read


def test_without_flags_nothing_is_on():
    assert read().videos.store is None
    assert "videos" not in read().as_mapping()


def test_flags_and_configuration_say_it_together():
    videos = read({"quota_bytes": 2**21}, video_store="/a", video_tokenizer="demo").videos
    assert (videos.store, videos.tokenizer, videos.quota_bytes) == ("/a", "demo", 2**21)
    assert read({"store": "/a"}, video_store="/a").videos.store == "/a"


def test_secrets_are_not_shown():
    shown = str(read({"webhooks": [{"url": "https://a/b", "secret": SECRET}]}).as_mapping())
    assert "https://a/b" in shown
    assert SECRET not in shown
    with pytest.raises(ConfigError) as wrong:
        read({"webhooks": [{"url": "https://a/b", "secret": SECRET[1:]}]})
    assert SECRET[1:20] not in str(wrong.value)


@pytest.mark.parametrize(
    ("videos", "flags", "words"),
    [
        (1, {}, "videos must be a mapping, not 1"),
        ({"quota": 1}, {}, "videos.quota is no known option: known are expire_seconds"),
        ({"quota_bytes": 5}, {}, "videos.quota_bytes: input should be greater than or equal to 1048576, not 5"),
        ({"webhooks": [{"url": "ftp://a", "secret": SECRET}]}, {}, "must begin with https:// or http://"),
        ({"store": "/a"}, {"video_store": "/b"}, "videos: store is another than --video-store says"),
        (None, {"video_store": 5}, "video_store must be a text, not 5"),
        (None, {"video_tokenizer": "demo"}, "--video-tokenizer needs --video-store"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(videos: Any, flags: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")) as wrong:
        read(videos, **flags)
    assert "\n" not in str(wrong.value)


def test_a_store_needs_a_policy():
    with pytest.raises(ConfigError, match="video_store is given without kv_cache_policy"):
        ServerConfig.from_additional_config({"video_store": "/a"})


def test_the_guide_has_every_field_with_its_default(tmp_path: Path):
    guide = (Path(__file__).parents[2] / "docs" / "configure.md").read_text(encoding="utf-8")
    section = guide.partition("\n## Videos over HTTP\n")[2]
    defaults, webhook = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    for name, text in (("defaults", defaults), ("webhook", webhook)):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    given: Any = load_mapping(str(tmp_path / "defaults.yaml"))["videos"]
    assert set(given) == set(VideosConfig.model_fields)
    assert read(given).videos == VideosConfig()
    named: Any = load_mapping(str(tmp_path / "webhook.yaml"))["videos"]
    assert set(named["webhooks"][0]) == set(Webhook.model_fields)
    assert read(named).videos.webhooks[0].events == ("video.failed",)
