"""The command ``vllm-packcache``.

Commands import what they run only when they run: `explain` and ``--help`` must not wait for torch and vLLM.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from vllm_packcache.config.errors import ConfigError
from vllm_packcache.tools.console import one_sentence

app = typer.Typer(
    name="vllm-packcache",
    help="Serve autoregressive video models through vLLM with a KV cache that stays bounded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_convert = typer.Typer(help="Make a folder that vLLM loads of a checkpoint as it is published.", no_args_is_help=True)
app.add_typer(_convert, name="convert")


def main() -> None:
    """Run the command line."""
    app()


def _add_bench() -> None:
    """Add the benchmarks of the checkout that this package is used from; a wheel has none."""
    root = Path(__file__).parents[1]
    if (root / "benchmarks" / "cli.py").is_file():
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
        app.add_typer(importlib.import_module("benchmarks.cli").bench, name="bench")
        return

    @app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        hidden=True,
    )
    def bench() -> None:
        with one_sentence():
            raise ConfigError(
                "the benchmarks are not part of the installed package: clone the repository, install that "
                "(pip install -e .), and run vllm-packcache bench there"
            )


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-packcache {version('vllm-packcache')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="A picture to start from; a scene is made up without one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is to happen, in the demo's words.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos and pictures.")] = Path("out/demo"),
    config: Annotated[
        str,
        typer.Option(help="Preset, YAML or JSON file, or JSON text for packcache, with the layout of this default."),
    ] = "demo",
) -> None:
    """Turn a picture and a sentence into a video, with packcache and with more and less memory."""
    with one_sentence("demo"):
        from vllm_packcache.demo.run import run_demo

        run_demo(image, prompt, out, config)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What is to be seen.")],
    out: Annotated[Path, typer.Option(help="File for the video: .mp4 or .gif. A server's log lies beside it.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a Lumos-1 checkpoint, for which a server is started and stopped.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="For --model: one folder with tokenizer.json (text), encoder.jit and decoder.jit (Cosmos DV4x8x8)."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Address of a server that runs, such as http://127.0.0.1:8000, instead: one with --video-store and "
            "--video-tokenizer, of a Lumos-1 or of a model that makes one token after the other."
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="That the server at --url asks for; by default VLLM_API_KEY of the environment.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Preset, YAML or JSON file, or JSON text for the policy of the server that is started; by default "
            "the preset of this size, and for other sizes the defaults."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture that the video begins with; its middle is cut out to fit.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="A video to continue. 1 + 4 k of its frames are used, up to 3 at its start are not."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Frames of the whole video, with what is given; of Lumos-1 whole seconds at --fps, 48."),
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second; of Lumos-1 8.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; of Lumos-1 a multiple of 32, 672.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; of Lumos-1 a multiple of 32, 384.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same video; of Lumos-1 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Passes for each latent frame, of Lumos-1 alone: 50.")] = None,
    refresh: Annotated[
        int | None,
        typer.Option(help="Of Lumos-1: every so many passes all of a frame is computed; 1."),
    ] = None,
    reuse: Annotated[
        float | None,
        typer.Option(help="Of Lumos-1: a pass before which a smaller share became known is not computed; 0."),
    ] = None,
    guidance_interval: Annotated[
        int | None, typer.Option(help="Of Lumos-1: every so many passes are computed without the prompt too; 1.")
    ] = None,
    guidance_from: Annotated[
        float | None, typer.Option(help="Of Lumos-1: share of the passes before which there is no guidance; 0.")
    ] = None,
    guidance_until: Annotated[
        float | None, typer.Option(help="Of Lumos-1: share of the passes from which on there is none; 1.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How much the prompt counts; 1: no guidance, half the work; of Lumos-1 15.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What is not to be seen, of guided models that make one token after the other."),
    ] = None,
) -> None:
    """Have a model make a video of a sentence, of a picture and a sentence, or go on with a video.

    Options that are left out are Lumos-1's published ones, or what the server at --url has for its model.
    """
    with one_sentence("generate"):
        from vllm_packcache.serving.generate import Wanted, generate

        wanted = Wanted(
            prompt=prompt,
            width=width,
            height=height,
            frames=frames,
            rate=fps,
            seed=seed,
            steps=steps,
            refresh=refresh,
            reuse=reuse,
            guidance_interval=guidance_interval,
            guidance_from=guidance_from,
            guidance_until=guidance_until,
            guidance=guidance,
            negative=negative_prompt,
            image=image,
            video=video,
        )
        generate(wanted, out, model=model, tokenizer=tokenizer, url=url, config=config, api_key=api_key)


@app.command()
def demo_masked(
    image: Annotated[Path | None, typer.Option(help="A picture to start from; text to video without one.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is to happen, in the demo's words.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the videos and pictures.")] = Path("out/demo-masked"),
    config: Annotated[
        str,
        typer.Option(help="Preset, YAML or JSON file, or JSON text for packcache, with the layout of this default."),
    ] = "demo_masked",
) -> None:
    """The same in Lumos-1's way: whole frames in a few passes, with guidance."""
    with one_sentence("demo"):
        from vllm_packcache.demo.masked.run import run_masked_demo

        run_masked_demo(image, prompt, out, config)


