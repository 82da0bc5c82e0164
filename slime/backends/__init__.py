"""Diffusion hosts other than ComfyUI, one file each."""
