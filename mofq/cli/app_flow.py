"""The commands that run the whole flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mofq.cli.arguments import Device, Engine, Json, MaxBits, Model, Sequences, Space

flow = typer.Typer()


@flow.command()
def run(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder for everything; by default NAME-mofq, here."),
    ] = None,
    space: Space = "serving",
    max_bits: MaxBits = None,
    max_size: Annotated[
        str | None, typer.Option(help="Bytes of the whole checkpoint, e.g. 5GB or 4.5GiB.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Predicted nats per token; the smallest model within it.")
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE for calibration; repeatable. Bundled text by default."),
    ] = None,
    text: Annotated[str, typer.Option(help="To validate on; not a corpus.")] = "demo-en",
    engine: Engine = None,
    tokens: Annotated[int, typer.Option(help="Of the validation text.", min=2)] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    sequences: Sequences = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """The whole flow into one folder, ready to serve: give a budget, and the engine."""
    from mofq.cli.run import RunOptions, default_output, run_flow

    run_flow(
        RunOptions(
            model=model,
            space=space,
            output=output or default_output(model),
            max_bits=max_bits,
            max_size=max_size,
            max_kl=max_kl,
            corpora=tuple(corpus or ()),
            text=text,
            engine=engine,
            tokens=tokens,
            sequence_length=sequence_length,
            sequences=sequences,
            device=device,
        ),
        as_json=json,
    )


@flow.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder to keep everything in.")
    ] = None,
    json: Json = False,
) -> None:
    """`mofq run` on the small bundled model."""
    from mofq.cli.run import run_demo

    run_demo(output, as_json=json)
