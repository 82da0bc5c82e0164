"""ComfyUI nodes over :mod:`slime`."""
