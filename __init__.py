"""SLiMe for ComfyUI: learn a segmenter from one example. Entry point; the nodes are in ``nodes/``."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # ComfyUI calls this
    from pathlib import Path

    import nodes  # ComfyUI's

    from .nodes.extension import SlimeExtension
    from .nodes.files import copy_sample_images, register_folder
    from .nodes.installation import check_installation
    from .nodes.routes import register_routes

    check_installation(Path(__file__).resolve().parent, nodes.NODE_CLASS_MAPPINGS)
    register_folder()
    copy_sample_images()
    register_routes()
    return SlimeExtension()
