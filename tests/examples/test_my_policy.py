"""The example of a package with a policy: installed into a throw-away place, drawn, and served by several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests import packages
from vllm_packcache.demo.run import LOGGING
from vllm_packcache.demo.tokenizer import FRAME_TOKENS, MODEL_DIR
from vllm_packcache.serving.server import client_of, serving

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAME = "every_other"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What installing the package leaves behind: its module, and metadata with the entry points of pyproject.toml."""
    folder = tmp_path_factory.mktemp("site-packages")
    project = tomllib.loads((EXAMPLES / "my_policy" / "pyproject.toml").read_text(encoding="utf-8"))
    files = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    modules = {name: (EXAMPLES / "my_policy" / name).read_text(encoding="utf-8") for name in files}
    own = project["project"]
    return packages.install(folder, own["name"], modules, own["entry-points"], own["version"])


def on_the_path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(installed: Path, *arguments: str) -> str:
    environment = {**os.environ, **on_the_path(installed)}
    answer = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_it_keeps_its_contract_over_many_frames(installed: Path) -> None:
    code = (
        "from my_policy import EveryOther\n"
        "from vllm_packcache import FrameLayout, Retention, VideoLayout\n"
        "from vllm_packcache.core.retention import check_policy\n"
        "for tokens, condition, block in ((257, 288, 16), (7, 5, 16), (16, 0, 32)):\n"
        "    for window in (1, 4, 5):\n"
        "        layout = VideoLayout(FrameLayout(tokens), condition)\n"
        "        check_policy(Retention(layout, EveryOther(window=window), block), 40)\n"
    )
    assert run(installed, "-c", code) == ""


def test_explain_draws_it(installed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    main = "from vllm_packcache.cli import main; main()"
    shown = run(installed, "-c", main, "explain", "demo", "--policy", NAME, "--frames", "8", "--out", str(picture))
    assert "frame 7" in shown
    assert picture.stat().st_size


def test_the_benchmark_of_quality_compares_it_by_its_name(installed: Path) -> None:
    code = (
        "from benchmarks.quality.generators import Causal\n"
        f"generator = Causal(policies=({NAME!r},))\n"
        "variant = generator.variants.compared[-1]\n"
        "(frames,) = generator.maker(variant, 4)(range(1, 2))\n"
        "print(variant.name, variant.live_tokens(9), *frames.shape)\n"
    )
    # 18 blocks of the condition, 16 of each of frames 4, 6 and 8, and 9 tokens of the block that frame 9 begins in.
    name, live, *shape = run(installed, "-c", code).split()
    assert name == NAME
    assert int(live) == (18 + 3 * 16) * 16 + 9
    assert shape == ["4", "16", "16"]


def test_it_serves_a_video_through_several_processes(installed: Path, tmp_path: Path) -> None:
    arguments = [
        *("--kv-cache-policy", NAME, "--kv-cache-policy-config", '{"layout": "demo", "window": 3}'),
        *("--served-model-name", "demo", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "8192", "--block-size", "32", "--max-num-seqs", "4"),
    ]
    # The API server and the engine are processes of their own, and both import the package.
    environment = {**LOGGING, **on_the_path(installed), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    frames = 5
    log = tmp_path / "log"
    with (
        serving(MODEL_DIR, arguments, log, lambda line: None, environment=environment) as url,
        client_of(url) as client,
    ):
        body = {
            "model": "demo", "prompt": "a red circle moves right", "temperature": 0, "return_token_ids": True,
            "vllm_xargs": {"packcache_frames": frames},
        }  # fmt: skip
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["token_ids"]) == frames * FRAME_TOKENS
        metrics = client.get("/metrics").text
        refused = client.post(
            "/v1/completions",
            json={**body, "vllm_xargs": {"packcache_window": 65}},
        )
        assert refused.status_code == 400
        assert "window" in refused.text
    assert f'policy="{NAME}"' in metrics
    freed = [line for line in metrics.splitlines() if line.startswith("vllm:packcache_freed_blocks_total")]
    assert float(freed[0].rpartition(" ")[2]) > 0
    assert f"is on: policy {NAME}" in log.read_text(encoding="utf-8")
