"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Model = Annotated[str, typer.Argument(help="A Hugging Face model folder, or a hub id.")]
Space = Annotated[str, typer.Option(help="A search space: a name of `mofq spaces`, or a file.")]
Engine = Annotated[
    str | None,
    typer.Option(help="A serving engine, of `mofq engines`; NAME:tp=4 on 4 devices."),
]
Device = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, cuda:1 …")]
Stats = Annotated[
    Path | None,
    typer.Option(help="From `mofq calibrate`; needed where schemes are fitted (@nats, ~gptq)."),
]
Cluster = Annotated[
    str | None,
    typer.Option(help="Work on a Ray cluster: 'ray' (on this machine), or ray://HOST:PORT."),
]
ClusterCpus = Annotated[int, typer.Option(help="CPUs of each worker of --cluster.", min=1)]
MaxBits = Annotated[float | None, typer.Option(help="True bits per weight, at most.")]
DeviceModel = Annotated[
    str | None,
    typer.Option(help="Whose figures give times: h100 … of `mofq devices`, or a YAML file."),
]
Workload = Annotated[
    str | None,
    typer.Option(help="decode:batch=8,context=1024 or prefill:prompt=2048, with tp=N."),
]
MaxKvBits = Annotated[
    float | None, typer.Option(help="Bits per cached number: the KV cache is decided too.")
]
KvTokens = Annotated[
    int, typer.Option(help="Of context, whose KV cache counts as size: decided too.", min=0)
]
KvCache = Annotated[
    list[str] | None, typer.Option(help="Formats it may have, beside bf16; repeatable.")
]
OfSpace = Annotated[
    str | None, typer.Option(help="Only this search space of the table; all by default.")
]
OfUnit = Annotated[str | None, typer.Option(help="Of the rows to use; nats where there are.")]
Sequences = Annotated[
    int | None,
    typer.Option(help="Of each corpus; 32 by default, or what a text holds.", min=1),
]
