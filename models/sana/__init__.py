"""SANA-Sprint: its sampler, keyed latents, fused blocks and CUDA graphs."""
