"""Train the small models that `mofq demo` and the tests use, and cut their texts.

    python -m scripts.make.train_demo_model --text en=handbook-en.txt --text pt=handbook-pt-br.txt \
        -o mofq/demo
    python -m scripts.make.train_demo_model --text en=handbook-en.txt --text pt=handbook-pt-br.txt \
        -o mofq/demo --mixture

Each text is a file of paragraphs separated by blank lines. Of every language
about 30 kB are held out in runs of consecutive paragraphs; training
paragraphs that nearly repeat a held-out one are dropped. The folder gets
`model/` (weights, tokenizer, model card) and `texts/` (held-out and
calibration text per language). With `--mixture` it gets `mixture/`, a mixture
of experts that is trained in the same way on the same text: the texts that are
there must be the ones that it would cut. One thread, one seed: the same
machine gives the same weights again.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from scripts.make import demo_mixture
from scripts.shared.command import script_parser

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 512
STEPS = 1500
DENSE_SHAPE = "hidden 128, intermediate 384, 4 query and 2 key-value heads of 32"
RUN_OF_PARAGRAPHS = 6
SHINGLE_WORDS = 5
NEAR_DUPLICATE = 0.15
FUNCTION_WORDS = {
    "en": {"the", "of", "to", "and", "is", "in", "that", "for", "with", "this", "be", "it"},
    "pt": {"de", "o", "que", "e", "do", "da", "em", "um", "uma", "para", "com", "não", "os", "as"},
}


def read_paragraphs(path: Path, language: str) -> list[str]:
    """The paragraphs of a file that are in its language (translations leave some as they were)."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", path.read_text("utf-8"))]
    return [p for p in paragraphs if p and is_in_language(p, language)]


def is_in_language(paragraph: str, language: str) -> bool:
    """Whether the paragraph has more function words of its language than of any other."""
    words = re.findall(r"\w+", paragraph.lower())
    counts = {name: sum(w in known for w in words) for name, known in FUNCTION_WORDS.items()}
    return all(counts[language] > n for name, n in counts.items() if name != language)


def shingles(paragraph: str) -> set[tuple[str, ...]]:
    """All runs of five words."""
    words = re.findall(r"\w+", paragraph.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def hold_out(
    paragraphs: list[str], wanted_bytes: int, *, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) paragraphs, without near duplicates between the two.

    Args:
        paragraphs: In the order of the book.
        wanted_bytes: Of held-out text; runs are taken until it is reached.
        rng: Chooses the runs.

    Returns:
        Training paragraphs and held-out paragraphs, each in the order of the book.
    """
    starts = list(range(0, len(paragraphs) - RUN_OF_PARAGRAPHS, RUN_OF_PARAGRAPHS))
    rng.shuffle(starts)
    held: set[int] = set()
    while sum(len(paragraphs[i].encode()) + 2 for i in held) < wanted_bytes:
        start = starts.pop()
        held |= set(range(start, start + RUN_OF_PARAGRAPHS))
    seen = set().union(*(shingles(paragraphs[i]) for i in held))
    training = []
    for i, paragraph in enumerate(paragraphs):
        own = shingles(paragraph)
        if i not in held and len(own & seen) <= NEAR_DUPLICATE * max(1, len(own)):
            training.append(paragraph)
    return training, [paragraphs[i] for i in sorted(held)]


def train_tokenizer(paragraphs: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, saved as an ordinary `PreTrainedTokenizerFast`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """An untrained model whose every in_features is a multiple of 128."""
    if arguments.mixture:
        return demo_mixture.build(
            vocabulary=arguments.vocabulary, context=CONTEXT, seed=arguments.seed
        )
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # keeps the residual stream's scale independent of depth
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= math.sqrt(2 * arguments.layers)
    return model


def batches(
    streams: dict[str, torch.Tensor], sequences: int, *, rng: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless batches [sequences, CONTEXT + 1], the languages taking turns, no window cut twice.

    Each pass over a language starts at a random offset, so that windows differ between passes.
    """
    queues: dict[str, list[torch.Tensor]] = {language: [] for language in streams}
    while True:
        rows = []
        for i in range(sequences):
            language = list(streams)[i % len(streams)]
            if not queues[language]:
                stream = streams[language]
                offset = int(torch.randint(CONTEXT, (1,), generator=rng))
                windows = stream[offset:].unfold(0, CONTEXT + 1, CONTEXT)
                order = torch.randperm(len(windows), generator=rng)
                queues[language] = list(windows[order])
            rows.append(queues[language].pop())
        yield torch.stack(rows)


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up over the first 3 %, then a cosine to a hundredth."""
    warm_up = max(1, round(0.03 * arguments.steps))
    if step < warm_up:
        return float(arguments.learning_rate * (step + 1) / warm_up)
    done = (step - warm_up) / max(1, arguments.steps - warm_up)
    return float(arguments.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))))


def build_optimizer(model: PreTrainedModel, arguments: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": arguments.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train(
    model: PreTrainedModel,
    streams: dict[str, torch.Tensor],
    *,
    arguments: argparse.Namespace,
    report: Callable[[], str],
) -> str:
    """Train in place; returns the last line of the log. `report` watches the held-out text."""
    optimizer = build_optimizer(model, arguments)
    rng = torch.Generator().manual_seed(arguments.seed)
    source = batches(streams, arguments.batch, rng=rng)
    model.train()
    started, line, smooth = time.monotonic(), "", math.nan
    for step in range(arguments.steps):
        rate = learning_rate(step, arguments)
        for group in optimizer.param_groups:
            group["lr"] = rate
        window_BT = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=window_BT[:, :-1], use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1).float(), window_BT[:, 1:].flatten()
        )
        optimizer.zero_grad(set_to_none=True)
        (loss + demo_mixture.imbalance(output)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49 or step + 1 == arguments.steps:
            tokens = (step + 1) * arguments.batch * CONTEXT
            line = (
                f"step {step + 1}/{arguments.steps} tokens {tokens} "
                f"loss {smooth:.4f} nats/token lr {rate:.2e} "
                f"{time.monotonic() - started:.0f} s"
            )
            print(line, report() if step % 200 == 199 else "", flush=True)
            model.train()
    return line


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Mean cost of the text, each token but the first predicted from those before it."""
    model.eval()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT - 1):
        window_T = ids[start : start + CONTEXT]
        log_probs = model(input_ids=window_T[None, :-1]).logits[0].double().log_softmax(-1)
        nats -= log_probs.gather(1, window_T[1:, None]).sum().item()
    predicted_bytes = len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
    return nats / math.log(2) / predicted_bytes


