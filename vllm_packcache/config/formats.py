"""Formats of cached keys and values: bytes, attention backends, cards, and what the plugin can do with them.

Names are vLLM's, as ``--kv-cache-dtype`` takes them. What is said of backends and cards are facts of vLLM 0.32.0, and a
test compares them with the backends' own lists. What is `shown` is run by this package's tests, on a CPU or in Triton's
interpreter; the rest stands in vLLM's source and was not run.

This module is pure: it knows neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from vllm_packcache.config.errors import ConfigError, shown

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU, such as (8, 6)."""

CANVAS_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends without a mask, and with room for any number of rows: those that masked models can use."""

SCALE_BYTES = 4
"""Of a float32, one for each token, head, and key or value."""

UNKNOWN = "unknown"
"""What a turn of a key loses, where nobody has measured it."""

SPARED_LAYERS = 2
"""At either end of the model keep its own precision under TurboQuant; of fewer than 4 layers, as many as fit twice."""


class Machine(NamedTuple):
    """What formats depend on.

    Attributes:
        capability: of the GPU; None: there is none, and models run on the CPU.
        avx512: whether the CPU has AVX-512 or AMX.
    """

    capability: Capability | None
    avx512: bool = False


@dataclass(frozen=True)
class Keeper:
    """An attention backend that keeps a format.

    Args:
        backend: its name.
        least: the least compute capability; None, with no ``most``: it is for CPUs.
        majors: the only major compute capabilities; none: any.
        most: the largest compute capability.
        avx512: whether a CPU must have AVX-512 or AMX.
        shown: whether the tests run it.
        numbers: what it stores where that is not what the format's name says.
    """

    backend: str
    least: Capability | None = None
    majors: tuple[int, ...] = ()
    most: Capability | None = None
    avx512: bool = False
    shown: bool = False
    numbers: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it is for GPUs, and not for CPUs."""
        return self.least is not None

    @property
    def cards(self) -> str:
        """What it needs, in a few words."""
        if self.least is None:
            return "CPUs with AVX-512" if self.avx512 else "CPUs"
        if self.majors:
            return f"GPUs of compute capability {', '.join(f'{major}.x' for major in self.majors)}"
        if self.most is not None:
            return f"GPUs of compute capability {_dotted(self.least)} to {_dotted(self.most)}"
        return "GPUs" if self.least == (0, 0) else f"GPUs of compute capability {_dotted(self.least)} or more"

    def runs_on(self, machine: Machine) -> bool:
        """Whether the machine has what it needs."""
        if self.least is None or machine.capability is None:
            return not self.on_gpu and machine.capability is None and (machine.avx512 or not self.avx512)
        if self.majors and machine.capability[0] not in self.majors:
            return False
        return self.least <= machine.capability and (self.most is None or machine.capability <= self.most)


