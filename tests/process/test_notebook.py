"""The scripts in a Jupyter kernel: it is as it was after them, and lives on when they are interrupted."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jupyter_client.manager import AsyncKernelManager
from support.inprocess import TINY, make_tiny_data
from support.scripts import PATIENCE, ROOT

STATE = """
import os, signal, sys, threading, torch

def state():
    return {
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (threading.excepthook, sys.excepthook),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32),
        "denormals": sys.float_info.min / 2 == 0,
        "random": torch.get_rng_state().tolist(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
        "others": (sys.argv, sys.stdout, sys.stderr, os.getcwd(), torch.get_num_threads(), torch.get_default_dtype()),
    }

before = state()
"""
CHANGED = "now = state(); print([name for name in before if now[name] != before[name]])"


class Answer(NamedTuple):
    """What a cell prints, and the exception that it ends with."""

    out: str
    err: str
    error: tuple[str, str] | None


class Kernel:
    """A kernel of Jupyter, as a notebook has one."""

    async def start(self, folder: Path) -> None:
        self.manager = AsyncKernelManager()
        self.manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        await self.manager.start_kernel(cwd=str(folder), env=environment)
        self.client = self.manager.client()
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=PATIENCE)

    async def run(self, code: str) -> Answer:
        """The answer to a cell."""
        printed = {"stdout": "", "stderr": ""}
        errors = []

        def listen(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed[content["name"]] += content["text"]
            elif message["msg_type"] == "error":
                errors.append((content["ename"], content["evalue"]))

        await self.client.execute_interactive(code, output_hook=listen, timeout=PATIENCE)
        return Answer(printed["stdout"], printed["stderr"], errors[0] if errors else None)

    async def close(self) -> None:
        self.client.stop_channels()
        await self.manager.shutdown_kernel(now=True)


async def session(kernel: Kernel, folder: Path) -> None:
    """What a user does in it, one after the other."""
    words = [*TINY, "--data", "data", "--quiet"]
    train = f"%run {ROOT}/train.py {' '.join(words)}"
    handler = "import os, signal; print(signal.getsignal(signal.SIGINT), 'GOMP_SPINCOUNT' in os.environ)"
    before = await kernel.run(handler)
    assert (await kernel.run(f"%run {ROOT}/train.py --help")).error is None  # loads PyTorch
    assert await kernel.run(handler) == before
    assert (await kernel.run(STATE)).error is None

    assert await kernel.run(f"{train} --name a") == ("", "", None)
    assert (await kernel.run(CHANGED)).out == "[]\n"

    async def interrupt() -> None:
        while not (folder / "runs/b/last.pt").exists():
            await asyncio.sleep(0.05)
        await kernel.manager.interrupt_kernel()

    endless = kernel.run(f"{train} --name b --epochs 1000000 --patience 1000000")
    answer, _ = await asyncio.gather(endless, interrupt())
    assert answer.error == ("SystemExit", "130")
    assert "to go on: python train.py --resume runs/b\n" in answer.err
    assert (await kernel.run(CHANGED)).out == "[]\n"

    answer = await kernel.run(f"%run {ROOT}/eval.py --runs runs/a --samples 2")
    assert (answer.err, answer.error) == ("", None)
    assert "CVAE (importance sampling, S = " in answer.out
    assert (await kernel.run(f"import train; print(train.main([*{words!r}, '--name', 'c']))")).out == "0\n"
    assert (await kernel.run(CHANGED)).out == "[]\n"


@pytest.mark.filterwarnings("ignore:.*without encryption")
def test_kernel_is_as_before_and_lives_on(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data")

    async def test() -> None:
        kernel = Kernel()
        await kernel.start(tmp_path)
        try:
            await session(kernel, tmp_path)
        finally:
            await kernel.close()

    asyncio.run(test())
