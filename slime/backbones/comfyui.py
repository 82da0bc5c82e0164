"""A checkpoint through ComfyUI's stock loader and this extension's adapters, without a server."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import torch

import slime

from ..errors import SlimeError
from .base import Backbone

NAME = "slime_extension"
# Extras, and what stands above them.
OPTIONAL = (
    "slime.backbones.hf_unet",
    "slime.backbones.single_file",
    "slime.backbones.load",
    "slime.data",
    "slime.__main__",
)


def load_checkpoint(checkpoint: Path, folder: Path) -> Backbone:
    """Raises SlimeError where the folder is not ComfyUI's, or this extension's nodes are nowhere."""
    import_comfyui(folder)
    load_extension(_extension_near(folder))
    import comfy.sd

    build_backbone = importlib.import_module(f"{NAME}.nodes.backbones").build_backbone
    with torch.inference_mode():
        loaded = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=True, output_clip=True)
        model, clip, vae = loaded[:3]
        return build_backbone(model, vae, clip, None)  # type: ignore[no-any-return]


def import_comfyui(folder: Path) -> None:
    """Make ComfyUI importable, on the CPU where there is no GPU."""
    if not (folder / "comfy" / "sd.py").is_file():
        raise SlimeError(f"{folder} is not ComfyUI's folder: there is no comfy/sd.py in it.")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    import comfy.options  # noqa: F401
    from comfy.cli_args import args

    args.cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())


def load_extension(root: Path) -> ModuleType:
    """Import the extension as a package, as ComfyUI does; its ``slime`` is this process's ``slime``."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    for info in pkgutil.walk_packages(slime.__path__, "slime."):
        if not info.name.startswith(OPTIONAL):
            importlib.import_module(info.name)
    spec = importlib.util.spec_from_file_location(NAME, root / "__init__.py", submodule_search_locations=[str(root)])
    if spec is None or spec.loader is None:
        raise ImportError(root)
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    for name, part in list(sys.modules.items()):
        if name == "slime" or name.startswith("slime."):
            sys.modules[f"{NAME}.{name}"] = part
    spec.loader.exec_module(module)
    return module


def _extension_near(folder: Path) -> Path:
    """Return the folder of the nodes: beside this package in a clone, or in ComfyUI's custom_nodes."""
    places = [Path(slime.__file__).parent.parent, *sorted((folder / "custom_nodes").glob("*"))]
    for place in places:
        if (place / "nodes" / "backbones.py").is_file() and (place / "slime").is_dir():
            return place
    raise SlimeError(f"SLiMe is not in {folder / 'custom_nodes'}: install it there, or run this in a clone of it.")
