"""Run a real ComfyUI server with this extension and the demo pack, and use its API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "demo" / "models" / "slime_tiny.safetensors"
FLOW = MODEL.with_name("tiny_flow.safetensors")
EXTENSION = "slime"


class WorkflowFailed(RuntimeError):
    """Error of a prompt that was refused or failed; ``details`` is the server's answer."""

    def __init__(self, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.details = details


def link_folder(target: Path, link: Path) -> None:
    """Create a symbolic link, or on Windows a junction, which needs no special rights."""
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """A ComfyUI process on a free loopback port, with folders of its own; a context manager.

    Args:
        comfyui: ComfyUI's folder; default is COMFYUI_DIR.
        options: further command-line options.
        base: folder for models, input, output; a temporary one by default.
    """

    def __init__(
        self, comfyui: str | Path | None = None, options: tuple[str, ...] = (), base: Path | None = None
    ) -> None:
        self.comfyui = Path(comfyui or os.environ["COMFYUI_DIR"])
        self.port = free_port()
        self.base = base or Path(tempfile.mkdtemp(prefix="slime-comfyui-"))
        self._temporary = base is None
        self.options = options
        self.log_path = self.base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.client = uuid.uuid4().hex

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ComfyServer:
        self._prepare_folders()
        command = [
            sys.executable,
            str(self.comfyui / "main.py"),
            "--port",
            str(self.port),
            "--listen",
            "127.0.0.1",
            "--base-directory",
            str(self.base),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
            *self._device_options(),
            *(("--front-end-root", os.environ["SLIME_FRONT_END"]) if os.environ.get("SLIME_FRONT_END") else ()),
            *self.options,
        ]
        environment = os.environ | {"PYTHONUTF8": "1"}
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._temporary:
            # Links first: a recursive delete must never follow them.
            for link in (self.base / "custom_nodes").iterdir():
                if link.is_symlink():
                    link.unlink()
                elif os.name == "nt":
                    os.rmdir(link)
            shutil.rmtree(self.base, ignore_errors=True)

    def kill(self) -> None:
        """End the process without a chance to clean up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def resident_bytes(self) -> int:
        """Return the resident memory of the process in bytes."""
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process(self._process.pid).memory_info().rss) if self._process is not None else 0

    def _prepare_folders(self) -> None:
        for name in (
            "custom_nodes",
            "models/checkpoints",
            "models/loras",
            "models/slime",
            "input",
            "output",
            "temp",
            "user",
        ):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for target, name in ((ROOT, EXTENSION), (ROOT / "demo" / "pack", "slime_demo")):
            link = self.base / "custom_nodes" / name
            if not link.exists():
                link_folder(target, link)
        self.add_checkpoint(MODEL)

    @staticmethod
    def _device_options() -> tuple[str, ...]:
        import torch

        return () if torch.cuda.is_available() or torch.backends.mps.is_available() else ("--cpu",)

    def add_checkpoint(self, path: Path) -> str:
        """Make a checkpoint file available to Load Checkpoint; return its name there."""
        target = self.base / "models" / "checkpoints" / path.name
        if not target.exists():
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        return path.name

    def _wait_until_up(self, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process is not None and self._process.poll() is not None:
                raise WorkflowFailed(f"ComfyUI ended while starting:\n{self.log()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        raise WorkflowFailed(f"ComfyUI did not answer within {seconds:.0f} s:\n{self.log()[-3000:]}")

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    # --------------------------------------------------------------------------------------------------------- API

    def get(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            data: bytes = answer.read()
            return data

    def post(self, path: str, body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise WorkflowFailed(f"{path}: {text}", json.loads(text) if text.startswith("{") else text) from error

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue an API-format prompt; return its id.

        Raises:
            WorkflowFailed: any of its outputs is refused.
        """
        answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client})
        if answer.get("node_errors"):
            raise WorkflowFailed(f"/prompt: {json.dumps(answer['node_errors'])}", answer)
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, seconds: float = 600) -> dict[str, Any]:
        """Wait for a prompt to finish, whatever its end, and return its history entry."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id]["status"]["status_str"] in ("success", "error"):
                entry: dict[str, Any] = history[prompt_id]
                return entry
            time.sleep(0.1)
        raise WorkflowFailed(f"prompt {prompt_id} did not end within {seconds:.0f} s\n{self.log()[-2000:]}")

    def run(self, prompt: dict[str, Any], seconds: float = 600) -> dict[str, Any]:
        """Queue a prompt, wait, and return its outputs by node id.

        Raises:
            WorkflowFailed: the prompt is refused or ends in an error; its text is the node's message.
        """
        entry = self.wait(self.queue(prompt), seconds)
        if entry["status"]["status_str"] != "success":
            errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
            text = errors[0]["exception_message"] if errors else str(entry["status"]["messages"])
            raise WorkflowFailed(text.strip(), errors[0] if errors else entry["status"])
        outputs: dict[str, Any] = entry["outputs"]
        return outputs

    def output_image(self, item: dict[str, str]) -> bytes:
        """Return the bytes of an image named in a node's outputs."""
        return self.get_bytes("/view?" + urllib.parse.urlencode(item))

    def interrupt(self) -> None:
        self.post("/interrupt", {})
