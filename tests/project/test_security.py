"""Nobody is let in: nothing is unpickled, fetched, run or read that the user did not name."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import DEMO, Measured, mofq, ok, refused
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent.parent
TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")
SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")

#: Modules that turn bytes into objects of any class, or text into code.
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
#: Functions that do so, and what makes others harmless.
LOADERS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}
RUNNERS = {"eval", "exec", "compile", "os.system", "os.popen"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def sources() -> list[Path]:
    return sorted([*(ROOT / "mofq").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what could run a stranger's code."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in UNPICKLERS)  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in LOADERS | RUNNERS or name.endswith(".from_pickle"):
            yield node.lineno, name
        for key in ("shell", "allow_pickle", "trust_remote_code"):
            value = keywords.get(key)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield node.lineno, f"{name}({key}=…)"
        if name.endswith(".from_pretrained") and "trust_remote_code" not in keywords:
            yield node.lineno, f"{name} without trust_remote_code=False"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "yaml.load(text, Loader)",
        "np.load(path)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "np.fromfile(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_what_could_run_a_strangers_code_is_seen(code: str) -> None:
    assert list(dangers(ast.parse(code)))


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        for line, name in dangers(ast.parse(path.read_text("utf-8")))
        # Scripts load models that they made or that their user names.
        if "without trust_remote_code" not in name or "mofq" in path.relative_to(ROOT).parts
    ]
    assert found == []


#: Runs mofq where every name lookup and connection is noted and refused.
WITHOUT_NETWORK = """
import socket, sys
def refuse(*arguments, **options):
    with open(sys.argv[1], "a") as log:
        print(arguments[-1] if arguments else "", file=log)
    raise OSError("no network here")
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
connect = socket.socket.connect
def checked(self, address):
    return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)