@app.command(context_settings={"allow_extra_args": True})
def play(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a checkpoint; the bundled world without one.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Preset, YAML or JSON file, or JSON text for packcache, with sessions: pictures and play; by default "
            "that of the bundled world.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: on all.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="To listen on; any that is free by default.", min=1, max=65535)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="That the page asks for; none by default.", envvar="PACKCACHE_PLAY_KEY")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("out/play"),
) -> None:
    """Play a world model in a browser, until Ctrl-C. What follows MODEL and -- are flags of vLLM."""
    with one_sentence("demo"):
        from vllm_packcache.demo.play.run import run_play

        run_play(model, config, out, host=host, port=port, key=api_key, flags=context.args)


@app.command(context_settings={"allow_extra_args": True})
def playground(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="demo or demo_masked, the bundled models, or the folder of a checkpoint.")
    ] = "demo",
    config: Annotated[
        str | None,
        typer.Option(help="Preset, YAML or JSON file, or JSON text for packcache; by default the bundled model's."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="For --video-tokenizer; by default the bundled model's, and none for a checkpoint."),
    ] = None,
    store: Annotated[Path, typer.Option(help="Folder that videos are kept in.")] = Path("out/videos"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: on all.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="To listen on; any that is free by default.", min=1, max=65535)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="That server and page ask for; none by default.", envvar="PACKCACHE_PLAYGROUND_KEY"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("out/playground"),
) -> None:
    """Make videos in a browser, and see them being made, until Ctrl-C. What follows MODEL and -- are flags of vLLM."""
    with one_sentence("demo"):
        from vllm_packcache.demo.playground import run_playground

        run_playground(model, config, tokenizer, store, out, host=host, port=port, key=api_key, flags=context.args)


@app.command()
def explain(
    config: Annotated[str, typer.Argument(help="Name of a preset, a YAML or JSON file, or JSON text.")] = "demo",
    policy: Annotated[
        str,
        typer.Option(help="Name of a policy. A preset's options are packcache's: others take its layout alone."),
    ] = "packcache",
    frames: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Frames of the video; 12, or all of --sequence.")
    ] = None,
    condition_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens before the first frame; by default a short text and the conditioning image."),
    ] = None,
    negative_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of a guided video of a model that makes one token after the other: tokens of the second stream's "
            "condition. Both streams are shown, as those of models that make whole frames always are.",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV-cache block.")] = 16,
    sequence: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with the video's token ids, condition and frames, as a demo writes it: for selection: "
            "changed, which depends on them; an example by default."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a picture too, as PNG or SVG.")] = None,
) -> None:
    """Show which blocks of the KV cache live while each frame is made, and at which positions the model sees them."""
    from rich.console import Console

    from vllm_packcache.tools import explain as explaining
    from vllm_packcache.tools.figures import check_format

    with one_sentence("calibrate"):
        check_format("--out", out)
        explanation = explaining.explain(
            config,
            policy,
            frames=frames,
            condition_tokens=condition_tokens,
            negative_tokens=negative_tokens,
            block_size=block_size,
            sequence=sequence,
        )
        explaining.print_text(explanation, Console(highlight=False))
        if out is not None:
            explaining.draw(explanation, out)
            typer.echo(f"wrote {out}")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="YAML file for the configuration, for --kv-cache-policy-config.")],
    model: Annotated[
        str, typer.Argument(help="demo or demo_masked, the bundled models, or the folder of a causal LM or a Lumos-1.")
    ] = "demo",
    config: Annotated[
        str | None, typer.Option(help="Preset, YAML or JSON file, or JSON text with the layout of the MODEL's videos.")
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(help='Videos for MODEL, a line each: {"token_ids": [...], "condition_tokens": n}.'),
    ] = None,
    videos: Annotated[int | None, typer.Option(min=1, help="How many videos; 20, or all of the file.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=6, help="Frames of a video; as trained, or as the file's shortest has.")
    ] = None,
    target: Annotated[
        float, typer.Option(help="Share that is to be kept: of all attention, and of what changes.")
    ] = 0.8,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV-cache block.")] = 16,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a picture as PNG or SVG.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers and what is needed to repeat them.")
    ] = None,
) -> None:
    """Measure how attention decays over time and how much changes in the videos, and suggest options that keep it."""
    with one_sentence("calibrate"):
        from vllm_packcache.calibrate.command import run

        run(
            model,
            config,
            sequences,
            out=out,
            videos=videos,
            frames=frames,
            target=target,
            block_size=block_size,
            plot_path=plot_path,
            json_path=json_path,
        )


@_convert.command()
def mineworld(
    checkpoint: Annotated[Path, typer.Argument(help="Lightning's .ckpt file of the model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    frames: Annotated[int, typer.Option(help="Frames that the model was trained on: 16 or 32, as its name says.")],
    dtype: Annotated[str, typer.Option(help="Of the tensors: bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """MineWorld: nothing in the file is run. Prints how to serve what it writes."""
    with one_sentence():
        from rich.console import Console

        from vllm_packcache.convert.mineworld import convert

        convert(checkpoint, out, frames=frames, dtype=dtype, console=Console(highlight=False))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check the installation and say what to do about what is wrong with it."""
    from rich.console import Console

    from vllm_packcache.tools import doctor as checking

    # vLLM logs to stdout, which is ours. A level that the user chose stays.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        checks = checking.run_checks()
    if as_json:
        typer.echo(json.dumps(checking.as_mapping(checks), indent=2))
    else:
        checking.print_table(checks, Console(highlight=False))
    if not checking.healthy(checks):
        raise typer.Exit(1)


_add_bench()
