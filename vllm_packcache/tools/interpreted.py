"""vLLM's Model Runner V2 on a machine without a GPU, by Triton's interpreter.

Masked models need that runner, the runner needs Triton, and Triton compiles for GPUs only. Its interpreter runs the
runner's kernels on a CPU: slow beside a GPU, and exactly the code that runs there.

``python -m vllm_packcache.tools.interpreted serve MODEL ...`` is ``vllm serve MODEL ...`` prepared so. vLLM starts its
other processes from the same module, which prepares each of them.
"""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any


def prepare() -> None:
    """Make vLLM see Triton, and Triton interpret. To be called before either is imported, in every process."""
    os.environ["TRITON_INTERPRET"] = "1"
    # Where vLLM compiles a function, PyTorch would ask Triton for a compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import triton.backends

    driver: Any = SimpleNamespace(is_active=lambda: True, get_active_torch_device=lambda: "cpu")
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


if __name__ in ("__main__", "__mp_main__"):
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    prepare()

if __name__ == "__main__":
    # The answer must not start CUDA, which a process that forks could not use any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if torch.cuda.is_available():
        raise SystemExit(
            "error: this machine has a GPU, where vllm serve runs compiled what is interpreted here: use it"
        )
    from vllm.entrypoints.cli.main import main

    try:
        main()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise SystemExit("error: another program listens at this --host and --port: give another --port") from None