@dataclass(frozen=True)
class Format:
    """How a key and a value are stored.

    Args:
        name: as ``--kv-cache-dtype`` takes it.
        keepers: the backends that keep it.
        key_bits: of a number of a key, with what several numbers share; None: as many as the model's own.
        value_bits: of a number of a value.
        extra_bytes: of a key and its value beside their numbers.
        numbers: PyTorch's name of the type of a key's numbers, where they are bytes that a key can be read from.
        scaled: whether every token and head has a scale of its own.
        loses: the error of a key that has been turned once, as a share of its length and too large to turn it in place,
            or `UNKNOWN`; empty: it may be turned. Of random keys of 128 channels.
        causal_only: whether its attention always hides what comes later, as no frame of a masked model may be.
        spares_layers: whether `SPARED_LAYERS` keep the model's own precision.
    """

    name: str
    keepers: tuple[Keeper, ...]
    key_bits: Fraction | int | None = None
    value_bits: Fraction | int | None = None
    extra_bytes: int = 0
    numbers: str | None = None
    scaled: bool = False
    loses: str = ""
    causal_only: bool = False
    spares_layers: bool = False

    def pair_bytes(self, head_size: int, itemsize: int) -> int:
        """Bytes of the key and the value of a token and head.

        Source: ``customize_spec`` of vLLM's attention backends, and ``AttentionSpec.state_content_size_bytes``.

        Args:
            head_size: numbers of a key, and of a value.
            itemsize: bytes of a number of the model's own precision.
        """
        key, value = (8 * itemsize if bits is None else bits for bits in (self.key_bits, self.value_bits))
        size = -(-head_size * key // 8) - (-head_size * value // 8) + self.extra_bytes
        # TurboQuant's are even; all others are so anyhow.
        return int(size + size % 2)

    def token_bytes(self, layers: int, kv_heads: int, head_size: int, itemsize: int) -> int:
        """Bytes of the keys and values of a token in all layers.

        Args:
            layers: of the model, all of them attention.
            kv_heads: of a layer.
            head_size: see `pair_bytes`.
            itemsize: see `pair_bytes`.
        """
        spared = 2 * min(SPARED_LAYERS, layers // 2) if self.spares_layers else 0
        own = FORMATS["auto"].pair_bytes(head_size, itemsize)
        return kv_heads * ((layers - spared) * self.pair_bytes(head_size, itemsize) + spared * own)

    def numbers_in(self, backend: str) -> str | None:
        """`numbers` in the caches of a backend."""
        return next((own.numbers for own in self.keepers if own.backend == backend and own.numbers), self.numbers)

    def masked_keepers(self) -> tuple[Keeper, ...]:
        """Those of `keepers` that masked models can use."""
        if self.causal_only:
            return ()
        return tuple(keeper for keeper in self.keepers if keeper.backend in CANVAS_BACKENDS)


def find(name: str) -> Format:
    """The format of this name.

    Raises:
        ConfigError: there is none that the plugin knows.
    """
    if name in FORMATS:
        return FORMATS[name]
    reason = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
    raise ConfigError(f"--kv-cache-dtype must be one of {', '.join(FORMATS)}, not {shown(name)}{reason}")


def check_turned(name: str) -> None:
    """Check that keys of a cache of this format may be turned in place.

    Raises:
        ConfigError: they may not.
    """
    known = FORMATS.get(name)
    if known is not None and not known.loses:
        return
    much = (
        "not known"
        if known is None or known.loses == UNKNOWN
        else f"too much, an error of {known.loses} after the first"
    )
    eight = ", ".join(own.name for own in FORMATS.values() if own.numbers and not own.loses)
    raise ConfigError(
        f"positions: rebase turns cached keys in place, and what each turn would lose of a key of {shown(name)} is "
        f"{much}: choose auto or 8 bits ({eight}) with --kv-cache-dtype, or set positions: absolute"
    )


def check_kept(name: str, backend: str) -> None:
    """Check that an attention backend keeps this format; what another one than those of `FORMATS` does is not known.

    vLLM does not on CPUs: it takes any name there, and what it stores is something else.

    Raises:
        ConfigError: it does not.
    """
    kept = [own.name for own in FORMATS.values() if any(keeper.backend == backend for keeper in own.keepers)]
    if kept and name not in kept:
        raise ConfigError(
            f"--kv-cache-dtype {shown(name)} is none of attention backend {backend}: choose one of {', '.join(kept)}, "
            "or another backend with --attention-backend on a GPU"
        )


def check_masked(name: str) -> None:
    """Check that the attention of a masked model can read a cache of this format.

    Raises:
        ConfigError: it cannot.
    """
    known = FORMATS.get(name)
    if known is not None and known.masked_keepers():
        return
    usable = ", ".join(own.name for own in FORMATS.values() if own.masked_keepers())
    why = (
        "vLLM reads it with causal attention only, and a frame sees all of itself"
        if known is not None and known.causal_only
        else f"none of {', '.join(CANVAS_BACKENDS)} keeps it"
    )
    raise ConfigError(
        f"--kv-cache-dtype {shown(name)} is not for models that make whole frames: {why}: choose one of {usable}"
    )


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


_ANY, _AMPERE, _ADA = (0, 0), (8, 0), (8, 9)
_CPU, _CPU_BYTES = Keeper("CPU_ATTN", shown=True), Keeper("CPU_ATTN", avx512=True, shown=True)
_TRITON = Keeper("TRITON_ATTN", _ANY)
_FLASH, _FLASHINFER = Keeper("FLASH_ATTN", _AMPERE), Keeper("FLASHINFER", _AMPERE, most=(12, 1))
# FlashAttention 3 on Hopper, 4 on Blackwell.
_FLASH_BYTES = Keeper("FLASH_ATTN", (9, 0), (9, 10))
_TURBO = (Keeper("TURBOQUANT", _AMPERE),)


def _all() -> Iterator[Format]:
    shown_triton, flex = Keeper("TRITON_ATTN", _ANY, shown=True), Keeper("FLEX_ATTENTION", _ANY)
    yield Format("auto", (_CPU, _FLASH, shown_triton, _FLASHINFER, Keeper("FLEX_ATTENTION", _ANY, shown=True)))
    yield Format("float16", (_FLASH, _TRITON, _FLASHINFER, flex), 16, 16)
    yield Format("bfloat16", (_FLASH, Keeper("TRITON_ATTN", _AMPERE), _FLASHINFER, flex), 16, 16)
    for name in ("fp8", "fp8_e4m3"):
        keepers = (_CPU_BYTES, _FLASH_BYTES, Keeper("TRITON_ATTN", _ADA), _FLASHINFER)
        yield Format(name, keepers, 8, 8, numbers="float8_e4m3fn")
    # Whatever the name says, Triton's backend stores what its platform prefers.
    triton = Keeper("TRITON_ATTN", _ADA, numbers="float8_e4m3fn")
    yield Format("fp8_e5m2", (_CPU_BYTES, triton, _FLASHINFER), 8, 8, numbers="float8_e5m2")
    scales = 2 * SCALE_BYTES
    yield Format("int8_per_token_head", (shown_triton,), 8, 8, scales, numbers="int8", scaled=True)
    floats = (Keeper("TRITON_ATTN", _ADA),)
    yield Format("fp8_per_token_head", floats, 8, 8, scales, numbers="float8_e4m3fn", scaled=True)
    some, more = "14 %", "26 %"
    yield Format("int4_per_token_head", (_TRITON,), 4, 4, scales, scaled=True, loses=some, causal_only=True)
    # Two numbers in a byte, and a byte that 16 of them share.
    nvfp4 = Fraction(9, 2)
    on_most = Keeper("FLASHINFER", _AMPERE, (8, 9, 10, 12), (12, 1))
    yield Format("nvfp4", (on_most,), nvfp4, nvfp4, loses=UNKNOWN)
    yield Format("nvfp4_4over6", (Keeper("FLASHINFER", (10, 0), (10,)),), nvfp4, nvfp4, loses=UNKNOWN)
    # A scale and a zero point of a value, and the length of a key, in 2 bytes each.
    for name, key, value, extra, loses in (
        ("turboquant_k8v4", 8, 4, 4, UNKNOWN),
        ("turboquant_4bit_nc", 4, 4, 6, some),
        ("turboquant_k3v4_nc", 3, 4, 6, more),
        ("turboquant_3bit_nc", 3, 3, 6, more),
    ):
        yield Format(name, _TURBO, key, value, extra, loses=loses, causal_only=True, spares_layers=True)


FORMATS = {own.name: own for own in _all()}
"""By name, from most to fewest bits."""

ELSEWHERE = {
    "fp8_inc": "it is for Gaudi",
    "fp8_ds_mla": "it is for MLA latents",
    "nvfp4_ds_mla": "it is for MLA latents",
    "ultraquant_4bit": "it is for AMD GPUs",
}
"""Formats of vLLM that no model or platform of the plugin has, and why."""