MODEL_CARD = """---
license: [gpl-2.0-or-later, cc-by-sa-3.0]
language: [{languages}]
---

# {title}

{introduction}

| | |
| --- | --- |
| parameters | {parameters:,} (bfloat16, tied embeddings) |
| shape | {shape} |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on the same text |
| training | {training} |

Made by `scripts/make/train_demo_model.py{option}` with one thread and torch {torch}. The last
line of the training log:

```
{last_line}
```

Bits per byte on the held-out text (`../texts/heldout-*.txt`), measured with
the saved bfloat16 weights in float32 arithmetic, in windows of {context} tokens:

{scores}
{experts}
Nothing of the held-out text was trained on, nor any paragraph that nearly
repeats it in the same language; translations of it may have been.
`../texts/calibration-*.txt` are excerpts of the training text.

## Source and licence

The texts are excerpts of *The Debian Administrator's Handbook* by Raphaël
Hertzog and Roland Mas, in English and in its Brazilian Portuguese
translation, <https://debian-handbook.info>, licensed under the GNU General
Public License, version 2 or later, or the Creative Commons
Attribution-ShareAlike 3.0 Unported licence, at the reader's choice. The
excerpts and this model, which was trained on the book alone, are offered
under the same terms.
"""
INTRODUCTIONS = {
    "model": (
        "The demonstration model of mofq",
        """A small Llama that was really trained, so that quantizing it costs what
quantizing a language model costs. It knows one book in two languages and is
good for nothing but showing and testing `mofq`.""",
    ),
    "mixture": (
        "The demonstration mixture of experts of mofq",
        """A small Qwen3-MoE that was really trained, so that quantizing it costs what
quantizing a mixture of experts costs, tokens that change their experts
included. It knows the same book as the dense model beside it, and is good for
nothing but showing and testing `mofq`.""",
    ),
}
EXPERTS_OF_TOKENS = """
Share of the held-out tokens that visit each expert ({active} of {experts} in each decoder layer):

{shares}
"""


def model_card(
    arguments: argparse.Namespace,
    scores: dict[str, dict[str, float]],
    *,
    log: str,
    parameters: int,
    tokens: int,
    experts: str,
) -> str:
    """The README of the model folder.

    Args:
        arguments: Of the command line.
        scores: Bits per byte, by folder and language.
        log: Last line of the training.
        parameters: Their number.
        tokens: Of the training text.
        experts: What is said of them; nothing of a dense model.
    """
    passes = arguments.steps * arguments.batch * CONTEXT / tokens
    title, introduction = INTRODUCTIONS[arguments.folder]
    layers, shape = (
        (demo_mixture.LAYERS, demo_mixture.SHAPE)
        if arguments.mixture
        else (arguments.layers, DENSE_SHAPE)
    )
    return MODEL_CARD.format(
        languages=", ".join(arguments.text),
        title=title,
        introduction=introduction,
        parameters=parameters,
        shape=f"{layers} decoder layers, {shape}",
        vocabulary=arguments.vocabulary,
        training=f"seed {arguments.seed}; {arguments.steps} steps of {arguments.batch} sequences "
        f"of {CONTEXT} tokens, {passes:.1f} passes over the text; AdamW, learning rate "
        f"{arguments.learning_rate:g}, weight decay {arguments.weight_decay:g}",
        option=" --mixture" if arguments.mixture else "",
        torch=torch.__version__.split("+")[0],
        last_line=log,
        context=CONTEXT,
        scores=scores_table(scores),
        experts=experts,
    )


