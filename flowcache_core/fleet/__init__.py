"""Many films over many workers: Ray actors, running ComfyUI servers, or this process."""