socket.socket.connect = socket.socket.connect_ex = checked
sys.argv = ["mofq", *sys.argv[2:]]
from mofq.cli import main
main()
"""


@pytest.mark.long
def test_the_whole_flow_asks_nothing_of_a_network(tmp_path: Path) -> None:
    space, log = tmp_path / "space.yaml", tmp_path / "asked"
    space.write_text("version: 1\nschemes: [int4.g64, int8.channel]\n")
    run = ("run", DEMO, "--space", space, "--max-bits", "6", "--engine", "vllm-hopper")
    size = ("--sequences", "2", "--sequence-length", "64", "--tokens", "128")
    command = [sys.executable, "-c", WITHOUT_NETWORK, log, *run, *size, "-o", tmp_path / "out"]
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    ran = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not log.exists(), log.read_text()


@pytest.mark.parametrize("where", ["root", "inner"])
def test_a_folder_that_names_other_code_is_refused(where: str, model: Path, tmp_path: Path) -> None:
    calibrate = ("calibrate", model, *SHORT, "-o", tmp_path / "stats")
    config = json.loads((model / "config.json").read_text())
    kernels = {"attn_implementation": "somebody/kernels"}
    edited = {**config, **(kernels if where == "root" else {"text": [kernels]})}
    (model / "config.json").write_text(json.dumps(edited))
    message = refused(*calibrate)
    assert "'somebody/kernels', which is never run here" in message
    (model / "config.json").write_text(json.dumps(config))
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    assert "Merge the adapter into its model first" in refused(*calibrate)


def test_code_in_a_model_folder_is_never_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass C: pass\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (model / f"{name}.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.C",
        "AutoModelForCausalLM": "modeling_own.C",
    }
    (model / "config.json").write_text(json.dumps(config))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_own.C", "tokenization_own.C"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = mofq("calibrate", model, *SHORT, "-o", tmp_path / "stats")
    assert ran.code in (0, 1)
    assert "Traceback" not in ran.err
    assert not mark.exists()
    settings["tokenizer_class"] = "NoneOfOurs"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    message = refused("calibrate", model, *SHORT, "-o", tmp_path / "stats-2")
    assert "needs code that comes with it, which is never run here" in message
    assert not mark.exists()


def test_names_that_a_terminal_obeys_are_refused(
    model: Path, measured: Measured, tmp_path: Path
) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.\x1b]0;owned\x07"] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused("inspect", model)
    assert "Do not trust this checkpoint" in message
    assert "\x1b" not in message
    recipe = tmp_path / "recipe.yaml"
    text = measured.recipe.read_text("utf-8")
    recipe.write_text(text.replace("model: {name: model", 'model: {name: "model\\e[2J"'))
    assert recipe.read_text() != text
    message = refused("export", DEMO, recipe, "--to", "compressed-tensors", "-o", tmp_path / "o")
    assert "control character" in message
    assert "\x1b" not in message
    table = tmp_path / "table.jsonl"
    rows = measured.table.read_text("utf-8")
    table.write_text(rows.replace("layers.0.attn.o", "layers.0.\\u202eattn.o"))
    assert "control character" in refused("search", table, "--max-bits", "5", "-o", recipe)


SCRIPT = "<script>alert(1)</script>"


@pytest.mark.long
def test_a_layer_called_script_is_text_in_the_explorer(measured: Measured, tmp_path: Path) -> None:
    class Tags(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append(tag)

    pages = []
    for name in ("plain", SCRIPT):
        folder = tmp_path / str(len(pages))
        folder.mkdir()
        table, recipe, page = (folder / n for n in ("table.jsonl", f"{name[:8]}.yaml", "p.html"))
        for source, target in ((measured.table, table), (measured.recipe, recipe)):
            text = source.read_text("utf-8")
            for layer in ("layers.0.attn.o", "model.layers.0.self_attn.o_proj"):
                quoted = json.dumps(name)[1:-1] + layer[-1]
                text = text.replace(f'"{layer}"', f'"{quoted}"')
                text = text.replace(f"{layer}:", f'"{quoted}":').replace(
                    f"[{layer}]", f'["{quoted}"]'
                )
            target.write_text(text)
        assert name in table.read_text()
        ok("explore", table, recipe, "-o", page)
        content = page.read_text("utf-8")
        assert name not in content or name == "plain"
        tags = Tags()
        tags.found = []
        tags.feed(content)
        pages.append(tags.found)
    assert pages[0] == pages[1]


@pytest.mark.long
def test_every_output_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = tmp_path / "made"
        folder.mkdir()
        space = folder / "space.yaml"
        space.write_text("version: 1\nschemes: [int4.g64, int8.channel]\n")
        run = ("run", DEMO, "--space", space, "--max-bits", "6", "--engine", "vllm-hopper")
        run += ("--effort", "quick")
        size = ("--sequences", "4", "--sequence-length", "64", "--tokens", "128")
        ok(*run, *size, "-o", folder / "run")
        table = folder / "run" / "table.jsonl"
        model = ("--solver", "optuna", "--trials", "5", "--model", DEMO, *TEXT)
        ok("search", table, "--max-bits", "5", *model, "-o", folder / "recipe.yaml")
        ok("explore", table, folder / "recipe.yaml", "-o", folder / "page.html")
        ok("validate", DEMO, folder / "recipe.yaml", *TEXT, "-o", folder / "validation.json")
        ok("plot", table, "--kind", "frontier", "-o", folder / "figure.svg")
    finally:
        os.umask(before)
    made = {path: stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*")}
    assert len(made) > 20
    wrong = {
        str(path.relative_to(folder)): oct(mode)
        for path, mode in made.items()
        if mode != (0o750 if path.is_dir() else 0o640)
    }
    assert wrong == {}


def test_a_link_in_a_model_folder_publishes_nothing(model: Path, tmp_path: Path) -> None:
    private = tmp_path / "id_rsa"
    private.write_text("secret")
    (model / "notes.md").symlink_to(private)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "exported"
    ok("recipe", "uniform", model, "int4.g32", "-o", recipe)
    message = refused("export", model, recipe, "--to", "compressed-tensors", "-o", out)
    assert "outside of the model's folder" in message
    assert not out.exists()
    assert private.read_text() == "secret"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_a_model_that_is_a_link_elsewhere_is_not_read(
    name: str, model: Path, tmp_path: Path
) -> None:
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    message = refused("inspect", model)
    assert f"{name}: is a link to {tmp_path / 'elsewhere'}, outside of the model's" in message
    (model / name).unlink()
    (tmp_path / "elsewhere").rename(model / "same")
    (model / name).symlink_to("same")
    ok("inspect", model)
