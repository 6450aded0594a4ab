"""The rooms stay apart; importing them costs little, reads nothing, writes nothing and fetches nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "diffusion": set(),
    "models": set(),
    "guidance": {"diffusion"},
    "inversion": {"diffusion", "models"},
}
OURS = {*ARROWS, "scripts", "benchmarks", "tests"}
HEAVY = {"diffusers", "huggingface_hub", "matplotlib", "PIL", "tokenizers", "tqdm", "transformers", "tyro"}
WATCH = """
import json, sys, time
import torch
seen = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        seen.append([str(arguments[0]), str(arguments[1])])
    elif event.split(".")[0] in ("socket", "subprocess", "shutil", "urllib") or event == "os.mkdir":
        seen.append([event, "event"])
before = set(sys.modules)
sys.addaudithook(hook)
start = time.process_time()
import diffusion, models, guidance, inversion
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "seen": seen, "modules": sorted(set(sys.modules) - before)}))
"""


def imported(file: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute here"
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        strangers = (imported(file) & OURS) - ARROWS[package] - {package}
        assert not strangers, f"{file.relative_to(ROOT)} imports {', '.join(sorted(strangers))}"


def watch() -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCH]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd="/")
    return json.loads(done.stdout)


def test_importing_is_quick_and_quiet() -> None:
    run = watch()
    if run["seconds"] > 0.3:  # of processor time, over `import torch`; a first run may be cold
        run = watch()
    assert run["seconds"] <= 0.3
    assert not {name.split(".")[0] for name in run["modules"]} & HEAVY
    code = (".py", ".pyc", ".so", ".pyd", ".pth")
    unexpected = [(name, mode) for name, mode in run["seen"] if not name.endswith(code) or "w" in mode]
    assert not unexpected
