"""The ComfyUI nodes: everything that imports comfy, and nothing else does."""
