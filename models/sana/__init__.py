"""SANA-Sprint: sampler, keyed latents, fused blocks and CUDA graphs."""
