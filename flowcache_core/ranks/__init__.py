"""One film over several devices, on torch.distributed: who computes what, what is sent, and what that should take."""
