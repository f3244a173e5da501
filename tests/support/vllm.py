"""A real vLLM on this CPU, in an environment of its own (`make vllm`), as a process of the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.generation import WritingServer
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.served.launch import server_command

PYTHON = Path(
    os.environ.get("DSKD_VLLM_PYTHON")
    or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
)
MISSING = f"no vLLM: there is no {PYTHON} (`make vllm` makes it)"

#: What a CPU needs; see vLLM's own documentation.
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
_ARGUMENTS = ("--enforce-eager", "--max-num-seqs", "16")


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class VLLM:
    """A server.

    Args:
        url: where it shall listen.
        command: what starts it there.
        folder: where its log goes.
        env: environment variables beside those that a CPU needs.
    """

    def __init__(
        self, url: str, command: list[str], folder: Path, env: dict[str, str] | None = None
    ) -> None:
        self.url = url
        self.command = [*command, *_ARGUMENTS]
        self.log = folder / "vllm.log"
        self.env = os.environ | _ENVIRONMENT | (env or {})
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_teacher(cls, teacher: Path, folder: Path, **keys: Any) -> VLLM:
        """The server of a teacher, as `axolotl-dskd serve` would start it.

        Args:
            keys: of `dskd.teacher.server`.
        """
        url = f"http://127.0.0.1:{free_port()}"
        server = {"url": url, **keys}
        config = TeacherConfig.model_validate(
            {"base_model": str(teacher), "dtype": "float32", "server": server}
        )
        spec = TeacherSpec(config, 0, torch.device("cpu"))
        return cls(url, server_command(spec, url, 512, str(PYTHON)), folder)

    @classmethod
    def that_writes(cls, student: Path, folder: Path) -> VLLM:
        """A server that takes new weights and adapters, as a training would have it started."""
        url = f"http://127.0.0.1:{free_port()}"
        wanted = [
            WritingServer(url, str(student), "student", 512, rank, takes_weights=rank is None)
            for rank in (8, None)
        ]
        env = wanted[0].environment | wanted[1].environment
        command = [*wanted[0].command(str(PYTHON)), "--dtype", "float32"]
        return cls(url, command, folder, env)

    def reset_weights(self, model: Path) -> None:
        """Give it the weights of a folder."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
        httpx.post(f"{self.url}/collective_rpc", json=body, timeout=60).raise_for_status()

    def start(self, timeout: float = 300) -> None:
        """Begin, and wait until it answers.

        Raises:
            RuntimeError: it ended or takes too long, with the end of its log.
        """
        self.launch()
        self.wait(timeout)

    def launch(self) -> None:
        """Begin."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,  # its own children end with it, see `stop`
            )

    def wait(self, timeout: float = 300) -> None:
        """Until it answers; see `start`."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"vLLM does not start: {self.log.read_text()[-3000:]}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it and the processes that it started."""
        if self.process is None:
            return
        for now in (number, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, now)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.process = None
