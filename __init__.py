"""SLiMe for ComfyUI: learn a segmenter from one example. Entry point only; the nodes are in ``nodes/``."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # ComfyUI calls this
    from .nodes.extension import SlimeExtension
    from .nodes.files import place_pictures, register_folder
    from .nodes.routes import register_routes

    register_folder()
    place_pictures()
    register_routes()
    return SlimeExtension()
