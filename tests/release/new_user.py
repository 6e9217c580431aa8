"""What a new user does first, by the Python of an environment that has gqa-serve and what it needs, no more:

    python tests/release/new_user.py --backend native

Owns a tiny random checkpoint and what is expected of an installation: the command, the page, a server that
answers, and the same tokens from every instruction set the processor has and from plain PyTorch.
Invariant: it is the installed package that runs, never the source tree; the status is 0 only if all holds.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

START_S = 180
PROMPT = "grouped"
HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS, LETTERS = 64, 96, 4, 2, 2, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "vocab_size": LETTERS + 1,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": LETTERS,
}


def check(holds: bool, what: str) -> None:
    """One line per thing that was looked at; the first that does not hold ends the run."""
    if not holds:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


def write_weights(file: Path) -> None:
    """Random matrices, in the names and shapes of a Llama."""
    import torch
    from safetensors.torch import save_file

    kv = HIDDEN // HEADS * KV_HEADS
    layer_shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (WIDE, HIDDEN),
        "mlp.up_proj": (WIDE, HIDDEN),
        "mlp.down_proj": (HIDDEN, WIDE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    vocabulary = (LETTERS + 1, HIDDEN)
    shapes = {"model.embed_tokens": vocabulary, "model.norm": (HIDDEN,), "lm_head": vocabulary}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def write_tokenizer(file: Path) -> None:
    """A token for each byte, and one for the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(letters)} | {"<end>": LETTERS}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(file))


def write_checkpoint(folder: Path) -> None:
    write_weights(folder / "model.safetensors")
    write_tokenizer(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def command() -> str:
    """The `gqa-serve` of this environment."""
    return str(Path(sysconfig.get_path("scripts")) / "gqa-serve")


def printed(*words: str) -> str:
    result = subprocess.run([command(), *words], capture_output=True, text=True, check=False)
    check(result.returncode == 0, f"gqa-serve {' '.join(words)} ends with status 0 {result.stderr}".strip())
    return result.stdout


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """The base URL of `gqa-serve FLAGS`, once it is ready."""
    process = subprocess.Popen(
        [command(), *flags, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    output, seen, deadline = process.stdout, [], time.monotonic() + START_S
    reader = threading.Thread(target=lambda: [lines.put(line) for line in output], daemon=True)
    reader.start()
    try:
        while not (seen and seen[-1].startswith("Ready: ")):
            try:
                seen.append(lines.get(timeout=1))
            except queue.Empty:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"FAILED: the server did not start:\n{''.join(seen)}") from None
        yield seen[-1].split()[1].removesuffix("/v1")
    finally:
        process.terminate()
        process.wait(60)


def fetched(url: str, body: dict[str, Any] | None = None) -> str:
    """What the server answers with status 200; anything else raises HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def served(model: Path) -> str:
    """Eight tokens, as text, that a server writes; its page and its other ways to answer beside it."""
    with server("--model", str(model), "--cors-origins", "https://chat.example.org") as url:
        check("<title" in fetched(f"{url}/"), "the page at / is served")
        check("<title" in fetched(f"{url}/docs"), "the documentation of the API is served")
        check('"openapi"' in fetched(f"{url}/openapi.json"), "the description of the API is served")
        check("gqa_serve_" in fetched(f"{url}/metrics"), "metrics are served")
        name = fetched_model(url)
        body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        text = json.loads(fetched(f"{url}/v1/completions", body))["choices"][0]["text"]
        chat = {"model": name, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
        stream = fetched(f"{url}/v1/chat/completions", chat | {"stream": True})
        check(stream.endswith("data: [DONE]\n\n"), "a chat streams")
        schema = {"type": "json_schema", "json_schema": {"name": "word", "schema": {"const": "yes"}}}
        formed = json.loads(fetched(f"{url}/v1/chat/completions", chat | {"response_format": schema}))
        check(formed["choices"][0]["message"]["content"] == '"yes"', "a schema is enforced")
    check(len(text) > 0, f"the server answers: {text!r}")
    return str(text)


def told_without_a_hub() -> None:
    """A model on a hub that cannot be reached."""
    environ = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [command(), "--model", "nobody/nothing", "--port", "0"],
        capture_output=True, text=True, env=environ, check=False,
    )  # fmt: skip
    told = result.returncode != 0 and "HF_ENDPOINT" in result.stderr and "Traceback" not in result.stderr
    check(told, f"a hub that cannot be reached is told in words: {result.stderr.strip()}")


def fetched_model(url: str) -> str:
    return str(json.loads(fetched(f"{url}/v1/models"))["data"][0]["id"])


def generated(model: Path, **settings: Any) -> str:
    """The same eight tokens without HTTP."""
    from gqa_serve import LLM, SamplingParams

    llm = LLM(str(model), **settings)
    return llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text


def native_levels() -> list[str]:
    """Instruction sets of the native kernels that this processor has; none where there are no kernels."""
    from gqa_serve.engine.kernels import cpu

    try:
        return list(cpu.load().isa_levels())
    except cpu.NativeUnavailableError as error:
        print(f"no native kernels: {error}")
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description="Check an installed gqa-serve.")
    parser.add_argument(
        "--backend", choices=("native", "reference"), required=True, help="what CPUs are served by"
    )
    backend = parser.parse_args().backend
    import gqa_serve

    home = Path(gqa_serve.__file__).parent
    check(home.is_relative_to(sysconfig.get_path("platlib")), f"gqa_serve is the installed one, in {home}")
    version = metadata.version("gqa-serve")
    check(gqa_serve.__version__ == version, f"the package and its metadata say version {version}")
    check(printed("--version") == f"gqa-serve {version}\n", "gqa-serve --version says so")
    check("--model" in printed("--help"), "gqa-serve --help lists --model")
    levels = native_levels()
    check(bool(levels) == (backend == "native"), f"kernels for {levels or 'plain PyTorch'}, as expected")
    told_without_a_hub()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_checkpoint(model)
        text = served(model)
        check(generated(model, backend="reference") == text, "plain PyTorch writes the same")
        for isa in levels:
            check(generated(model, backend="native", cpu_isa=isa) == text, f"{isa} kernels write the same")


if __name__ == "__main__":
    os.chdir("/")  # so that nothing of the source tree can be imported from here
    main()