def scores_table(scores: dict[str, dict[str, float]]) -> str:
    """Bits per byte by language, a column for each folder; one folder needs no name."""
    names = ["bits per byte"] if len(scores) == 1 else [f"`{folder}`" for folder in scores]
    lines = [["language", *names], ["---"] * (1 + len(names))]
    for language in next(iter(scores.values())):
        lines.append([language, *(f"{of_folder[language]:.3f}" for of_folder in scores.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> PreTrainedModel:
    """Write bfloat16 weights and the tokenizer; returns the model read back in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    config = folder / "tokenizer_config.json"  # the class's name in every release of transformers
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def excerpt(paragraphs: list[str], wanted_bytes: int) -> str:
    """Paragraphs spread evenly over the whole, about as long as asked."""
    total = sum(len(p.encode()) + 2 for p in paragraphs)
    stride = max(1, total // wanted_bytes)
    return "\n\n".join(paragraphs[::stride]) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--text", action="append", required=True, metavar="LANGUAGE=FILE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, e.g. mofq/demo")
    parser.add_argument("--mixture", action="store_true", help="the mixture of experts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"{STEPS}; of the mixture {demo_mixture.STEPS}")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--heldout-bytes", type=int, default=30_000)
    parser.add_argument("--calibration-bytes", type=int, default=40_000)
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = demo_mixture.STEPS if arguments.mixture else STEPS
    arguments.folder = "mixture" if arguments.mixture else "model"
    arguments.text = dict(item.split("=", 1) for item in arguments.text)
    if unknown := set(arguments.text) - set(FUNCTION_WORDS):
        parser.error(f"--text: unknown languages {sorted(unknown)}, known: {list(FUNCTION_WORDS)}")
    return arguments


def read_splits(arguments: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Training paragraphs and held-out text of each language."""
    training: dict[str, list[str]] = {}
    held_out: dict[str, str] = {}
    for language, path in arguments.text.items():
        paragraphs = read_paragraphs(Path(path), language)
        training[language], held = hold_out(
            paragraphs, arguments.heldout_bytes, rng=random.Random(arguments.seed)
        )
        held_out[language] = "\n\n".join(held) + "\n"
    return training, held_out


def write_texts(
    folder: Path, training: dict[str, list[str]], *, held_out: dict[str, str], wanted_bytes: int
) -> None:
    """Write the held-out and the calibration text of each language."""
    folder.mkdir(parents=True)
    for language, paragraphs in training.items():
        (folder / f"heldout-{language}.txt").write_text(held_out[language], "utf-8")
        calibration = excerpt(paragraphs, wanted_bytes)
        (folder / f"calibration-{language}.txt").write_text(calibration, "utf-8")


def check_texts(written: Path, bundled: Path) -> None:
    """Refuse a mixture that is trained on another text than the dense model beside it."""
    for path in written.iterdir():
        if path.read_bytes() != (bundled / path.name).read_bytes():
            raise SystemExit(f"{bundled / path.name}: was cut from another text, or otherwise")


def main() -> None:
    """Cut the texts, train, measure, write."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    training, held_out = read_splits(arguments)
    tokenizer = train_tokenizer([p for ps in training.values() for p in ps], arguments.vocabulary)
    streams = {
        language: torch.tensor(tokenizer("\n\n".join(paragraphs))["input_ids"])
        for language, paragraphs in training.items()
    }
    temporary, output = arguments.output / f".training-{os.getpid()}", arguments.output
    write_texts(
        temporary / "texts", training, held_out=held_out, wanted_bytes=arguments.calibration_bytes
    )
    if arguments.mixture:
        check_texts(temporary / "texts", output / "texts")
    model = build_model(arguments)
    parameters, tokens = model.num_parameters(), sum(len(s) for s in streams.values())
    print(f"{parameters} parameters, {tokens} training tokens", flush=True)

    def score(model: PreTrainedModel = model) -> dict[str, float]:
        return {k: bits_per_byte(model, tokenizer, text) for k, text in held_out.items()}

    log = train(model, streams, arguments=arguments, report=lambda: f"held-out {score()}")
    if arguments.mixture:
        model.config.output_router_logits = False  # of the training only
    saved = save(model, tokenizer, temporary / arguments.folder)
    scores, experts = {arguments.folder: score(saved)}, ""
    if arguments.mixture:
        dense = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
        scores = {"model": score(dense), **scores}
        ids_T = torch.tensor(tokenizer("\n\n".join(held_out.values()))["input_ids"])
        shares_LE = demo_mixture.token_shares(saved, ids_T, CONTEXT)
        experts = EXPERTS_OF_TOKENS.format(
            active=demo_mixture.ACTIVE,
            experts=demo_mixture.EXPERTS,
            shares=demo_mixture.shares_table(shares_LE),
        )
    print(f"held-out bits per byte of the saved model: {scores}", flush=True)
    card = model_card(
        arguments, scores, log=log, parameters=parameters, tokens=tokens, experts=experts
    )
    (temporary / arguments.folder / "README.md").write_text(card, "utf-8")
    for name in (arguments.folder, *(() if arguments.mixture else ("texts",))):
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(temporary / name, output / name)
    shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
