"""The scripts in a Jupyter kernel: it is as it was after them, and lives on when they are interrupted."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager
from support.inprocess import TINY, make_tiny_data
from support.scripts import PATIENCE, ROOT
from support.trainings import ENVIRONMENT

STATE = f"import sys; sys.path.append('{ROOT}/tests'); from test_context import surroundings; before = surroundings()"
SAME = "print([place for place, value in enumerate(surroundings()) if before[place] != value])"
HANDLER = "import os, signal; print(signal.getsignal(signal.SIGINT), 'GOMP_SPINCOUNT' in os.environ)"
Answer = tuple[str, str, list[str]]  # what a cell prints on both streams, and the exception that it ends with


async def session(manager: AsyncKernelManager, client: Any, folder: Path) -> None:
    """Do what a user does in a notebook, one after the other."""

    async def cell(code: str) -> Answer:
        printed: dict[str, str] = {"stdout": "", "stderr": ""}
        errors: list[str] = []

        def listen(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed[content["name"]] += content["text"]
            elif message["msg_type"] == "error":
                errors.append(content["ename"] + " " + content["evalue"])

        await client.execute_interactive(code, output_hook=listen, timeout=PATIENCE)
        return printed["stdout"], printed["stderr"], errors

    async def interrupt() -> None:
        while not (folder / "runs/b/last.pt").exists():
            await asyncio.sleep(0.05)
        await manager.interrupt_kernel()

    train = f"%run {ROOT}/train.py {' '.join(TINY)} --data data --quiet"
    before = await cell(HANDLER)
    assert (await cell(f"%run {ROOT}/train.py --help"))[2] == []  # loads PyTorch
    assert await cell(HANDLER) == before
    assert await cell(STATE) == ("", "", [])
    assert await cell(f"{train} --name a") == ("", "", [])
    assert await cell(SAME) == ("[]\n", "", [])
    endless = cell(f"{train} --name b --epochs 1000000 --patience 1000000")
    (_, said, errors), _ = await asyncio.gather(endless, interrupt())
    assert errors == ["SystemExit 130"]
    assert "to go on: python train.py --resume runs/b\n" in said
    assert await cell(SAME) == ("[]\n", "", [])
    table, said, errors = await cell(f"%run {ROOT}/eval.py runs/a --samples 2")
    assert ("CVAE (importance sampling, S = " in table, said, errors) == (True, "", [])
    words = [*TINY, "--data", "data", "--quiet", "--name", "c"]
    assert (await cell(f"import train; print(train.main({words!r}))"))[0] == "0\n"
    assert await cell(SAME) == ("[]\n", "", [])


@pytest.mark.filterwarnings("ignore:.*without encryption")
def test_kernel_is_as_before_and_lives_on(tmp_path: Path) -> None:
    make_tiny_data(tmp_path / "data")

    async def test() -> None:
        manager = AsyncKernelManager()
        manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        await manager.start_kernel(cwd=str(tmp_path), env=ENVIRONMENT)
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=PATIENCE)
            await session(manager, client, tmp_path)
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    asyncio.run(test())
