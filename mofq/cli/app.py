"""The commands of the flow, their arguments and options; `app_*` have the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mofq.cli.app_flow import flow
from mofq.cli.app_reading import reading, recipe
from mofq.cli.arguments import (
    Cluster,
    ClusterCpus,
    Device,
    DeviceModel,
    Engine,
    Json,
    KvCache,
    KvTokens,
    MaxBits,
    MaxKvBits,
    Model,
    OfSpace,
    OfUnit,
    Sequences,
    Space,
    Stats,
    Workload,
)
from mofq.cli.terminal import next_step

RECIPE = "recipe.yaml"

app = typer.Typer(
    name="mofq",
    help="Mixtures of number formats for language models: measure every choice in nats, "
    "decide under a budget, apply, validate, export.",
    epilog="Start with `mofq demo`. For a model of yours, all at once: `mofq run MODEL --engine "
    "vllm-hopper --max-bits 5`; step by step: inspect, calibrate, measure, search, validate, "
    "export. Each command says which comes next.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mofq import __version__

        typer.echo(f"mofq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options of mofq itself."""


@app.command()
def inspect(
    model: Model,
    engine: Engine = None,
    space: Annotated[
        str | None, typer.Option(help="What of this search space fits (w8a8).")
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Count the lm_head too.")] = False,
    json: Json = False,
) -> None:
    """List linear layers and fusion groups, from headers alone."""
    from mofq.cli.inspect import run_inspect

    run_inspect(model, engine=engine, space=space, include_lm_head=lm_head, as_json=json)
    if not json:
        next_step("calibrate", model, "--corpus", "en=TEXT.txt", "-o", "stats")


@app.command()
def calibrate(
    model: Model,
    corpus: Annotated[list[str], typer.Option(help="NAME=FILE, or a hub data set; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The stats folder.")],
    sequences: Sequences = None,
    keep: Annotated[int, typer.Option(help="Of how many the samples are kept.", min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 512,
    draws: Annotated[int, typer.Option(help="Random draws for each sequence.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the arithmetic: float32 or bfloat16.")] = "float32",
    device: Device = "cpu",
    device_map: Annotated[str | None, typer.Option(help="Spread over devices, e.g. auto.")] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option(help="Recompute decoder layers instead of keeping activations.")
    ] = False,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache", help="Keep cached keys and values too, for their format.")
    ] = False,
    cluster: Cluster = None,
    cluster_cpus: ClusterCpus = 1,
    json: Json = False,
) -> None:
    """Run the model once over some text and keep what scoring needs."""
    from mofq.cli.calibrate import CalibrateOptions, run_calibrate

    run_calibrate(
        CalibrateOptions(
            model=model,
            corpora=tuple(corpus),
            output=output,
            sequences=sequences,
            keep=keep,
            sequence_length=sequence_length,
            draws=draws,
            seed=seed,
            dtype=dtype,
            device=device,
            device_map=device_map,
            activation_checkpointing=activation_checkpointing,
            kv_cache=kv_cache,
            cluster=cluster,
            cluster_cpus=cluster_cpus,
        ),
        as_json=json,
    )
    if not json:
        measured = ("--stats", output, "-o", output.parent / "table.jsonl")
        next_step("measure", model, "--space", "serving", "--engine", "ENGINE", *measured)


@app.command()
def rewrite(
    model: Model,
    stats: Annotated[Path, typer.Option(help="From `mofq calibrate`.")],
    method: Annotated[str, typer.Option(help="smoothquant, awq or bismooth.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    scheme: Annotated[
        str | None,
        typer.Option(help="That it is to be quantized by, e.g. int8.channel+int8.token."),
    ] = None,
    powers_of_two: Annotated[
        bool, typer.Option("--powers-of-two", help="Move powers of two alone: exact in bf16.")
    ] = False,
    json: Json = False,
) -> None:
    """Move scales between tensors so that the model computes the same and quantizes better."""
    from mofq.cli.rewrite import run_rewrite

    run_rewrite(
        model,
        stats=stats,
        method=method,
        scheme=scheme,
        powers_of_two=powers_of_two,
        output=output,
        as_json=json,
    )


@app.command()
def measure(
    model: Model,
    space: Space,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table, table.jsonl.")],
    stats: Annotated[Path | None, typer.Option(help="From `mofq calibrate`.")] = None,
    engine: Engine = None,
    device: Device = "cpu",
    cluster: Cluster = None,
    cluster_cpus: ClusterCpus = 1,
    json: Json = False,
) -> None:
    """Measure every scheme of a search space on the weights."""
    from mofq.cli.measure import Where, run_measure

    where = Where(device, cluster, cluster_cpus)
    run_measure(
        model, space=space, output=output, stats=stats, engine=engine, where=where, as_json=json
    )
    if not json:
        named = () if engine is None else ("--engine", engine)
        next_step("search", output, *named, "--max-bits", "BITS", "-o", output.parent / RECIPE)


@app.command()
def search(
    table: Annotated[Path, typer.Argument(help="From `mofq measure`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe, recipe.yaml.")],
    solver: Annotated[str, typer.Option(help="exact, greedy or optuna.")] = "exact",
    engine: Engine = None,
    max_bits: MaxBits = None,
    max_size: Annotated[
        str | None, typer.Option(help="Bytes of the whole checkpoint, e.g. 5GB or 4.5GiB.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Predicted nats per token.")] = None,
    max_finer: Annotated[
        float | None, typer.Option(help="Share of linear layers that leave the base schemes.")
    ] = None,
    max_time: Annotated[
        str | None, typer.Option(help="Least time of the workload on the device, e.g. 12ms.")
    ] = None,
    max_kv_bits: MaxKvBits = None,
    kv_tokens: KvTokens = 0,
    kv_cache: KvCache = None,
    device_model: DeviceModel = None,
    workload: Workload = None,
    explain: Annotated[
        list[str] | None, typer.Option(help="Why this layer has its scheme; repeatable.")
    ] = None,
    space: OfSpace = None,
    unit: OfUnit = None,
    objective: Annotated[str, typer.Option(help="Over corpora: mean or worst-corpus.")] = "mean",
    ties: Annotated[
        str, typer.Option(help="on: choices within noise go to the simpler scheme.")
    ] = "on",
    model: Annotated[str | None, typer.Option(help="For --refine and optuna.")] = None,
    text: Annotated[str | None, typer.Option(help="For --refine and optuna.")] = None,
    refine: Annotated[
        int, typer.Option(help="Measure this many swaps on the real model.", min=0)
    ] = 0,
    tokens: Annotated[
        int, typer.Option(help="Of the text, for --refine and optuna.", min=2)
    ] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    device: Device = "cpu",
    stats: Stats = None,
    trials: Annotated[int, typer.Option(help="Of optuna; earlier ones count.", min=1)] = 60,
    multi_objective: Annotated[
        bool,
        typer.Option("--multi-objective", help="Of optuna: true bits as a second objective."),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(help="Of optuna: a URL, an SQLite or journal file; beside -o by default."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes of optuna.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of optuna's proposals.")] = 0,
    json: Json = False,
) -> None:
    """Choose one scheme for each fusion group under a budget."""
    from mofq.cli.search import run_search
    from mofq.cli.search_options import SearchOptions

    run_search(
        SearchOptions(
            table=table,
            output=output,
            solver=solver,
            engine=engine,
            max_bits=max_bits,
            max_size=max_size,
            max_kl=max_kl,
            max_finer=max_finer,
            max_time=max_time,
            max_kv_bits=max_kv_bits,
            kv_tokens=kv_tokens,
            kv_formats=tuple(kv_cache or ()),
            device_model=device_model,
            workload=workload,
            explain=tuple(explain or ()),
            space=space,
            unit=unit,
            objective=objective,
            ties=ties,
            model=model,
            text=text,
            refine=refine,
            tokens=tokens,
            sequence_length=sequence_length,
            device=device,
            stats=stats,
            trials=trials,
            multi_objective=multi_objective,
            storage=storage,
            workers=workers,
            seed=seed,
        ),
        as_json=json,
    )


@app.command()
def validate(
    model: Model,
    recipe_or_folder: Annotated[
        str, typer.Argument(help="A recipe, or a compressed-tensors folder.")
    ],
    text: Annotated[
        list[str],
        typer.Option(help="[NAME=]text file, hub data set or bundled text; repeatable."),
    ],
    tokens: Annotated[
        int,
        typer.Option(
            help="How many tokens of the text, at most, in windows spread over it.", min=2
        ),
    ] = 8192,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    dtype: Annotated[str, typer.Option(help="Of both models' arithmetic.")] = "float32",
    device: Device = "cpu",
    stats: Stats = None,
    backend: Annotated[str, typer.Option(help="What applies the recipe: emulate or torchao.")] = (
        "emulate"
    ),
    emulate: Annotated[
        list[str] | None,
        typer.Option(help="Layers, e.g. '*', to emulate where torchao has no kernel; repeatable."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-eval tasks, by commas or repeated.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="With task files of lm-eval's format.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Items of each task.", min=1)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write validation.json.")
    ] = None,
    json: Json = False,
) -> None:
    """Prove that a recipe is applied; measure what it does."""
    from mofq.cli.validate import run_validate, suggest_export

    run_validate(
        model,
        recipe_or_folder,
        texts=text,
        tokens=tokens,
        sequence_length=sequence_length,
        dtype=dtype,
        device=device,
        stats=stats,
        backend=backend,
        emulated=tuple(emulate or ()),
        tasks=tuple(tasks or ()),
        task_folder=task_folder,
        task_limit=task_limit,
        output=output,
        as_json=json,
    )
    if not json:
        suggest_export(model, recipe_or_folder)


@app.command()
def export(
    model: Model,
    recipe: Annotated[Path, typer.Argument(help="From `mofq search`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder, or file, to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors; torchao, llm-compressor, modelopt, auto-round or llama.cpp. "
            "What the engine reads by default."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Refuse what it cannot serve; the recipe's by default.")
    ] = None,
    stats: Stats = None,
    json: Json = False,
) -> None:
    """Write a quantized checkpoint that a serving engine loads."""
    from mofq.cli.export import run_export

    run_export(model, recipe, to=to, output=output, engine=engine, stats=stats, as_json=json)


app.add_typer(flow)
app.add_typer(reading)
app.add_typer(recipe, name="recipe")
