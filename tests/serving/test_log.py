"""What is read out of a server's log. The files in ``logs/`` are of real servers, with tracebacks cut in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_packcache.core.layout import FrameLayout, VideoLayout
from vllm_packcache.engine.record import VideoRecord
from vllm_packcache.serving.log import MOST_CHARACTERS, cause, last_line, read, record_of

LOGS = Path(__file__).parent / "logs"

SILENT = "a process of it ended without a word, as one does that is killed where memory runs out"

CAUSES = {
    "unknown_option": "unrecognized arguments: --max-model-lenn 3",
    "bad_value": "argument --block-size: invalid int value: 'abc'",
    "policy_option": "kv_cache_policy_config: window must be 1 or more and at most 256, not 0",
    "policy_check": "--kv-cache-policy-config: positions: rebase turns cached keys in place, and what each turn would "
    "lose of a key of 'nvfp4' is too much or not known: choose auto or 8 bits (fp8, fp8_e4m3, fp8_e5m2, "
    "int8_per_token_head, fp8_per_token_head) with --kv-cache-dtype, or set positions: absolute",
    "no_model": "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
    "'/models/no/such/model'. Use `repo_type` argument if needed.",
    "too_long": "User-specified max_model_len (100000000) is greater than the derived max_model_len "
    "(max_position_embeddings=20480.0 or model_max_length=None in model's config.json). To allow overriding this "
    "maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.",
    "cut_weights": "Unterminated string starting at: line 1 column 968 (char 967)",
    # Two processes only say that another one failed.
    "slow_start": "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by slow "
    "weight loading for large models.",
    "killed_engine": SILENT,
    "port_in_use": "[Errno 98] Address already in use",
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_that_of_the_process_that_failed_first(name: str) -> None:
    assert cause(read(LOGS / f"{name}.log")) == CAUSES[name]


def test_every_log_has_its_cause() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == set(CAUSES)


def test_of_exceptions_that_led_to_one_another_the_last_one_counts() -> None:
    told = "\n".join(
        [
            "Traceback (most recent call last):",
            '  File "a.py", line 1, in read',
            "KeyError: 'hidden_size'",
            "",
            "During handling of the above exception, another exception occurred:",
            "",
            "Traceback (most recent call last):",
            '  File "a.py", line 2, in load',
            "RuntimeError: config.json names no hidden_size",
            "Traceback (most recent call last):",
            '  File "b.py", line 2, in main',
            "TypeError: something that follows",
        ]
    )
    assert cause(told) == "config.json names no hidden_size"


def test_what_is_only_told_of_kills_nobody() -> None:
    told = "\n".join(
        [
            "(APIServer pid=7) WARNING 11-25 20:59:27 [a.py:1] Traceback (most recent call last):",
            '(APIServer pid=7) WARNING 11-25 20:59:27 [a.py:1]   File "a.py", line 1, in f',
            "(APIServer pid=7) WARNING 11-25 20:59:27 [a.py:1] ImportError: no tensorizer here",
            "INFO 11-25 20:59:28 [a.py:1] all is well",
        ]
    )
    assert cause(told) is None
    assert last_line(told + "\n \n") == "INFO 11-25 20:59:28 [a.py:1] all is well"


@pytest.mark.parametrize("told", ["", "\n\n", "Traceback (most recent call last):", "KeyboardInterrupt", "\x00\ufffd"])
def test_a_log_that_says_nothing_has_no_cause(told: str) -> None:
    assert cause(told) is None


@pytest.mark.parametrize(
    "told",
    [
        "(APIServer pid=7) WARNING 11-25 21:00:00 [core_client.py:817] [shutdown] MPClient: engine core exited "
        "unexpectedly; starting cleanup",
        "(EngineCore pid=8) ERROR 11-25 21:00:00 [executor.py:316] Worker proc VllmWorker-0 died unexpectedly "
        "(exit code: -9), shutting down executor.",
        'Traceback (most recent call last):\n  File "utils.py", line 587, in wait\nRuntimeError: Process ApiServer_0 '
        "(PID: 7) died with exit code -9",
        'Traceback (most recent call last):\n  File "utils.py", line 900, in wait\nRuntimeError: Engine core '
        "initialization failed. See root cause above. Failed core proc(s): {'EngineCore': -9}",
    ],
)
def test_a_process_that_said_nothing_was_killed(told: str) -> None:
    assert cause(told) == SILENT


def test_a_cause_is_short() -> None:
    told = f'Traceback (most recent call last):\n  File "a.py"\nValueError: {"x" * 5000}'
    assert len(str(cause(told))) <= MOST_CHARACTERS + 4


def test_a_record_is_found_among_others(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    videos = {name: VideoRecord(VideoLayout(FrameLayout(4), 3), 16, 3) for name in ("full", "packcache")}
    for blocks, (name, video) in enumerate(videos.items(), 5):
        video.hold(0, blocks, 0)
        with log.open("a") as file:
            file.write("(EngineCore pid=1) INFO 11-25 21:00:00 [metrics.py:1] ")
            file.write(video.line(f"cmpl-{name}-0-aaaa", "length", 7, 0) + "\n")
    assert record_of(log, "cmpl-packcache-")["peak_tokens_by_frame"] == [96]
    assert record_of(log, "cmpl-full-")["peak_tokens_by_frame"] == [80]
    with pytest.raises(OSError, match="no record of the video cmpl-other-"):
        record_of(log, "cmpl-other-")
